"""Pseudo masks for the boxes of a data set: from images and boxes alone, never from a mask.

What is done of a file lies beside it as `NAME.part`, one line per image, so that the same command goes on after an
interruption; at the end the file appears whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pycocotools import mask as rle_codec
from torch import Tensor
from tqdm import tqdm

from semiseg.config.read import digest
from semiseg.config.run import Maker
from semiseg.data.reading import AS_STORED
from semiseg.data.table import Table, sampled_digest
from semiseg.data.transforms import Resize
from semiseg.engine.detection import detector_step, queries_of_boxes
from semiseg.engine.predict import LoadedModel, encode_masks
from semiseg.errors import UserError, differing_names
from semiseg.files import make_once, whole_file, writing_errors
from semiseg.models.detectors.sample import sums_by_image
from semiseg.models.paste import MASK_THRESHOLD, paste_probabilities
from semiseg.models.refine import Refiner, build_refiner, crf, grabcut, grabcut_or_box, opencv, pixel_boxes
from semiseg.structures.inputs import Targets, pad_images

FORMAT_VERSION = 2  # raise it when other masks come out: parts of before are then refused
# Of a box's centre and of its sides to be the object, from which the CRF begins. Chosen among eleven on photographs and
# on Shapes: with 0.5 everywhere nothing leaves the box, with 0.9 everywhere little does.
CENTRE_PROBABILITY, SIDE_PROBABILITY = 0.8, 0.6
_DIGEST = b', "digest": "'  # what stands before that of all that is before it, at a file's end
MOST_POSITIVES = 5  # of an instance, whose masks are averaged


class Made(NamedTuple):
    """The pseudo mask of one object."""

    mask: Tensor  # (H, W) bool, in its box
    weight: float  # in [0, 1]
    source: str


# (image (3, H, W) uint8, boxes_xyxy (N, 4), labels (N,)) -> of each object its mask, None where there is none
MakeMasks = Callable[[Tensor, Tensor, Tensor], list[Made | None]]


def make_pseudo(
    table: Table,
    out: Path,
    *,
    maker: Maker | LoadedModel,
    refine: Maker | None = None,
    agree: bool = False,
    workers: int | None = None,
    shared: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Writes a COCO json with a mask for each object of a table, and says how many came from where.

    Every annotation has the object's `bbox`, its mask as `segmentation` and `area`, `mask_weight` and `mask_source`.
    Crowd regions stay without a mask. Memory does not grow with the number of images.

    Args:
        table: of which images and boxes are looked at.
        out: a file that is not there yet.
        maker: GrabCut or the CRF of a box, or a trained model, whose masks have their mean probability as weight.
        refine: what makes the masks of a model follow the colours, too.
        agree: multiply the weights of a model by the IoU with GrabCut's mask.
        workers: images at a time; None = as many as there are cores.
        shared: other processes may make this very file, which is then taken; else that is a UserError.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; remove it, or name another file")
    if isinstance(maker, LoadedModel):
        _require_classes(maker, table)
        if agree:
            opencv()
        make, name = _of_model(maker, None if refine is None else build_refiner(refine), agree=agree), "model"
    else:
        make, name = _of_boxes(maker), maker
    weights = _weights_digest(maker) if isinstance(maker, LoadedModel) else None
    settings = {"version": FORMAT_VERSION, "annotations": table.fingerprint, "images": sampled_digest(table)}
    header = {**settings, "maker": name, "refine": refine, "agree": agree, "model": weights}
    if table.reading != AS_STORED:
        header["reading"] = asdict(table.reading)
    counts: dict[str, int] = {}
    part = out.with_name(f"{out.name}.part")

    def write() -> None:
        with _Part(part, header) as lines:
            todo = _undone(table, lines.done, make, workers or os.cpu_count() or 1)
            shown = {"desc": f"masks by {name}", "unit": "image", "disable": not progress, "file": sys.stderr}
            with tqdm(total=len(table), initial=lines.done, **shown) as bar:
                for line in todo:
                    lines.add(line)
                    bar.update()
        counts.update(_assemble(table, part, out))
        part.unlink()

    waiting = f"{out.parent}: another process makes pseudo masks there; waiting"
    if not make_once(out, write, ready=out.exists, waiting=waiting) and not shared:
        raise UserError(f"{out}: was made by another process meanwhile; remove it, or name another file")
    return counts


def made_file(table: Table, maker: Maker, *, folder: Path) -> Path:
    """Where the masks of a maker are kept for the boxes and images of a table."""
    reading = [] if table.reading == AS_STORED else [asdict(table.reading)]
    key = digest([FORMAT_VERSION, table.object_fingerprint, sampled_digest(table), *reading])[:16]
    return folder / f"{maker}-{key}.json"


def _require_classes(model: LoadedModel, table: Table) -> None:
    if model.class_names != table.class_names:
        differing = differing_names(model.class_names, table.class_names)
        raise UserError(f"{table.annotations_file}: its classes differ from the model's in {differing}")


def _weights_digest(model: LoadedModel) -> str:
    weights = model.network.state_dict().items()
    return digest([[name, float(value.double().sum()), float(value.double().abs().sum())] for name, value in weights])


class _Part:
    """The lines that are done; a half-written last one is cut off."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path, self._header, self.done = path, header, 0

    def __enter__(self) -> _Part:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        self._file.seek(0)
        first = json.dumps(self._header).encode() + b"\n"
        end = 0
        for number, line in enumerate(self._file):
            # A header that was cut off is the beginning of this one.
            if number == 0 and not first.startswith(line):
                self._file.close()
                raise UserError(
                    f"{self._path}: was begun with other data, another maker or model, or by somebody else; remove it "
                    "first"
                )
            if not line.endswith(b"\n"):
                break
            end, self.done = end + len(line), number
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)
        if end == 0:
            self.add(self._header)
        return self

    def __exit__(self, *_: object) -> None:
        with writing_errors(self._path):  # what a full disk did not take is tried again
            self._file.close()

    def add(self, line: Any) -> None:
        with writing_errors(self._path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()


def _undone(table: Table, done: int, make: MakeMasks, workers: int) -> Iterator[list[list[Any]]]:
    """What is made of each image from row `done` on, in their order, a few images at a time."""
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[list[list[Any]]]] = deque()
        try:
            for index in range(done, len(table)):
                ahead.append(pool.submit(_of_row, table, index, make))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _of_row(table: Table, index: int, make: MakeMasks) -> list[list[Any]]:
    """[annotation id, RLE counts, weight, source] of each object that has a mask now."""
    row = table.rows[index]
    objects = [item for item in row["objects"] if not item["is_crowd"]]
    if not objects:
        return []
    image = table.image(row)
    boxes = torch.tensor([item["box_xyxy"] for item in objects])
    found = make(image, boxes, torch.tensor([item["label"] for item in objects]))
    return [
        [item["annotation_id"], encode_masks(made.mask[None])[0]["counts"], round(made.weight, 4), made.source]
        for item, made in zip(objects, found, strict=True)
        if made is not None and made.mask.any()
    ]


def _assemble(table: Table, part: Path, out: Path) -> dict[str, int]:
    """The whole json, written image after image."""
    counts: dict[str, int] = {}
    columns = (table.rows.data.column(name).to_pylist() for name in ("image_id", "file_name", "height", "width"))
    names = ("id", "file_name", "height", "width")
    images = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    classes = zip(table.category_ids, table.class_names, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in classes]
    content = hashlib.sha256()
    with whole_file(out) as file, part.open("rb") as lines:

        def write(text: bytes) -> None:
            content.update(text)
            file.write(text)

        header = json.loads(next(lines))
        about = {"description": "pseudo masks", "maker": {key: header[key] for key in ("maker", "refine", "agree")}}
        head = json.dumps({"info": about, "images": images, "categories": categories}, ensure_ascii=False)
        write(head[:-1].encode() + b', "annotations": [')
        separator = b"\n"
        for row, line in zip(table.rows, lines, strict=True):
            made = {each[0]: each[1:] for each in json.loads(line)}
            for item in row["objects"]:
                entry = _annotation(row, item, made.get(item["annotation_id"]), table.category_ids)
                source = entry.get("mask_source", "crowd region" if item["is_crowd"] else "without a mask")
                counts[source] = counts.get(source, 0) + 1
                write(separator + json.dumps(entry).encode())
                separator = b",\n"
        write(b"\n]")
        file.write(_DIGEST + content.hexdigest().encode() + b'"}\n')
    return counts


def require_as_made(path: Path) -> None:
    """A UserError if a file of masks is not what `make_pseudo` wrote: a run's identity knows its maker alone."""
    content, _, end = path.read_bytes().rpartition(_DIGEST)
    if not end.startswith(hashlib.sha256(content).hexdigest().encode()):
        raise UserError(
            f"{path}: was changed since it was made; remove it, and it is made again, or name a copy of it as "
            "supervision.pseudo"
        )


def _annotation(
    row: dict[str, Any], item: dict[str, Any], made: list[Any] | None, category_ids: tuple[int, ...]
) -> dict[str, Any]:
    x0, y0, x1, y1 = item["box_xyxy"]
    entry = {
        "id": item["annotation_id"],
        "image_id": row["image_id"],
        "category_id": category_ids[item["label"]],
        "bbox": [round(value, 4) for value in (x0, y0, x1 - x0, y1 - y0)],
        "iscrowd": int(item["is_crowd"]),
        "area": round((x1 - x0) * (y1 - y0), 4),
    }
    if made is not None:
        counts, weight, source = made
        rle = {"size": [row["height"], row["width"]], "counts": counts}
        area = int(rle_codec.area({**rle, "counts": counts.encode()}))
        entry |= {"area": area, "segmentation": rle, "mask_weight": weight, "mask_source": source}
    return entry


# makers ---------------------------------------------------------------------------------------------------------------


def _of_boxes(maker: Maker) -> MakeMasks:
    if maker == "grabcut":
        opencv()

    def make(image: Tensor, boxes_xyxy: Tensor, labels: Tensor) -> list[Made | None]:
        if maker == "grabcut":
            masks, from_box = grabcut_or_box(image, boxes_xyxy)
            sources = ["box" if each else "grabcut" for each in from_box]
            return [Made(torch.from_numpy(mask), 1.0, source) for mask, source in zip(masks, sources, strict=True)]
        found: list[Made | None] = []
        for box in boxes_xyxy.split(1):
            inside = filled(box, image)
            mask = crf(image, box, _box_probabilities(box, image))[0] & inside[0]
            found.append(Made(mask, 1.0, "crf") if mask.any() else Made(inside[0], 1.0, "box"))
        return found

    return make


def filled(boxes_xyxy: Tensor, image: Tensor) -> Tensor:
    """(N, H, W) bool: the pixels of each box."""
    maps = torch.zeros(len(boxes_xyxy), *image.shape[1:], dtype=torch.bool)
    for inside, (x0, y0, x1, y1) in zip(maps, pixel_boxes(boxes_xyxy, (image.shape[1], image.shape[2])), strict=True):
        inside[y0:y1, x0:x1] = True
    return maps


def _box_probabilities(box_xyxy: Tensor, image: Tensor) -> Tensor:
    """(1, H, W): falling from the centre of a box (1, 4) to its sides, 0 outside."""
    centre, half = (box_xyxy[0, :2] + box_xyxy[0, 2:]) / 2, (box_xyxy[0, 2:] - box_xyxy[0, :2]) / 2
    x, y = ((torch.arange(image.shape[2 - axis]) + 0.5 - centre[axis]).abs() / half[axis] for axis in (0, 1))
    reach = torch.maximum(y[:, None], x[None, :]).clamp(max=1)
    return (CENTRE_PROBABILITY - (CENTRE_PROBABILITY - SIDE_PROBABILITY) * reach) * filled(box_xyxy, image)


def _of_model(model: LoadedModel, refiner: Refiner | None, *, agree: bool) -> MakeMasks:
    inference = model.info.inference
    geometry = Resize([inference.short_side], inference.long_side, stretch=inference.stretch)

    def make(image: Tensor, boxes_xyxy: Tensor, labels: Tensor) -> list[Made | None]:
        size_hw = (image.shape[1], image.shape[2])
        chosen = geometry(size_hw, 0)
        inputs = chosen.image(image), chosen.boxes(boxes_xyxy.numpy()), labels
        found = masks_at_boxes(model, *inputs, size_hw)
        made: list[Made | None] = []
        for box, probability in zip(boxes_xyxy.split(1), found, strict=True):
            if probability is None:
                made.append(None)
                continue
            inside = filled(box, image)[0]
            mask = (probability > MASK_THRESHOLD) & inside
            weight = float(probability[mask].mean()) if mask.any() else 0.0
            if refiner is not None:
                mask = refiner(image, box, probability[None])[0] & inside
            if agree:
                other = grabcut(image, box)[0]
                weight *= float((mask & other).sum() / (mask | other).sum().clamp(min=1))
            made.append(Made(mask, weight, "model"))
        return made

    return make


@torch.inference_mode()
def masks_at_boxes(
    model: LoadedModel, image: Tensor, boxes_xyxy: Tensor, labels: Tensor, output_hw: tuple[int, int]
) -> list[Tensor | None]:
    """A trained model's masks for given boxes: at the places that it would learn them at.

    Of each box (N, 4), in pixels of the input (3, H, W), the mean probabilities (height, width) of its masks; None
    where the detector has no place for a box, as for one of less than a cell.
    """
    network, device = model.network, model.device
    images, sizes_hw = pad_images([image.to(device)], network.size_divisor)
    outputs = network(images, sizes_hw.to(device))
    targets, step = _boxes_alone(boxes_xyxy, labels), detector_step(model.info.config, network)
    padded_hw = (images.shape[2], images.shape[3])
    assignment = step.assignment(
        targets, sizes_hw=network.level_sizes(padded_hw), num_images=1, seeds=(0,), padded_hw=padded_hw
    )
    most = min(MOST_POSITIVES, network.mask_head.most_per_instance)
    quotas = torch.bincount(assignment.instance_index, minlength=len(labels)).clamp(max=most)
    sample = queries_of_boxes if step.own_regions else step.sample
    counts = tuple(sums_by_image(targets.image_index, quotas, 1))
    queries = sample(outputs, assignment, targets.to(device), quotas.to(device), counts=counts)
    predicted = network.predict_masks(outputs, queries)
    of, input_hw = predicted.instance_index.cpu(), (image.shape[1], image.shape[2])
    found: list[Tensor | None] = []
    for number in range(len(labels)):
        own = (of == number).nonzero()[:, 0].to(device)
        pasted = None
        if len(own):
            pasted = paste_probabilities(predicted.logits[own], predicted.grid.of(own), input_hw, output_hw)
        found.append(None if pasted is None else pasted.mean(0).cpu())
    return found


def _boxes_alone(boxes_xyxy: Tensor, labels: Tensor) -> Targets:
    """One image's boxes as targets that have no mask."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Targets(
        boxes_xyxy=boxes_xyxy.float(),
        labels=labels,
        image_index=torch.zeros_like(labels),
        supervision=torch.zeros_like(labels),
        masks=torch.zeros(0, 1, 1, dtype=torch.bool),
        mask_instance=nothing,
        mask_weight=torch.zeros(0),
        crowd_boxes_xyxy=torch.zeros(0, 4),
        crowd_image_index=nothing,
        mask_stride=1,
    )
