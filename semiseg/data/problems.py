"""What can be wrong with a data set: the kinds of problems, and who gets them.

The readers in `coco.py` and `images.py` state each problem once. Training stops at the first error
(`stop_at_errors`); `semiseg data check` collects them all (`check.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from semiseg.errors import UserError
from semiseg.structures.objects import MANY_CROWDS

Severity = Literal["error", "ignored", "mended", "clipped", "notice"]


class Kind(Enum):
    """(severity, title). Errors stop a training, a notice changes nothing, all others change the annotation."""

    FILE = ("error", "file is not COCO instances json")
    CATEGORY = ("error", "category entry is malformed")
    CATEGORY_ID_TWICE = ("error", "category id is used twice")
    CATEGORY_NAME_TWICE = ("error", "category name is used twice")
    IMAGE = ("error", "image entry is malformed")
    IMAGE_ID_TWICE = ("error", "image id is used twice")
    ANNOTATION = ("error", "annotation is malformed")
    ANNOTATION_ID_TWICE = ("error", "annotation id is used twice")
    UNKNOWN_IMAGE = ("error", "image id is unknown")
    UNKNOWN_CATEGORY = ("error", "category id is unknown")
    NON_FINITE = ("error", "number is not finite")
    POLYGON = ("error", "polygon is malformed")
    RLE = ("error", "RLE does not fit its image")
    NO_OBJECTS = ("error", "file has no objects to learn from")
    IMAGE_MISSING = ("error", "image file is missing")
    IMAGE_UNREADABLE = ("error", "image file cannot be decoded")
    IMAGE_SIZE = ("error", "image size differs from the json")
    BOX_OUTSIDE = ("ignored", "box lies outside the image")
    BOX_NO_AREA = ("ignored", "box has no area")
    BOX_OF_MASK = ("mended", "box has no area in the image, the mask's is taken")
    BOX_CLIPPED = ("clipped", "box reaches over the edge of the image")
    GROUPING = ("notice", "category only groups others")
    CLASS_EMPTY = ("notice", "class has no object")
    CROWDS = ("notice", "many annotations are crowd regions")
    MEASURES = ("notice", "box, mask and area do not measure one thing")
    MASK_OUTSIDE_BOX = ("notice", "mask lies outside its box")
    EXIF = ("notice", "image has an EXIF orientation that is not applied")
    FEW_GREYS = ("notice", "image keeps almost none of its grey values in 8 bits")

    def __init__(self, severity: Severity, title: str) -> None:
        self.severity = severity
        self.title = title


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where` is e.g. 'annotation 17'; `text` states the value and what is allowed."""

    kind: Kind
    where: str
    text: str


class BadValue(Exception):
    """Raised by the small readers; the caller knows the place and makes it a `Problem`."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text

    def at(self, where: str) -> Problem:
        return Problem(self.kind, where, self.text)


Reporter = Callable[[Problem], None]


@dataclass(frozen=True)
class CrowdCounts:
    """How much of a file's annotations is crowd regions, which are legal and yet may be meant as objects."""

    annotations: int = 0
    crowd: int = 0
    crowd_encoded: int = 0  # of these, with an RLE
    others_outlined: int = 0  # of the others, with outlines

    def in_words(self) -> str | None:
        """What is to be said where they are many (`MANY_CROWDS`), with the likely cause and the remedy."""
        if self.crowd <= max(MANY_CROWDS * self.annotations, 1):  # one in a small file is nothing to wonder at
            return None
        cause = ""
        if 2 * self.crowd_encoded > self.crowd and 2 * self.others_outlined >= self.annotations - self.crowd:
            cause = "; they have RLE masks: labelling tools export so what was drawn by brush or by a model"
        return (
            f"{self.crowd} of {self.annotations} annotations ({self.crowd / self.annotations:.0%}) are crowd regions "
            f"(iscrowd 1), in which nothing is learnt or measured{cause}. Where they are single objects set "
            "data.crowds = 'objects' ('evaluate' and 'pseudo': --crowds objects)"
        )


def describe_missing_masks(without: int, objects: int) -> str:
    """What objects without a mask do to an evaluation. Crowds are no objects here: they may lack a mask."""
    if without == objects:
        return "no object has a mask, so mask AP is not measured"
    have, regions = ("has", "its box is a region") if without == 1 else ("have", "their boxes are regions")
    return (
        f"{without} of {objects} objects {have} no mask: mask AP is measured on the others, and {regions} in which "
        "masks count for nobody"
    )


def describe_empty_classes(names: Sequence[str], classes: int) -> str:
    """Which classes nothing is learnt of."""
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"no object of {len(names)} of the {classes} classes to learn from: {some}"


def describe_problems(counts: Mapping[str, int]) -> str:
    """Counts by the names of `Kind` in words, such as "ignored: 2 x box has no area"."""
    kinds = [Kind[name] for name in counts]
    by_severity = {kind.severity: [each for each in kinds if each.severity == kind.severity] for kind in kinds}
    return "; ".join(
        f"{severity}: {', '.join(f'{counts[kind.name]} x {kind.title}' for kind in alike)}"
        for severity, alike in by_severity.items()
    )


def stop_at_errors(source: Path | str) -> Reporter:
    """A reporter that raises `UserError` naming source, place, value and allowed values; ignores what is no error."""

    def report(problem: Problem) -> None:
        if problem.kind.severity == "error":
            raise UserError(f"{source}: {problem.where}: {problem.text}")

    return report
