"""COCO json -> an Arrow table on disk, once; later memory-mapped and shared by workers and ranks.

The table is faithful to the annotations: it still holds every mask. What a training may see is decided in `dataset.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter
from pyarrow import compute
from tqdm import tqdm

from semiseg.config.read import digest, file_digest, read_json
from semiseg.data.coco import NO_ANNOTATIONS, crowd_counts, image_records, read_coco
from semiseg.data.images import Header, check_header, read_image, require_sizes
from semiseg.data.measures import Measures
from semiseg.data.missing import require_images
from semiseg.data.problems import BadValue, CrowdCounts, Kind, Problem, describe_problems, stop_at_errors
from semiseg.data.reading import AS_STORED, Greys, Reading, describe_few_greys
from semiseg.errors import UserError
from semiseg.files import make_once, whole_folder, write_text
from semiseg.structures.objects import Crowds

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 2  # raise it when records change: older tables are then left alone and made anew
ROWS_PER_WRITE = 256
HEADERS_NAME = "headers.json"  # beside the rows: what the headers of the images say
LOOKED_AT = 64  # images of more than 8 bits that are decoded before a start

OBJECT = {
    "annotation_id": Value("int64"),
    "label": Value("int64"),
    "box_xyxy": List(Value("float64"), length=4),  # original pixels, clipped to the image
    "is_crowd": Value("bool"),
    "has_mask": Value("bool"),  # false: never annotated, which is not an empty mask
    "polygons": List(List(Value("float64"))),
    "rle_counts": Value("binary"),  # compressed; null unless the mask is an RLE
}
FEATURES = Features(
    {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "height": Value("int32"),
        "width": Value("int32"),
        "objects": List(OBJECT),
    }
)


@dataclass(frozen=True)
class Table:
    """One row per image, memory-mapped: copies in other processes share the pages and pickle as a path."""

    rows: datasets.Dataset  # of the form `FEATURES`
    class_names: tuple[str, ...]  # of each label 0..C-1
    category_ids: tuple[int, ...]  # COCO's, of each label
    images_folder: Path  # `file_name` is relative to it
    annotations_file: Path
    fingerprint: str  # of the json's content; the images' content is not part of it
    annotated: bool = True  # false for a file that only lists images, such as COCO's test sets
    # Name of a `Kind` -> how many annotations were not taken as they are, or are worth a look
    problems: Mapping[str, int] = field(default_factory=dict)
    groupings: tuple[str, ...] = ()  # names of the file's categories that are no classes
    crowds: Crowds = "ignore"  # what the file's `iscrowd` 1 means here
    # "boxes" or "areas" that are not those of the masks -> a sentence
    remarks: Mapping[str, str] = field(default_factory=dict)
    crowd_counts: CrowdCounts = field(default_factory=CrowdCounts)
    reading: Reading = AS_STORED  # how the images' pixels are meant
    # What of `Header` is true of any image -> how many, and the names of some of them
    headers: Mapping[str, tuple[int, Sequence[str]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def count_objects(self, labels: Sequence[int] | None = None) -> tuple[int, int]:
        """(objects, those of them without a mask), of some or of all labels, crowd regions left out."""
        objects = compute.list_flatten(self.rows.data.column("objects"))
        instances = compute.invert(compute.struct_field(objects, "is_crowd"))
        if labels is not None:
            label = compute.struct_field(objects, "label")
            instances = compute.and_(instances, compute.is_in(label, pyarrow.array(labels, pyarrow.int64())))
        without = compute.and_(instances, compute.invert(compute.struct_field(objects, "has_mask")))
        return compute.sum(instances).as_py() or 0, compute.sum(without).as_py() or 0

    def notices(self, *, crowds_meant: bool = False) -> list[str]:
        """What is to be said of the annotations before they are used, with counts; `crowds_meant`: not of crowds."""
        said = []
        if self.groupings:
            said.append(f"no classes, only supercategories of others: {', '.join(self.groupings)}")
        if self.problems:
            said.append(f"{describe_problems(self.problems)}; `semiseg data check` lists them")
        crowds = None if crowds_meant or self.crowds == "objects" else self.crowd_counts.in_words()
        if crowds is not None:
            said.append(crowds)
        return [f"{self.annotations_file}: {text}" for text in said]

    @property
    def object_fingerprint(self) -> str:
        """Of what the objects are: `fingerprint`, and how the file is read where that is not as usual."""
        return self.fingerprint + ("" if self.crowds == "ignore" else f"-{self.crowds}")

    def classes_without_objects(self) -> list[str]:
        """Names of the classes of which there is nothing but crowd regions, if that."""
        objects = compute.list_flatten(self.rows.data.column("objects"))
        instances = objects.filter(compute.invert(compute.struct_field(objects, "is_crowd")))
        present = set(compute.unique(compute.struct_field(instances, "label")).to_pylist())
        return [name for label, name in enumerate(self.class_names) if label not in present]

    def image(self, row: Mapping[str, Any], seen: Callable[[Greys], object] | None = None) -> Tensor:
        """The pixels of a row's image, (3, H, W) uint8 RGB, as `read_image` gives them."""
        size_hw = (row["height"], row["width"])
        return read_image(self.images_folder / row["file_name"], size_hw=size_hw, reading=self.reading, seen=seen)

    def image_notices(self, *, setting: str, upright: str) -> Iterator[str]:
        """What is to be said of the images before they are used: orientations left out, grey values lost, with counts.

        Of the images with more than 8 bits a channel some are decoded, at most `LOOKED_AT`.

        Args:
            setting: how a range of values is given, with {low} and {high}.
            upright: how orientations are applied.
        """
        if "turned" in self.headers and not self.reading.upright:
            number, names = self.headers["turned"]
            yield (
                f"{self.annotations_file}: {number} of {len(self)} images, such as {names[0]}, have an EXIF "
                "orientation that is not applied: right for annotations of the pixels as stored; for those of upright "
                f"images set {upright}"
            )
        found: dict[str, Greys] = {}
        deep, names = self.headers.get("deep", (0, ()))
        for name in names:
            read_image(self.images_folder / name, reading=self.reading, seen=partial(found.__setitem__, name))
        if (lost := describe_few_greys(found, setting=setting, among=deep)) is not None:
            yield f"{self.annotations_file}: {lost}"

    def original_sizes_hw(self) -> dict[int, tuple[int, int]]:
        """Image id -> (height, width) of the stored image."""
        columns = (self.rows.data.column(name).to_pylist() for name in ("image_id", "height", "width"))
        return {image_id: (height, width) for image_id, height, width in zip(*columns, strict=True)}


def load_table(
    annotations: Path,
    images: Path,
    *,
    cache: Path,
    annotations_required: bool = True,
    reading: Reading = AS_STORED,
    classes: Collection[str] = (),
    crowds: Crowds = "ignore",
) -> Table:
    """The table of a COCO instances json; converted on first use, with a progress bar.

    Of processes that ask at once one converts, and the others wait for it. The name in the cache comes from the json's
    content, the converter's version and how it is read. The first error of the annotations is a UserError, as are
    missing images and, at the conversion, images of another size; for `annotations_required` and `classes`, which may
    be others than the file's, see `read_coco`.
    """
    named: dict[str, Any] = {
        "cache": cache,
        "annotations_required": annotations_required,
        "reading": reading,
        "crowds": crowds,
    }
    open_table = partial(_load, annotations, images, **named)
    table = open_table(classes=())
    kept = sorted({*table.groupings} & {*classes} - {*table.class_names})
    return open_table(classes=kept) if kept else table


def _load(
    annotations: Path,
    images: Path,
    *,
    cache: Path,
    annotations_required: bool,
    reading: Reading,
    crowds: Crowds,
    classes: Sequence[str],
) -> Table:
    if not images.is_dir():
        raise UserError(f"{images}: no such image folder")
    if not annotations.exists():
        raise UserError(f"{annotations}: no such annotation file")
    fingerprint = file_digest(annotations, 64)[:16]
    suffix = (f"-{digest(classes, 8)}" if classes else "") + "-crowds" * (crowds == "objects")
    folder = cache / f"{annotations.stem}-{fingerprint}-v{CONVERTER_VERSION}{suffix}{'-upright' * reading.upright}"
    named: dict[str, Any] = {
        "annotations_required": annotations_required,
        "reading": reading,
        "crowds": crowds,
        "classes": classes,
    }
    rows, about = open_rows(folder, partial(_convert, annotations, images, **named))
    table = Table(
        rows=rows,
        class_names=tuple(about["class_names"]),
        category_ids=tuple(about["category_ids"]),
        images_folder=images,
        annotations_file=annotations,
        fingerprint=fingerprint,
        annotated=about.get("annotated", True),
        problems=about.get("problems", {}),
        groupings=tuple(about.get("groupings", ())),
        crowds=crowds,
        remarks=about.get("remarks", {}),
        crowd_counts=CrowdCounts(*about.get("crowds", ())),
        reading=reading,
    )
    if annotations_required and not table.annotated:
        raise UserError(f"{annotations}: {NO_ANNOTATIONS}")
    require_images(images, table.rows.data.column("file_name").to_pylist(), annotations)
    return replace(table, headers=_known_headers(table, folder / HEADERS_NAME))


def _known_headers(table: Table, path: Path) -> dict[str, tuple[int, list[str]]]:
    """What the images' headers say, from the file beside the table, or looked at once more where it is missing or old.

    Old is what its examples no longer show: orientations are often mended after they have been named.
    """
    with suppress(OSError, ValueError, TypeError, KeyError, UserError, BadValue):
        known = {what: (int(count), list(names)) for what, (count, names) in read_json(path).items()}
        _, turned = known.get("turned", (0, []))
        if not turned or any(check_header(table.images_folder / name, None, table.reading).turned for name in turned):
            return known
    columns = (table.rows.data.column(name).to_pylist() for name in ("file_name", "height", "width"))
    entries = [
        dict(zip(("file_name", "height", "width"), values, strict=True)) for values in zip(*columns, strict=True)
    ]
    known = _summary(require_sizes(entries, table.images_folder, table.reading))
    with suppress(OSError):  # a cache may be somebody else's
        write_text(path, json.dumps(known))
    return known


def _summary(headers: Mapping[str, Header]) -> dict[str, tuple[int, list[str]]]:
    """What is true of any image -> of how many, and some of them, spread over all."""
    known = {}
    for what in Header._fields:
        names = [name for name, header in headers.items() if getattr(header, what)]
        if names:
            known[what] = len(names), names[:: -(-len(names) // LOOKED_AT)]
    return known


def open_rows(folder: Path, convert: Callable[[Path], None]) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The rows and what stands beside them, converted first if they are not there: by one process, it needs gigabytes.

    A damaged table is made anew beside itself and stays: what cannot be opened here, say for a stale handle of a
    network file system, may be mapped into the memory of other jobs. A UserError where it cannot be written.
    """
    try:
        return _open_rows(folder, convert)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: the Arrow table cannot be written: {error.strerror or error}; the environment variable "
            "SEMISEG_CACHE names another place"
        ) from None


def _open_rows(folder: Path, convert: Callable[[Path], None]) -> tuple[datasets.Dataset, dict[str, Any]]:
    name, waiting = folder.name, f"{folder.parent}: another process converts annotations; waiting"
    for number in count(2):
        new = make_once(folder, partial(convert, folder), ready=folder.is_dir, waiting=waiting)
        try:
            return _read(folder)
        except (pyarrow.ArrowException, OSError, ValueError, RecursionError, UserError) as error:
            if new:
                raise
            logger.warning("%s: cannot be used (%s); remove it when no job reads it", folder, error)
        folder = folder.with_name(f"{name}.{number}")
    raise AssertionError


def _read(folder: Path) -> tuple[datasets.Dataset, dict[str, Any]]:
    """The rows and what `classes.json` says of them; a ValueError if the files are not those that were written.

    The digest is looked at before the rows are mapped, about 0.1 s per 100 MB; tables from before there was one have
    none.
    """
    rows, classes = folder / "rows.arrow", json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    if not isinstance(classes, dict) or not ({"class_names", "category_ids"} <= set(classes) or "summary" in classes):
        raise ValueError("damaged")
    written = classes.pop("digest", None)
    if written is not None and written != digest([file_digest(rows), classes]):
        raise ValueError("damaged")
    return datasets.Dataset.from_file(str(rows)), classes


def sampled_digest(table: Table, *, count: int = 256) -> str:
    """Digest of the content of `count` of the image files, or of all if there are no more, drawn by their names.

    It finds data sets whose images were replaced, not a single file among many, and is cheap: dates say nothing of a
    data set that was copied, and looking at the size of every file of COCO takes minutes on some file systems.
    """
    names = table.rows.data.column("file_name").to_pylist()
    drawn = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]
    return digest([file_digest(table.images_folder / name) for name in drawn])


def _convert(
    annotations: Path,
    images: Path,
    folder: Path,
    *,
    annotations_required: bool,
    reading: Reading,
    crowds: Crowds,
    classes: Sequence[str],
) -> None:
    """Writes the table to a temporary folder beside `folder`, whose name holds the digest, and renames it.

    Only here the images' headers are read, so that a wrong size stops a training before its first step.
    """
    problems: Counter[str] = Counter()
    stop = stop_at_errors(annotations)

    def report(problem: Problem) -> None:
        stop(problem)
        if problem.kind is not Kind.GROUPING:  # named by itself
            problems[problem.kind.name] += 1

    coco = read_coco(annotations, report=report, annotations_required=annotations_required, classes=classes)
    if coco.digest[:16] not in folder.name:
        raise UserError(f"{annotations}: was changed while it was read; start again when it is whole")
    require_images(images, [image["file_name"] for image in coco.images], annotations)
    with whole_folder(folder) as temporary:
        path = temporary / "rows.arrow"
        with ArrowWriter(features=FEATURES, path=str(path), writer_batch_size=ROWS_PER_WRITE) as writer:
            measures = Measures()
            records = image_records(coco, report=report, crowds=crowds, measures=measures)
            total = len(coco.images)
            for record in tqdm(records, total=total, desc=annotations.name, unit=" images", delay=1, disable=None):
                writer.write(record)
            writer.finalize()
        headers = _summary(require_sizes(coco.images, images, reading))
        (temporary / HEADERS_NAME).write_text(json.dumps(headers), encoding="utf-8")
        problems_found = {kind.name: problems[kind.name] for kind in Kind if kind.name in problems}
        crowds_found = astuple(found) if (found := crowd_counts(coco)).in_words() else ()
        what = {"crowds": crowds_found, "groupings": coco.groupings, "problems": problems_found}
        about = {"class_names": coco.class_names, "category_ids": coco.category_ids, "annotated": coco.annotated}
        about |= {name: value for name, value in (what | {"remarks": measures.remarks()}).items() if value}
        about["digest"] = digest([file_digest(path), about])
        (temporary / "classes.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
