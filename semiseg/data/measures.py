"""Whether box, mask and area of the annotations measure one thing, and which other convention would fit if not.

Where there are masks they decide; boxes alone are judged by the bounds of their images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from semiseg.structures.objects import Box, mask_box_xyxy
from semiseg.structures.rasterise import signed_area

SHARE = 0.05  # of the annotations that may disagree before it is said; and of a side or an area that is no disagreement
PIXELS = 2.0  # by which sides may always differ: outlines and boxes are rounded
ALMOST_ALL = 0.99  # of the boxes alone must lie in their images for a convention to fit
FEWEST = 3  # boxes alone that are judged by their bounds

_Corners = Callable[[float, float, float, float], Box]
READINGS: dict[str, _Corners] = {
    "[x, y, width, height]": lambda a, b, c, d: (a, b, a + c, b + d),
    "[x0, y0, x1, y1]": lambda a, b, c, d: (a, b, c, d),
    "[centre x, centre y, width, height]": lambda a, b, c, d: (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    "[y, x, height, width]": lambda a, b, c, d: (b, a, b + d, a + c),
    "[y0, x0, y1, x1]": lambda a, b, c, d: (b, a, d, c),
}
COCO, CORNERS, CENTRES, *_ = READINGS
UNITS = {"pixels": None, "shares of the image (0..1)": 1, "per cent (0..100)": 100, "per mille (0..1000)": 1000}
PER_ONE = "shares of the image (0..1)"


class Measures:
    """Counts over a file; `add` every annotation that is no crowd, then read the `remarks`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._fits: Counter[str] = Counter()  # of boxes that are not their masks', by the convention that would do
        self._largest = {"boxes": 0.0, "outlines": 0.0}
        self._smallest_side = float("inf")

    def add(self, entry: dict[str, Any], outlines: list[list[float]], counts: bytes | None, size_hw: Any) -> None:
        """An annotation with four finite numbers as `bbox`, its mask as of `read_segmentation`."""
        self._smallest_side = min(self._smallest_side, *size_hw)
        self._largest["boxes"] = max(self._largest["boxes"], *entry["bbox"])
        mask_box = mask_box_xyxy(outlines, counts, size_hw)
        if outlines:
            self._largest["outlines"] = max(self._largest["outlines"], *(max(outline) for outline in outlines))
        if mask_box is not None:
            self._box_of_mask(entry["bbox"], mask_box, size_hw)
        elif not outlines and counts is None:
            self._box_alone(entry["bbox"], size_hw)
        if "area" in entry:
            area = None if mask_box is None else _area(outlines, counts, size_hw)
            self._area(entry["area"], entry["bbox"], area, size_hw)

    def remarks(self) -> dict[str, str]:
        """What disagrees ("boxes", "areas") -> a sentence with counts and the convention that would fit."""
        found = {"boxes": "; ".join(self._remarks_on_boxes()), "areas": self._remark_on_areas()}
        if self._shares():  # everything else follows from that
            found["areas"] = ""
        return {what: text for what, text in found.items() if text}

    def _shares(self) -> list[str]:
        """Of boxes and outlines those that look like shares of their image: no number is above 1."""
        large = self._smallest_side > 2 * PIXELS
        found = [name for name, largest in self._largest.items() if large and 0 < largest <= 1]
        # Masks in pixels tell more of boxes below 1 than their bounds do.
        return [] if found == ["boxes"] and self._counts["masked"] else found

    def _box_of_mask(self, box: Sequence[float], mask_box: Box, size_hw: tuple[int, int]) -> None:
        if min(box[2:]) <= 0:  # no box: said elsewhere
            return
        self._counts["masked"] += 1
        if _alike(READINGS[COCO](*box), mask_box, size_hw):
            return
        self._counts["differ"] += 1
        for unit, whole in UNITS.items():
            if whole is not None and max(box) > whole * (1 + SHARE):
                continue
            width, height = (1.0, 1.0) if whole is None else (size_hw[1] / whole, size_hw[0] / whole)
            for name, corners in READINGS.items():
                x, y = (height, width) if name.startswith("[y") else (width, height)
                scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
                self._fits[f"{name} in {unit}"] += _alike(corners(*scaled), mask_box, size_hw)

    def _box_alone(self, box: Sequence[float], size_hw: tuple[int, int]) -> None:
        self._counts["alone"] += 1
        for name in (COCO, CORNERS, CENTRES):
            self._counts[name] += _within(READINGS[name](*box), size_hw)

    def _area(self, area: float, box: Sequence[float], of_mask: float | None, size_hw: tuple[int, int]) -> None:
        of_box = box[2] * box[3]
        self._counts["areas"] += 1
        if of_mask is None:  # of an object whose mask is not given: at most its box
            wrong = area == 0 or area > (1 + SHARE) * of_box + PIXELS
        else:
            wrong = abs(area - of_mask) > SHARE * of_mask + PIXELS * of_mask**0.5
        if not wrong:
            return
        self._counts["other areas"] += 1
        pixels = size_hw[0] * size_hw[1]
        expected = of_box if of_mask is None else of_mask
        self._counts["area 0"] += area == 0
        self._counts["area of box"] += area > 0 and abs(area - of_box) <= 0.01 * of_box
        self._counts["area of 1"] += 0 < area <= 1 and abs(area * pixels - expected) <= 0.1 * expected + PIXELS

    def _remarks_on_boxes(self) -> Iterator[str]:
        count, meant = self._counts, f"COCO's are {COCO} in pixels"
        if shares := self._shares():
            yield f"no number of the {' and '.join(shares)} is above 1: they look like {PER_ONE}; {meant}"
            return
        if count["differ"] > SHARE * count["masked"]:
            text = f"{count['differ']} of {count['masked']} boxes are not those of their masks"
            name, fitting = self._fits.most_common(1)[0]
            fits = (
                f"as {name} {fitting} of them would be" if 2 * fitting > count["differ"] else "no convention fits them"
            )
            yield f"{text}: {fits}; {meant}"
        alone = count["alone"]
        if alone >= FEWEST and alone - count[COCO] > SHARE * alone:
            fits = next((name for name in (CORNERS, CENTRES) if count[name] >= ALMOST_ALL * alone), "")
            if fits:
                yield (
                    f"{alone - count[COCO]} of {alone} boxes without a mask reach over their images, and as {fits} "
                    f"{alone - count[fits] or 'none'} would; {meant}"
                )

    def _remark_on_areas(self) -> str:
        count = self._counts
        if count["other areas"] <= SHARE * count["areas"]:
            return ""
        causes = {"area 0": "they are 0", "area of box": "they are their boxes'", "area of 1": f"they are {PER_ONE}"}
        cause = next((words for key, words in causes.items() if 2 * count[key] > count["other areas"]), "")
        return (
            f"{count['other areas']} of {count['areas']} 'area' are not those of the masks or boxes"
            f"{cause and ': '}{cause}; small, medium and large objects (APs, APm, APl) are told apart by it: leave "
            "'area' out, and the mask's counts, else the box's"
        )


def _alike(box: Box, other: Box, size_hw: tuple[int, int]) -> bool:
    """Whether the sides of a box, cut to its image, are another's."""
    limits = (size_hw[1], size_hw[0], size_hw[1], size_hw[0])
    tolerance = max(PIXELS, SHARE * max(other[2] - other[0], other[3] - other[1]))
    tolerance = min(tolerance, 0.5 * max(other[2] - other[0], other[3] - other[1]))
    pairs = zip(box, other, limits, strict=True)
    return all(abs(min(max(own, 0), limit) - side) <= tolerance for own, side, limit in pairs)


def _within(box: Box, size_hw: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = box
    rooms = (PIXELS + 0.01 * size_hw[1], PIXELS + 0.01 * size_hw[0])
    inside = x0 >= -rooms[0] and y0 >= -rooms[1] and x1 <= size_hw[1] + rooms[0] and y1 <= size_hw[0] + rooms[1]
    return inside and x1 > x0 and y1 > y0


def _area(outlines: list[list[float]], counts: bytes | None, size_hw: tuple[int, int]) -> float:
    """Of a mask, in pixels; outlines by their corners, as if they did not overlap."""
    if counts is not None:
        return float(coco_mask.area({"size": list(size_hw), "counts": counts}))
    total = 0.0
    for outline in outlines:
        total += abs(signed_area(np.asarray(outline[0::2]), np.asarray(outline[1::2])))
    return total
