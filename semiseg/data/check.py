"""Looks at a whole data set before any training and lists everything that is wrong with it at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from semiseg.data.coco import image_records, read_coco
from semiseg.data.image_files import image_problems
from semiseg.data.images import decode_image, unapplied_orientation
from semiseg.data.problems import Kind, Problem, Severity, told_without_mask
from semiseg.errors import UserError

EXAMPLES = 3
MEANING = {
    "error": "must be mended: training refuses the file",
    "dropped": "the annotation is left out of training",
    "clipped": "the box is cut to the image",
    "notice": "training takes it as it is; look whether it is meant",
}


@dataclass(frozen=True)
class Finding:
    """All problems of one kind; `examples` holds the first few in words."""

    kind: Kind
    count: int
    examples: tuple[str, ...]

    @property
    def severity(self) -> Severity:
        return self.kind.severity


@dataclass(frozen=True)
class CheckReport:
    """What a check found; `contents` counts what is there, e.g. {"images": 4}."""

    annotations: Path
    contents: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that training refuses."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def render(self) -> str:
        """The report as text, errors first."""
        lines = [f"{self.annotations}"]
        if self.contents:
            lines.append("  " + ", ".join(f"{count} {name}" for name, count in self.contents.items()))
        for severity, meaning in MEANING.items():
            found = [finding for finding in self.findings if finding.severity == severity]
            if not found:
                continue
            lines.append(f"{severity} ({meaning}):")
            for finding in found:
                lines.append(f"  {finding.count} x {finding.kind.title}")
                lines.extend(f"      {example}" for example in finding.examples)
                if finding.count > len(finding.examples):
                    lines.append(f"      ... and {finding.count - len(finding.examples)} more")
        with_mask, without = self.contents.get("with mask", 0), self.contents.get("box only", 0)
        if without:
            lines.append(f"for validation: {told_without_mask(without, with_mask + without)}")
        total = sum(finding.count for finding in self.errors)
        lines.append(f"{total} errors" if total else "no errors")
        return "\n".join(lines)


@dataclass
class _Collector:
    """A reporter that keeps counts and the first examples."""

    counts: dict[Kind, int] = field(default_factory=dict)
    examples: dict[Kind, list[str]] = field(default_factory=dict)

    def __call__(self, problem: Problem) -> None:
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        examples = self.examples.setdefault(problem.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{problem.place}: {problem.text}")

    def findings(self) -> tuple[Finding, ...]:
        """In the order of `Kind`."""
        return tuple(
            Finding(kind, self.counts[kind], tuple(self.examples[kind])) for kind in Kind if kind in self.counts
        )


def check_annotations(annotations: Path, images: Path | None) -> CheckReport:
    """Checks an instances file and, where their folder is given, decodes every image in full.

    Args:
        annotations: COCO instances json.
        images: folder of the image files, or None to look at the json alone.

    Raises:
        UserError: the file or the image folder does not exist; everything else is a finding.
    """
    if annotations.is_dir():
        raise UserError(f"{annotations}: is a folder, expected a COCO json")
    if not annotations.exists():
        raise UserError(f"{annotations}: no such annotation file")
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such image folder")
    collect = _Collector()
    try:
        coco = read_coco(annotations, report=collect)
    except UserError as error:  # nothing can be read past this
        collect(Problem(Kind.FILE, "file", str(error).removeprefix(f"{annotations}: ")))
        return CheckReport(annotations, {}, collect.findings())
    contents = dict.fromkeys(("images", "classes", "with mask", "box only", "crowd"), 0)
    contents |= {"images": len(coco.images), "classes": len(coco.class_names)}
    for record in image_records(coco, report=collect):
        for item in record["objects"]:
            contents["crowd" if item["is_crowd"] else "with mask" if item["has_mask"] else "box only"] += 1
            if item["has_mask"] and _mask_misses_box(item, (record["height"], record["width"])):
                text = "the mask does not touch the box; is one of them of another object?"
                collect(Problem(Kind.MASK_OUTSIDE_BOX, f"annotation {item['annotation_id']}", text))
    if not contents["with mask"] + contents["box only"]:
        collect(Problem(Kind.NO_OBJECTS, "annotations", "no object is left to learn from; a crowd region is none"))
    if images is not None:
        for problem in image_problems(coco.images, images, _decoded, title="decoding"):
            collect(problem)
    return CheckReport(annotations, contents, collect.findings())


def _mask_misses_box(item: dict[str, Any], size_hw: tuple[int, int]) -> bool:
    """Whether the mask's bounding box and the annotated one have no pixel in common; an empty mask says nothing."""
    if item["rle_counts"] is not None:
        left, top, width, height = coco_mask.toBbox({"size": list(size_hw), "counts": item["rle_counts"]})
        right, bottom = left + width, top + height
        if width == 0:
            return False
    else:
        x = [value for polygon in item["polygons"] for value in polygon[0::2]]
        y = [value for polygon in item["polygons"] for value in polygon[1::2]]
        left, top, right, bottom = min(x), min(y), max(x), max(y)
    x0, y0, x1, y1 = item["box_xyxy"]
    return bool(left >= x1 or right <= x0 or top >= y1 or bottom <= y0)


def _decoded(path: Path, size_hw: tuple[int, int]) -> Problem | None:
    """Decodes an image in full; raises `BadValue`."""
    decode_image(path, size_hw=size_hw)
    orientation = unapplied_orientation(path)
    if orientation == 1:
        return None
    text = f"EXIF orientation {orientation}; training takes the pixels as stored, `predict` turns them upright"
    return Problem(Kind.EXIF, str(path), text)
