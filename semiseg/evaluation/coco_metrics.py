"""The official COCO evaluation of boxes and masks, on all classes and on each of them.

Each IoU type is evaluated once; a group's numbers are the means of its classes', as in an evaluation of its own with
`params.catIds`, because classes never influence each other there. All numbers are in **percent**; None = not measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pydantic import Field, TypeAdapter, ValidationError

from semiseg.config.read import explain
from semiseg.errors import UserError, UserNotice
from semiseg.evaluation.at_score import AtScore, at_score
from semiseg.evaluation.precision import AREA_LIMITS, Backend, coco_precision, names_of_classes
from semiseg.evaluation.voc_metrics import voc_metrics
from semiseg.results import MAX_DETS
from semiseg.structures.objects import Box, Crowds, groupings, mask_box_xyxy, place

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
ALL_CLASSES = "all"
PLACED, UNMASKED = "placed", "unmasked"  # of the content of a ground truth: these of `Metrics`
PLACES = {"mask": "count with the box of their mask", "region": "are ignored"}

Numbers = Mapping[str, float | None]

_AREA_INDEX = {"APs": 1, "APm": 2, "APl": 3}  # of COCOeval's area ranges; 0 = all areas
_THRESHOLD = {"AP50": 0.5, "AP75": 0.75}
_UNMEASURED: Numbers = dict.fromkeys(METRIC_NAMES)


@dataclass(frozen=True)
class TypeMetrics:
    """The numbers of one IoU type (boxes or masks), in percent."""

    # "all" -> metric (`METRIC_NAMES`) -> percent; None without ground truth. Old records have others.
    groups: Mapping[str, Numbers]
    # Class -> the same, or None for a class without ground truth (crowd does not count)
    classes: Mapping[str, Numbers | None]


@dataclass(frozen=True)
class Metrics:
    """The evaluation of one run, in percent."""

    images: int  # number of evaluated images
    instances: Mapping[str, int]  # class -> number of ground-truth instances without crowd
    bbox: TypeMetrics
    segm: TypeMetrics | None  # None if no ground-truth instance has a mask to compare with
    voc: Mapping[str, float] | None = None  # masks by PASCAL VOC's own rules, see `voc_metrics`; None elsewhere
    area_limits: tuple[float, float] = AREA_LIMITS  # of APs, APm and APl, in pixels; others than COCO's are recorded
    # The best so many detections of each image and class were looked at; other than COCO's 100 it is recorded.
    max_dets: Annotated[int, Field(ge=1)] = MAX_DETS
    at_score: AtScore | None = None  # of masks, or boxes where masks are not measured; None unless it was asked for
    # `PLACES` -> number of annotations whose box has no area in the image; None where there is none
    placed: Mapping[str, int] | None = None
    unmasked: int | None = None  # instances without a mask, which the numbers of masks ignore; None where there is none

    def group(self, iou_type: str, classes: Collection[str]) -> Numbers:
        """Means over any classes, e.g. another split's unseen ones; iou_type is "bbox" or "segm"."""
        metrics = self.bbox if iou_type == "bbox" else self.segm
        return dict(_UNMEASURED) if metrics is None else group_means(metrics.classes, classes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `from_dict` restores it exactly."""
        values = {"unit": "percent", **asdict(self)}
        for name in ("voc", "at_score", "placed", "unmasked"):
            if values[name] is None:
                del values[name]
        if self.area_limits == AREA_LIMITS:
            del values["area_limits"]
        if self.max_dets == MAX_DETS:
            del values["max_dets"]
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Metrics:
        """The inverse of `to_dict`; a part that is missing or of another type is a `UserError`."""
        try:
            return _METRICS.validate_python(dict(values))
        except ValidationError as error:
            problem = explain(error.errors()[0])
            raise UserError(f"recorded metrics: {problem}; recorded by another version?") from None


_METRICS = TypeAdapter(Metrics)


def evaluate_detections(
    annotations_file: Path,
    results: Sequence[Mapping[str, Any]],
    *,
    class_names: Sequence[str],
    image_ids: Collection[int],
    backend: Backend = "pycocotools",
    fingerprint: str | None = None,
    area_limits: tuple[float, float] = AREA_LIMITS,
    score: float | None = None,
    max_dets: int = MAX_DETS,
    crowds: Crowds = "ignore",
) -> Metrics:
    """Evaluates detections, boxes and masks, quietly. No detections give 0.

    Args:
        annotations_file: COCO instances json: the ground truth.
        results: COCO results, one dict per detection: image_id, category_id, bbox (x, y, w, h in pixels of the
            original image), score in [0, 1], segmentation (RLE of the original image's size). Left unchanged.
        class_names: names of the labels 0..C-1, that is of the categories in the order of their ids.
        image_ids: the images that were looked at, each once; must be exactly the file's.
        fingerprint: of the file when it was read before (`Table.fingerprint`); None takes it as it is.
        area_limits: areas in pixels up to which an object is small and from which it is large, of APs, APm and APl.
        score: with which detections are counted (`Metrics.at_score`); None = they are not.
        max_dets: of an image and class the best so many are measured (by VOC's rules all); a notice counts the others.
        crowds: what `iscrowd` 1 means.

    Raises:
        UserError: image ids, classes or a detection do not fit the file, the file is not that of `fingerprint`, or the
            backend (`precision.py`) is not installed.
    """
    truth = load_ground_truth(annotations_file, fingerprint=fingerprint, classes=class_names, crowds=crowds)
    if (names := names_of_classes(truth)) != list(class_names):
        raise UserError(
            f"{annotations_file}: its classes ({', '.join(names)}) are not the evaluated "
            f"ones ({', '.join(class_names)})"
        )
    _check_images(truth, image_ids, where=annotations_file)
    check_results(truth, results)
    counts = Counter(a["category_id"] for a in truth.dataset["annotations"] if not a["iscrowd"])
    instances = {name: counts[key] for key, name in zip(sorted(truth.cats), class_names, strict=True)}
    if not truth.dataset["annotations"]:  # a test set; pycocotools would take minutes to find nothing
        nothing = TypeMetrics({ALL_CLASSES: _UNMEASURED}, dict.fromkeys(class_names))
        about = {"area_limits": area_limits, "max_dets": max_dets, "placed": truth.dataset[PLACED]}
        return Metrics(len(truth.imgs), instances, nothing, nothing, **about)
    _say_what_is_cut(results, max_dets)
    precision = partial(coco_precision, truth, results, backend=backend, area_limits=area_limits, max_dets=max_dets)
    bbox = _type_metrics(precision("bbox"), class_names)
    segm = None
    if prepare_masks(truth):
        segm = _type_metrics(precision("segm"), class_names)
    voc = None if segm is None else voc_metrics(truth, results, where=annotations_file)
    judged: Literal["bbox", "segm"] = "bbox" if segm is None else "segm"
    at = None if score is None else at_score(truth, results, judged, score=score, max_dets=max_dets)
    ignored = (truth.dataset[PLACED], truth.dataset.get(UNMASKED))
    return Metrics(len(truth.imgs), instances, bbox, segm, voc, area_limits, max_dets, at, *ignored)


def _say_what_is_cut(results: Sequence[Mapping[str, Any]], max_dets: int) -> None:
    found = Counter((result["image_id"], result["category_id"]) for result in results)
    most, cut = max(found.values(), default=0), sum(max(count - max_dets, 0) for count in found.values())
    if cut:
        warnings.warn(
            f"{cut} of {len(results)} detections are not measured: of an image and class the best {max_dets} are, and "
            f"there are up to {most} (evaluate --max-dets {most} looks at all)",
            UserNotice,
            stacklevel=3,
        )


def group_means(per_class: Mapping[str, Numbers | None], classes: Collection[str]) -> Numbers:
    """Means of `TypeMetrics.classes` over those that have ground truth: what slicing the precision array would give."""
    unknown = sorted(set(classes) - set(per_class))
    if unknown:
        raise UserError(f"class {unknown[0]!r} was not evaluated; evaluated: {', '.join(per_class)}")
    measured = [numbers for name in set(classes) if (numbers := per_class[name]) is not None]
    means: dict[str, float | None] = {}
    for metric in METRIC_NAMES:
        values = [value for numbers in measured if (value := numbers[metric]) is not None]
        means[metric] = round(math.fsum(values) / len(values), 10) if values else None
    return means


def load_ground_truth(
    annotations_file: Path,
    *,
    fingerprint: str | None = None,
    classes: Collection[str] = (),
    crowds: Crowds = "ignore",
) -> COCO:
    """Reads a COCO instances json without pycocotools' prints and makes it safe to evaluate.

    Annotation ids become 1..n in file order: pycocotools takes a match with an annotation of id 0 for none, and
    published files contain id 0 or text. A missing `iscrowd` is 0, a missing `area` the mask's, else the box's. What is
    an object, and where, is decided as in training (`structures/objects.py`): those of which nothing is in the image
    are left out, as are categories that only group others and are none of `classes`.

    A UserError if the file is missing, no COCO instances file, or its digest does not begin with `fingerprint`.
    """
    try:
        text = annotations_file.read_bytes()
        if fingerprint is not None and not hashlib.sha256(text).hexdigest().startswith(fingerprint):
            raise UserError(
                f"{annotations_file}: was changed since this run read it (its digest was {fingerprint}); nothing is "
                "measured on other annotations: put the file back and start the command again"
            )
        content = json.loads(text)
        truth = COCO()
        entries, listed = content.get("annotations", []), content["categories"]
        groups = groupings(listed, {entry.get("category_id") for entry in entries}, classes)
        truth.dataset = {
            "images": content["images"],
            "categories": [entry for number, entry in enumerate(listed) if number not in groups],
        }
        numbered = ({**entry, "id": key} for key, entry in enumerate(entries, start=1))
        truth.dataset |= _placed(list(numbered), {image["id"]: image for image in content["images"]}, crowds)
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
    except FileNotFoundError:
        raise UserError(f"{annotations_file}: no such file") from None
    except OSError as error:
        raise UserError(f"{annotations_file}: cannot be read: {error.strerror}") from None
    except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{annotations_file}: not a COCO instances file: {error}") from None
    for annotation in truth.dataset["annotations"]:
        if "area" not in annotation:
            has_mask, (_, _, width, height) = bool(annotation.get("segmentation")), annotation["bbox"]
            annotation["area"] = float(rle.area(truth.annToRLE(annotation)) if has_mask else width * height)
    return truth


def _placed(
    annotations: list[dict[str, Any]], images: Mapping[Any, Mapping[str, Any]], crowds: Crowds
) -> dict[str, Any]:
    """The annotations, each where `objects.place` has it, and how many of them are not where their box is."""
    kept, counts = [], Counter[str]()
    for annotation in annotations:
        annotation["iscrowd"] = annotation.get("iscrowd", 0) if crowds == "ignore" else 0
        outlines = annotation.get("segmentation")
        if isinstance(outlines, list):  # [[]], an outline without a point, is no mask
            annotation["segmentation"] = [outline for outline in outlines if outline]
        image, box_xywh = images.get(annotation["image_id"]), annotation.get("bbox")
        if image is not None and isinstance(box_xywh, list) and len(box_xywh) == 4:
            size_hw = (image["height"], image["width"])
            has_mask = bool(annotation.get("segmentation"))
            box, origin = place(box_xywh, size_hw, partial(_mask_box, annotation, size_hw) if has_mask else None)
            if origin != "box":
                counts[origin] += 1
                if box is None:
                    continue
                annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                annotation["iscrowd"] = int(annotation["iscrowd"] or origin == "region")
        kept.append(annotation)
    return {"annotations": kept, PLACED: dict(counts) or None}


def _mask_box(annotation: Mapping[str, Any], size_hw: tuple[int, int]) -> Box | None:
    mask = annotation["segmentation"]
    if isinstance(mask, list):
        return mask_box_xyxy(mask, None, size_hw)
    counts = mask["counts"]
    return mask_box_xyxy([], rle.frPyObjects(mask, *size_hw)["counts"] if isinstance(counts, list) else counts, size_hw)


def describe_ignored(metrics: Mapping[str, Any]) -> str:
    """What of the objects the numbers (`Metrics.to_dict`) leave out or take otherwise, in words; empty if nothing."""
    parts = [describe_placed(placed)] if (placed := metrics.get("placed")) else []
    if unmasked := metrics.get("unmasked"):
        parts.append(f"mask AP without {unmasked} of {sum(metrics['instances'].values())} objects, which have no mask")
    return "; ".join(parts)


def describe_placed(placed: Mapping[str, int]) -> str:
    """What became of annotations whose box has no area in the image, in words."""
    total, parts = sum(placed.values()), [f"{placed[key]} {text}" for key, text in PLACES.items() if placed.get(key)]
    have = "annotation has a box" if total == 1 else "annotations have boxes"
    return f"{total} {have} without area in the image: {', '.join(parts)}"


def prepare_masks(truth: COCO) -> bool:
    """Whether any instance has a mask. If so, one without, a crowd or not, becomes the crowd region of its box.

    Where a box is all that is known of an object, a mask in it is neither right nor wrong.
    """
    objects = [bool(a.get("segmentation")) for a in truth.dataset["annotations"] if not a["iscrowd"]]
    if objects and not any(objects):
        return False
    truth.dataset[UNMASKED] = (len(objects) - sum(objects)) or None
    for annotation in truth.dataset["annotations"]:
        if not annotation.get("segmentation"):
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            annotation["iscrowd"] = 1
    return True


def _type_metrics(precision: np.ndarray, class_names: Sequence[str]) -> TypeMetrics:
    of_class = [_read_numbers(precision[:, :, [index]]) for index in range(len(class_names))]
    measured = (None if numbers["AP"] is None else numbers for numbers in of_class)
    return TypeMetrics({ALL_CLASSES: _read_numbers(precision)}, dict(zip(class_names, measured, strict=True)))


def _read_numbers(precision: np.ndarray) -> Numbers:
    """COCOeval.summarize's numbers of a precision array (T, R, C, A, M), in percent."""
    thresholds = np.linspace(0.5, 0.95, 10)
    numbers: dict[str, float | None] = {}
    for metric in METRIC_NAMES:
        values = precision[..., _AREA_INDEX.get(metric, 0), -1]
        if metric in _THRESHOLD:
            values = values[np.isclose(thresholds, _THRESHOLD[metric])]
        values = values[values > -1]
        # Rounding hides the machine epsilon that pycocotools adds to its denominator: perfect is exactly 100.
        numbers[metric] = round(100 * float(np.mean(values)), 10) if values.size else None
    return numbers


def _check_images(truth: COCO, image_ids: Collection[int], *, where: Path) -> None:
    listed, evaluated = set(truth.imgs), Counter(image_ids)
    kinds = {
        "missing": listed - set(evaluated),
        "unknown": set(evaluated) - listed,
        "evaluated more than once": {key for key, count in evaluated.items() if count > 1},
    }
    problems = [
        f"{len(ids)} {kind} (such as {', '.join(sorted(map(str, ids))[:3])})" for kind, ids in kinds.items() if ids
    ]
    if problems:
        raise UserError(f"{where}: the evaluated images are not the file's {len(listed)}: {'; '.join(problems)}")


def check_results(truth: COCO, results: Sequence[Mapping[str, Any]]) -> None:
    """A `UserError` for the first detection that does not fit the ground truth or is no COCO result."""
    for index, result in enumerate(results):
        where = f"detection {index} of {len(results)}"
        missing = [key for key in ("image_id", "category_id", "bbox", "score", "segmentation") if key not in result]
        if missing:
            raise UserError(f"{where}: {missing[0]!r} is missing")
        if result["image_id"] not in truth.imgs:
            raise UserError(f"{where}: image {result['image_id']} is not in the annotation file")
        if result["category_id"] not in truth.cats:
            raise UserError(f"{where}: category {result['category_id']} is not in the annotation file")
        if not math.isfinite(result["score"]):
            raise UserError(f"{where}: score {result['score']} is not a number")
        image, size = truth.imgs[result["image_id"]], list(result["segmentation"]["size"])
        expected = [image["height"], image["width"]]
        if size != expected:  # pycocotools would silently match nothing
            raise UserError(f"{where}: mask size {size} is not that of image {result['image_id']}, {expected}")
