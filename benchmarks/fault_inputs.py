"""What `faults.py` feeds to semiseg: a small project, what can be broken in it, and mutations of its files."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomlkit
from PIL import Image

from semiseg.config.read import merge
from tests.coco_files import make_coco
from tests.model_folders import make_model
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("runs/r")
STUDY = """title = "t"
[splits]
few = "few"
[[rows]]
name = "boxes"
set = { objective.box = "none" }
[[rows]]
name = "masks"
set = { supervision.source = "masks" }
[[tables]]
name = "table"
title = "T"
split = "few"
rows = ["boxes", "masks"]
"""
SPLIT = 'name = "few"\ndataset = "toy"\nseen = ["cat", "dog"]\n[fraction]\nseed = 3\ndefault = 1.0\ncat = 0.5\n'
DIGITS = "9" * 5000  # more than Python turns into an integer
DEEP = "[" * 100_000

Spoil = Callable[[Path], object]  # changes a copy of the project


def build_project(folder: Path) -> None:
    """A COCO data set, a model that finds something, a run, a split, a study, a record of results, a photo."""
    coco = make_coco(folder / "coco", instances_per_image=3)
    boxes = [{**item, "segmentation": None} for item in coco.content["annotations"]]
    (folder / "coco/boxes.json").write_text(json.dumps({**coco.content, "annotations": boxes}))
    make_model(folder / "model")
    names = {"images": "images", "annotations": "instances.json"}
    data: dict[str, Any] = {f"{kind}_{name}": value for kind in ("train", "val") for name, value in names.items()}
    data |= {"root": "coco", "short_sides": [64], "long_side": 96}
    base = {name: TINY[name] for name in ("model", "inference", "optim", "runtime")} | {
        "init_from": "model",
        "data": data,
    }
    base = merge(base, {"optim": {"steps": 8, "batch_size": 2}, "runtime": {"checkpoint_every": 2}})
    # Boxes alone are validated: their AP rises from one validation to the next, and `best/` is replaced each time.
    own = {"data": {"val_annotations": "boxes.json"}, "supervision": {"source": "as_annotated"}}
    (folder / "run.toml").write_text(tomlkit.dumps(merge(base, {**own, "runtime": {"evaluate_every": 2}})))
    for name in ("experiments", "splits", "page"):
        (folder / name).mkdir()
    (folder / "experiments/study.toml").write_text(STUDY + tomlkit.dumps({"base": base}))
    (folder / "splits/few.toml").write_text(SPLIT)
    shutil.copy(ROOT / "reports/shapes/results.jsonl", folder / "page/results.jsonl")
    shutil.copy(folder / "coco/images/001.png", folder / "photo.png")


# Broken inputs. `refused`: a sentence and exit code 2; `right`: as with the good input; `either`: one of both.


@dataclass(frozen=True)
class Broken:
    """One broken or odd input; the command that meets it is that of its group (`faults.GROUPS`)."""

    name: str
    spoil: Spoil
    expect: Literal["refused", "right", "either"] = "refused"


def put(name: str | Path, content: bytes | str) -> Spoil:
    """A file with this content instead of what is there."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content

    def spoil(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return spoil


def damage(pattern: str, change: Callable[[bytes], bytes]) -> Spoil:
    """The last file of a pattern with other bytes."""

    def spoil(folder: Path) -> None:
        path = max(folder.glob(pattern))
        path.write_bytes(change(path.read_bytes()))

    return spoil


def edit(name: str | Path, change: Callable[[Any], object]) -> Spoil:
    """A JSON file whose content is changed in place."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return spoil


def fields(name: str, place: Callable[[Any], dict[str, Any]], *changes: dict[str, Any]) -> list[Broken]:
    """A JSON file with other values at a place, once for each change."""

    def broken(change: dict[str, Any]) -> Broken:
        return Broken(f"{change}"[:60], edit(name, lambda content: place(content).update(change)))

    return [broken(change) for change in changes]


def contents(name: str | Path, *values: str | bytes) -> list[Broken]:
    """A file with other content, once for each value."""
    return [Broken(f"{Path(name).name} {value[:20]!r}", put(name, value)) for value in values]


def swaps(name: str, table: str) -> list[Broken]:
    """A text file with one passage replaced, once for each line `old -> new` of the table."""

    def broken(old: str, new: str) -> Broken:
        def change(data: bytes) -> bytes:
            assert old.encode() in data, old
            text = new.replace("DIGITS", DIGITS).replace("DEEP", DEEP).replace("\\n", "\n")
            return data.replace(old.encode(), text.encode(), 1)

        return Broken(new, damage(name, change))

    return [broken(*line.split(" -> ")) for line in table.strip().splitlines()]


def toml(name: str, table: str) -> list[Broken]:
    """What can be wrong with any TOML file, and the lines `old -> new` of a table."""
    broken = contents(name, "", "a = = 1", bytes(range(256)), b"title = '\xe9'")
    return [*broken, *swaps(name, table), Broken("is a folder", special(name, Path.mkdir))]


def removed(name: str) -> Broken:
    """A file that is missing."""
    return Broken(f"no {name}", lambda folder: (folder / name).unlink())


def tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Broken:
    """The newest checkpoint, changed and written again."""

    def spoil(folder: Path) -> None:
        import torch

        path = max(folder.glob(NEWEST))
        state = torch.load(path, weights_only=True)
        torch.save(change(state) or state, path)

    return Broken(name, spoil)


def weights(value: float) -> Broken:
    """The model folder with the first weight of each tensor replaced."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / WEIGHTS)
        for tensor in state.values():
            tensor.view(-1)[0] = value
        save_file(state, folder / WEIGHTS)

    return Broken(f"weights that are {value}", spoil)


class Intruder:
    """Unpickling this makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruded",)


def photo(mode: str, change: Callable[[np.ndarray], np.ndarray] = np.asarray, **options: Any) -> Spoil:
    """The photo in another mode and with other values, by Pillow's `options`; its colours as `twin.png`."""

    def spoil(folder: Path) -> None:
        image = Image.open(folder / PHOTO).convert(mode)
        image.convert("RGB").save(folder / "twin.png")
        changed = image if change is np.asarray else Image.fromarray(change(np.asarray(image)))
        changed.save(folder / PHOTO, **{"format": "PNG", **options})

    return spoil


def turned(folder: Path) -> None:
    """The photo with an EXIF orientation."""
    image, exif = Image.open(folder / PHOTO), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_270).save(folder / "twin.png")
    image.save(folder / PHOTO, exif=exif)


def special(pattern: str, make: Callable[[Path], object]) -> Spoil:
    """Something else instead of the last file of a pattern."""

    def spoil(folder: Path) -> None:
        path = max(folder.glob(pattern))
        path.unlink()
        make(path)

    return spoil


def flip(content: bytes) -> bytes:
    """One bit of the exponent of a weight in the first third of the file."""
    place = len(content) // 3 // 4 * 4 + 3
    return content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :]


def half(data: bytes) -> bytes:
    """The first half."""
    return data[: len(data) // 2]


PHOTO, JSON, WEIGHTS, INFO = "photo.png", "coco/instances.json", "model/model.safetensors", "model/config.json"
NEWEST, LOG, RECORD = f"{RUN}/checkpoints/*.pt", f"{RUN}/log.jsonl", "page/results.jsonl"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n0 0 64 64 rectfill\nshowpage\n"
BOMB = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xff\xff\x00\x00\xff\xff\x08\x02\x00\x00\x00"
ODD_PHOTOS: dict[str, Spoil] = {
    **{name: photo("RGB", format=name) for name in ("BMP", "TGA", "PPM", "TIFF")},
    **{f"mode {mode}": photo(mode) for mode in ("P", "L", "LA", "1", "RGBA")},
    "GIF": photo("P", format="GIF"),
    "WebP": photo("RGB", format="WEBP", lossless=True),
    "TIFF, LZW": photo("RGB", format="TIFF", compression="tiff_lzw"),
    "CMYK": photo("CMYK", format="TIFF"),
    "16 bit": photo("L", lambda grey: grey.astype(np.uint16) * 257),
    "turned by EXIF": turned,
    "bytes after the end": damage(PHOTO, lambda data: data + b"\0" * 999),
}
IMAGES = [
    *contents(
        PHOTO, "", "no image", "<!DOCTYPE html><html></html>", '<svg xmlns="http://www.w3.org/2000/svg"/>', EPS, BOMB
    ),
    Broken("half a PNG", damage(PHOTO, half)),
    Broken("header of a PNG", damage(PHOTO, lambda data: data[:33])),
    Broken("flipped bits", damage(PHOTO, lambda data: data[:100] + bytes(byte ^ 255 for byte in data[100:]))),
    Broken("named pipe", special(PHOTO, os.mkfifo)),
    Broken("dangling link", special(PHOTO, lambda path: path.symlink_to("nowhere.png"))),
    Broken("float TIFF, 0 to 1", photo("L", lambda grey: (grey / 255).astype(np.float32), format="TIFF"), "either"),
    Broken("float TIFF, NaN", photo("L", lambda grey: np.where(grey > 99, np.float32(np.nan), grey), format="TIFF")),
    Broken("integers below 0", photo("L", lambda grey: -grey.astype(np.int32), format="TIFF")),
    *(Broken(name, spoil, "right") for name, spoil in ODD_PHOTOS.items()),
]
SIZE = [64, 80]
ANNOTATIONS = [
    *contents(JSON, "", "{]", "[]", DEEP, b"\xff\xfe\x00", '{"images": [], "annotations": [], "categories": []}'),
    *swaps(JSON, '"id": 1 -> "id": DIGITS\n"images" -> "pictures"\n"annotations": [ -> "annotations": [null,'),
    Broken("half a file", damage(JSON, half)),
    Broken("annotation twice", edit(JSON, lambda coco: coco["annotations"].append(coco["annotations"][0]))),
    *fields(
        *(JSON, lambda coco: coco["images"][0]),
        *({"file_name": "none.png"}, {"file_name": "0\0.png"}, {"width": 30}, {"height": -4}, {"id": 2}),
    ),
    *fields(JSON, lambda coco: coco["categories"][0], {"name": "\ud800"}, {"name": "dog"}, {"id": 2**70}),
    *fields(
        *(JSON, lambda coco: coco["annotations"][0]),
        *({"image_id": 99}, {"category_id": 98}, {"bbox": "box"}, {"bbox": [float("nan"), 1, 9, 9]}, {"iscrowd": 2}),
        *({"bbox": [1, 1, float("inf"), 9]}, {"area": "x"}, {"segmentation": 7}, {"segmentation": [[1, 1, 5, 5]]}),
        *({"segmentation": [[1, 1, 1e12, 5, 5, 9]]}, {"segmentation": {"size": [3, 3], "counts": [9]}}),
        *({"segmentation": {"size": SIZE, "counts": [2**63] * 2}}, {"segmentation": {"size": SIZE, "counts": "ooo"}}),
    ),
]
RUNS = toml(
    "run.toml",
    r"""
steps = 8 -> steps = DIGITS
steps = 8 -> steps = DEEP
steps = 8 -> steps = -8
steps = 8 -> steps = nan
steps = 8 -> steps = 2020-01-01
steps = 8 -> surprise = 1
[optim] -> [optim]\n[optim]
weights = "random" -> weights = "a\u0000b"
init_from = "model" -> init_from = "a\u0000b"
root = "coco" -> root = "a\u0000b"
root = "coco" -> root = "elsewhere"
strides = [8, 16, 32] -> strides = [7, 16, 32]
strides = [8, 16, 32] -> strides = []
learning_rate = 0.01 -> learning_rate = inf
batch_size = 2 -> batch_size = {a = 1}
""",
)
STUDIES = toml(
    "experiments/study.toml",
    r"""
title = "t" -> title = DIGITS
title = "t" -> surprise = 1
set = { objective.box = "none" } -> set = "x"
supervision.source -> supervision
objective.box -> objective
"masks" -> "boxes"
name = "boxes" -> name = "../boxes"
name = "table" -> name = "a table"
rows = ["boxes" -> rows = ["foxes"
few = "few" -> few = "many"
few = "few" -> few = "a\u0000b"
["boxes", "masks"] -> []
steps = 8 -> steps = "many"
""",
)
SPLITS = toml(
    "splits/few.toml",
    r"""
name = "few" -> name = DIGITS
name = "few" -> name = "few"\nname = "few"
"dog" -> "cow"
"dog" -> "cat"
["cat", "dog"] -> []
["cat", "dog"] -> ["cat", "dog", "bird", "fish"]
seen -> unseen = ["cat", "fish"]\nseen
cat = 0.5 -> cat = 1.5
cat = 0.5 -> cat = nan
cat = 0.5 -> cat = DIGITS
seed = 3 -> seed = "x"
""",
)
CHECKPOINTS = [
    Broken("empty", damage(NEWEST, lambda data: b"")),
    Broken("random bytes", damage(NEWEST, lambda data: random.Random(0).randbytes(9999))),
    Broken("half a file", damage(NEWEST, half)),
    Broken("last bytes missing", damage(NEWEST, lambda data: data[:-7])),
    Broken("flipped bit", damage(NEWEST, flip), "either"),
    Broken("zeroed bytes", damage(NEWEST, lambda data: data[:9999] + bytes(999) + data[10998:]), "either"),
    Broken("pickle that runs code", damage(NEWEST, lambda data: pickle.dumps(Intruder()))),
    Broken("is a folder", special(NEWEST, Path.mkdir)),
    tensors("a list", lambda state: [1, 2]),
    tensors("no model", lambda state: {"step": 4}),
    tensors("step below zero", lambda state: {**state, "step": -5}),
    tensors("step beyond the end", lambda state: {**state, "step": 99}),
    tensors("step of text", lambda state: {**state, "step": "many"}),
    tensors(
        "weights that are nan", lambda state: {**state, "model": {k: v * np.nan for k, v in state["model"].items()}}
    ),
    tensors("other shapes", lambda state: {**state, "model": {k: v[None] for k, v in state["model"].items()}}),
]
MODELS = [
    *(removed(WEIGHTS), removed(INFO), weights(float("nan")), weights(float("inf"))),
    *contents(WEIGHTS, b"", pickle.dumps(Intruder())),
    *contents(INFO, "{", "[]", DEEP),
    Broken("half the weights", damage(WEIGHTS, half)),
    Broken("header of 2^60 bytes", damage(WEIGHTS, lambda data: (2**60).to_bytes(8, "little") + data[8:])),
    *fields(
        *(INFO, lambda info: info),
        *({"format": 99}, {"category_ids": [1]}, {"category_ids": [1, 1, 3, 5]}, {"inference": {"short_side": -1}}),
        *({"class_names": ["\ud800", "b", "c", "d"]}, {"class_names": ["cat"], "category_ids": [1]}),
    ),
    *fields(INFO, lambda info: info["model"]["neck"], {"channels": 10**7}, {"channels": 32}, {"kind": "none"}),
    *fields(INFO, lambda info: info["model"]["detector"], {"strides": [0]}, {"neck_channels": 32}),
]
OWN = ("model/net.py", "best/notes.txt", ".model.tmp/notes.txt", "detections.json", "log.jsonl", "model", "checkpoints")
FOLDERS = [
    Broken("the run's folder is a file", put(RUN, "mine")),
    *(Broken(f"the user's own {name}", put(RUN / name, "mine"), "either") for name in OWN),
]
LOGS = ('{"step": "x", "seconds": 1}\n', '{"step": 1, "seconds": "x"}\n', DEEP, f'{{"step": {DIGITS}}}\n', b"\xff\0")
BEGUN = [
    *contents(RUN / "config.json", "", "[]"),
    *contents(RUN / "result.json", "", "[]", '{"metrics": 3, "steps": 8}'),
    removed(f"{RUN}/config.json"),
    Broken("another run", edit(RUN / "config.json", lambda held: held["identity"].update(seed=7))),
    *(Broken(f"log {log[:20]!r}", put(LOG, log), "either") for log in LOGS),
    *(Broken(f"{name} is a file", put(RUN / name, "mine"), "either") for name in ("model", "best")),
]


def record(**values: Any) -> Spoil:
    """The record of results with other values in its first line."""

    def change(data: bytes) -> bytes:
        first, rest = data.split(b"\n", 1)
        line = json.dumps({**json.loads(first), **values}, ensure_ascii=False)
        return line.encode("utf-8", "surrogatepass") + b"\n" + rest

    return damage(RECORD, change)


NO_RESULTS: list[dict[str, Any]] = [
    *(
        {"run_id": [1]},
        {"metrics": 3},
        {"steps": "many"},
        {"row": {"a": 1}},
        {"finished": "yesterday"},
        {"surprise": 1},
    ),
]
RESULTS = [
    *contents(RECORD, "[]\n"),
    *swaps(RECORD, '"seed": 0 -> "seed": DIGITS'),
    *(Broken(f"{values}", record(**values)) for values in NO_RESULTS),
    Broken("deeply nested", put(RECORD, DEEP + "\n"), "either"),
    Broken("half a character", record(row="\ud800"), "either"),
    Broken("last line cut off", damage(RECORD, lambda data: data + b'{"run_id": "x'), "right"),
    Broken("line separators in a text", record(command=["a\u2028b\u2029c\u0085d"]), "right"),
]


# Mutations: good content, changed at random places, and what reads it.


@dataclass(frozen=True)
class Mutation:
    """One kind of mutated file.

    Attributes:
        number: of mutations in a full run.
        mutated: random numbers -> content of the file.
        read: raises UserError on bad content; any other exception is a failure.
    """

    number: int
    file: str
    mutated: Callable[[random.Random], bytes]
    read: Callable[[Path], object]


NASTY: list[Any] = [
    *(None, True, -1, 0, 2, 1e300, float("inf"), float("nan"), -0.0, 1e-320, 2**31, 2**63, -(2**70), 10**400),
    *("", " ", "\0", "\ud800", "\u2028", "../x", "<script>", "x" * 3000, "%s{0}", "1", "nan", "2020-01-01"),
    *([], {}, [[]], [{}], [None], {"": {}}, [1, "a"], [[1, 2]], {"a": {"b": 1}}),
]
NASTY_TOML = [
    *(
        "nan",
        "-inf",
        "1e999",
        "-1",
        "0",
        "true",
        '""',
        '"\\u0000"',
        '"x"',
        "2020-01-01",
        "07:32:00",
        "[]",
        "{}",
        "[[]]",
    ),
    *(
        "[1, 'a']",
        "{ a = 1 }",
        "[{}]",
        "'''a\nb'''",
        DIGITS,
        "0x" + "f" * 400,
        "[" * 3000,
        "'../..'",
        "9" * 400,
        "1e400",
    ),
]


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """One span of bytes flipped, deleted, doubled, replaced or everything after it cut off."""
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((1, 1, 2, 8, 64)))
    span = data[start:end]
    changed = draw.choice((b"", span * 2, draw.randbytes(len(span)), bytes(b ^ 1 << draw.randrange(8) for b in span)))
    return data[:start] + changed + (b"" if draw.random() < 0.1 else data[end:])


def mutate_json(draw: random.Random, value: Any) -> bytes:
    """JSON of `value` with up to three places changed; now and then broken as text, or with an endless number."""
    box = [json.loads(json.dumps(value))]
    for _ in range(draw.randint(1, 3)):
        holder, key = _place(draw, box)
        change = draw.random()
        if change < 0.15 and holder is not box:
            del holder[key]
        elif change < 0.3 and isinstance(holder, list):
            holder.append(holder[key])
        elif change < 0.5 and type(holder[key]) in (int, float) and abs(holder[key]) < 1e15:
            holder[key] = draw.choice((-1, 1, 2, 0.5, 1e3, 1e9)) * holder[key] + draw.choice((0, 0, 1, -1))
        else:
            holder[key] = copy.deepcopy(draw.choice(NASTY))
    text = json.dumps(box[0], ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.01:
        text = text.replace(draw.choice("0123456789"), DIGITS, 1)
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(draw, data) if draw.random() < 0.15 else data


def _place(draw: random.Random, root: list[Any]) -> tuple[Any, Any]:
    """A container at any depth of `root`, which has one element, and one of its keys."""
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    return holder, key


def mutate_toml(draw: random.Random, text: str) -> bytes:
    """TOML with up to three lines changed: another value, another key, doubled, deleted, moved."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 3)):
        place, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        key, sign, _ = lines[place].partition("=")
        change = draw.random()
        if change < 0.5 and sign:
            lines[place] = f"{key}= {draw.choice(NASTY_TOML)}"
        elif change < 0.65:
            lines.insert(other, lines[place])
        elif change < 0.8 and sign:
            lines[place] = f"{lines[other].partition('=')[0]}={lines[place].partition('=')[2]}"
        elif len(lines) > 1:
            del lines[place]
    data = "\n".join(lines).encode()
    return mutate_bytes(draw, data) if draw.random() < 0.2 else data


@functools.cache
def _annotations() -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return make_coco(Path(folder), sizes_hw=((30, 40), (40, 30)), class_names=("cat", "dog")).content


def mutated_segmentation(draw: random.Random) -> bytes:
    """An annotation file with one object, whose segmentation is a mutated outline, list of runs or compressed RLE."""
    height, width = 12, 17
    kind = draw.randrange(3)
    segmentation: Any
    if kind == 0:
        segmentation = [
            [draw.uniform(-5, 25) for _ in range(draw.choice((6, 8, 20, 7)))] for _ in range(draw.randint(1, 3))
        ]
    else:
        runs = [draw.randrange(40) for _ in range(draw.randint(1, 9))]
        runs.append(max(0, height * width - sum(runs)))
        segmentation = {"size": [height, width], "counts": runs}
        if kind == 2:
            from pycocotools import mask

            counts = mask.frPyObjects(segmentation, height, width)["counts"]
            counts = mutate_bytes(draw, counts) if draw.random() < 0.7 else counts
            segmentation["counts"] = counts.decode("latin-1")
    item = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "segmentation": "HERE"}
    image = {"id": 1, "file_name": "1.png", "height": height, "width": width}
    content = {"images": [image], "annotations": [item], "categories": [{"id": 1, "name": "cat"}]}
    changed = mutate_json(draw, segmentation) if draw.random() < 0.7 else json.dumps(segmentation).encode()
    return json.dumps(content).encode().replace(b'"HERE"', changed)


def read_annotations(path: Path) -> None:
    """Reads as `semiseg data check` and as a training do, which must agree; masks that are accepted are decoded."""
    from pycocotools import mask

    from semiseg.data.check import check_annotations
    from semiseg.data.coco import image_records, read_coco
    from semiseg.errors import UserError
    from semiseg.structures.rasterise import outlines_to_rle

    errors = {finding.kind.name for finding in check_annotations(path, None).errors} - {"NO_OBJECTS"}
    try:
        records = list(image_records(read_coco(path)))
    except UserError:
        assert errors, "training refuses what the check accepts"
        raise
    assert not errors, f"training accepts what the check refuses: {errors}"
    for record in records:
        size = [record["height"], record["width"]]
        for item in record["objects"]:
            if item["polygons"]:
                outlines_to_rle([np.array(polygon) for polygon in item["polygons"]], (size[0], size[1]))
            if item["rle_counts"] is not None and size[0] * size[1] < 10**7:
                assert mask.decode({"size": size, "counts": item["rle_counts"]}).shape == tuple(size)


def read_run(path: Path) -> None:
    """Reads a run's TOML as `semiseg train` does."""
    from semiseg.config import load_run_config

    load_run_config(path).identity()


def read_study(path: Path) -> None:
    """Reads a study as `semiseg run` does, up to the configurations of its runs."""
    from semiseg.studies.file import load_study, study_runs

    for run in study_runs(load_study(str(path))):
        run.config.identity()


def read_split(path: Path) -> None:
    """Reads a class split as every command does."""
    from semiseg.splits import load_split

    load_split(str(path), ("cat", "dog", "bird", "fish")).digest()


def read_results(path: Path) -> None:
    """Reads a record of results as `semiseg report` does, up to the choice of a study's own."""
    from semiseg.results import latest, read
    from semiseg.studies.file import load_study
    from semiseg.studies.identity import matching_results

    results = read(path)
    matching_results(load_study("shapes"), latest(results).values())
    json.dumps([result.trained_as for result in results]).encode()


def _mutations() -> dict[str, Mutation]:
    """The kinds of mutated files."""

    def record(draw: random.Random) -> bytes:
        first, second = (ROOT / "reports/shapes/results.jsonl").read_bytes().split(b"\n")[:2]
        return mutate_json(draw, json.loads(first)) + b"\n" + second + b"\n"

    study = (ROOT / "experiments/shapes_short.toml").read_text()
    return {
        "annotations": Mutation(20_000, "a.json", lambda draw: mutate_json(draw, _annotations()), read_annotations),
        "segmentations": Mutation(30_000, "a.json", mutated_segmentation, read_annotations),
        "run": Mutation(20_000, "run.toml", lambda draw: mutate_toml(draw, tomlkit.dumps(TINY)), read_run),
        "study": Mutation(10_000, "study.toml", lambda draw: mutate_toml(draw, study), read_study),
        "split": Mutation(20_000, "split.toml", lambda draw: mutate_toml(draw, SPLIT), read_split),
        "results": Mutation(15_000, "results.jsonl", record, read_results),
    }


MUTATIONS = _mutations()
