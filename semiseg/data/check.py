"""Looks at a whole data set before any training and lists everything that is wrong with it at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from semiseg.data.coco import crowd_counts, image_records, read_coco
from semiseg.data.images import decoding_problems, image_problems
from semiseg.data.measures import Measures
from semiseg.data.missing import missing_images, where_instead
from semiseg.data.problems import Kind, Problem, describe_missing_masks
from semiseg.data.reading import AS_STORED, Reading
from semiseg.errors import UserError
from semiseg.structures.objects import mask_box_xyxy

EXAMPLES = 3
MEANING = {
    "error": "must be mended: training refuses the file",
    "ignored": "neither an object nor background, in training and evaluation",
    "mended": "so in training and evaluation",
    "clipped": "the box is cut to the image",
    "notice": "training takes it as it is; look whether it is meant",
}


@dataclass(frozen=True)
class Finding:
    """All problems of one kind; `examples` holds the first few in words."""

    kind: Kind
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """What a check found; `contents` counts what is there, e.g. {"images": 4}."""

    annotations: Path
    contents: dict[str, int]
    findings: tuple[Finding, ...]
    remedy: str | None = None  # where images that are missing lie

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that training refuses."""
        return tuple(finding for finding in self.findings if finding.kind.severity == "error")

    def render(self) -> str:
        """The report as text, errors first."""
        lines = [str(self.annotations)]
        if self.contents:
            lines.append("  " + ", ".join(f"{count} {name}" for name, count in self.contents.items()))
        for severity, meaning in MEANING.items():
            findings = [finding for finding in self.findings if finding.kind.severity == severity]
            if findings:
                lines.append(f"{severity} ({meaning}):")
            for finding in findings:
                lines.append(f"  {finding.count} x {finding.kind.title}")
                lines.extend(f"      {example}" for example in finding.examples)
                if finding.count > len(finding.examples):
                    lines.append(f"      ... and {finding.count - len(finding.examples)} more")
        if self.remedy is not None:
            lines.append(self.remedy)
        with_mask, without = self.contents.get("with mask", 0), self.contents.get("box only", 0)
        if without:
            lines.append(f"for validation: {describe_missing_masks(without, with_mask + without)}")
        total = sum(finding.count for finding in self.errors)
        lines.append(f"{total} errors" if total else "no errors")
        return "\n".join(lines)


def check_annotations(annotations: Path, images: Path | None, reading: Reading = AS_STORED) -> CheckReport:
    """Checks a COCO instances file and, where their folder is given, decodes every image in full, by the reading.

    A file or an image folder that does not exist is a `UserError`; everything else is a finding.
    """
    if annotations.is_dir():
        raise UserError(f"{annotations}: is a folder, expected a COCO json")
    if not annotations.exists():
        raise UserError(f"{annotations}: no such annotation file")
    if images is not None and not images.is_dir():
        raise UserError(f"{images}: no such image folder")
    problems: list[Problem] = []
    remedy: str | None = None
    contents: dict[str, int] = {}
    try:
        coco = read_coco(annotations, report=problems.append)
    except UserError as error:  # nothing can be read past this
        problems.append(Problem(Kind.FILE, "file", str(error).removeprefix(f"{annotations}: ")))
    else:
        contents = {"images": len(coco.images), "classes": len(coco.class_names)}
        contents |= dict.fromkeys(("with mask", "box only", "crowd"), 0)
        measures = Measures()
        lacking = dict.fromkeys(coco.class_names)
        for record in image_records(coco, report=problems.append, measures=measures):
            for item in record["objects"]:
                if not item["is_crowd"]:
                    lacking.pop(coco.class_names[item["label"]], None)
                contents["crowd" if item["is_crowd"] else "with mask" if item["has_mask"] else "box only"] += 1
                if item["has_mask"] and _mask_misses_box(item, (record["height"], record["width"])):
                    text = "the mask does not touch the box; is one of them of another object?"
                    problems.append(Problem(Kind.MASK_OUTSIDE_BOX, f"annotation {item['annotation_id']}", text))
        problems += [Problem(Kind.MEASURES, "annotations", remark) for remark in measures.remarks().values()]
        many = crowd_counts(coco).in_words()
        if many is not None:
            problems.append(Problem(Kind.CROWDS, "annotations", many))
        if any(problem.kind.severity == "error" for problem in problems):
            pass  # what is missing then may be what was refused
        elif not contents["with mask"] + contents["box only"]:
            problems.append(
                Problem(Kind.NO_OBJECTS, "annotations", "no object is left to learn from; a crowd region is none")
            )
        else:
            problems += [Problem(Kind.CLASS_EMPTY, "categories", repr(name)) for name in lacking]
        if images is not None:
            problems += image_problems(
                coco.images, images, partial(decoding_problems, reading=reading), title="decoding"
            )
            missing = missing_images(images, [image["file_name"] for image in coco.images])
            if missing and (found := where_instead(images, missing)):
                remedy = f"of {len(missing)} missing images {found}"
    findings = []
    for kind in Kind:
        alike = [f"{problem.where}: {problem.text}" for problem in problems if problem.kind is kind]
        if alike:
            findings.append(Finding(kind, len(alike), tuple(alike[:EXAMPLES])))
    return CheckReport(annotations, contents, tuple(findings), remedy)


def _mask_misses_box(item: dict[str, Any], size_hw: tuple[int, int]) -> bool:
    """Whether the mask's bounding box and the annotated one have no pixel in common; never, if the mask is empty."""
    box = mask_box_xyxy(item["polygons"], item["rle_counts"], size_hw)
    if box is None:
        return False
    left, top, right, bottom = box
    x0, y0, x1, y1 = item["box_xyxy"]
    return bool(left >= x1 or right <= x0 or top >= y1 or bottom <= y0)
