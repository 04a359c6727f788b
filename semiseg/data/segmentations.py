"""Reads COCO's `segmentation` in all its forms: polygons, RLE (compressed or not), or nothing."""

from __future__ import annotations

from typing import Any, NoReturn

from pycocotools import mask as coco_mask

from semiseg.data.problems import BadValue, Kind


def read_segmentation(value: Any, *, size_hw: tuple[int, int]) -> tuple[list[list[float]], bytes | None]:
    """(polygons, compressed RLE counts); ([], None) says that the annotation has no mask.

    Args:
        value: None, [], {}, a list of polygons [x0, y0, x1, y1, ...], or {"size": [h, w], "counts": ...}.
        size_hw: of the stored image, which an RLE must have and polygons may not leave by more than its own size.

    Raises:
        BadValue: malformed; the text names the value and what is allowed.
    """
    if value is None or value in ([], {}):
        return [], None
    if isinstance(value, dict):
        return [], _read_rle(value, size_hw)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        _bad(Kind.POLYGON, "'segmentation' is neither a list of polygons (each a list of numbers) nor an RLE object")
    # Some tools write [[]] for "not annotated": an outline without a point says nothing about the mask.
    return [_read_polygon(polygon, index, size_hw) for index, polygon in enumerate(value) if polygon], None


def is_finite(value: float) -> bool:
    """False for NaN, infinities and numbers that no pixel arithmetic survives."""
    return abs(value) < 1e15


def _read_polygon(polygon: list[Any], index: int, size_hw: tuple[int, int]) -> list[float]:
    if any(type(v) not in (int, float) for v in polygon):
        _bad(Kind.POLYGON, f"polygon {index} holds something that is no number")
    if not all(is_finite(v) for v in polygon):
        _bad(Kind.NON_FINITE, f"polygon {index} holds a number that is not finite")
    if len(polygon) < 6 or len(polygon) % 2:
        _bad(Kind.POLYGON, f"polygon {index} has {len(polygon)} numbers, allowed: an even number, at least 6")
    # The rasteriser's work and memory grow with the length of the outline: a point at 1e9 would stop the machine.
    for side, name, values in ((size_hw[1], "x", polygon[0::2]), (size_hw[0], "y", polygon[1::2])):
        if min(values) < -side or max(values) > 2 * side:
            far = max(values, key=lambda v: abs(v - side / 2))
            _bad(Kind.POLYGON, f"polygon {index} has a point at {name} = {far:g}, allowed: {-side} to {2 * side}")
    return [float(v) for v in polygon]


def _read_rle(value: dict[str, Any], size_hw: tuple[int, int]) -> bytes:
    size, counts = value.get("size"), value.get("counts")
    if size != list(size_hw):
        _bad(Kind.RLE, f"RLE has size {size}, allowed: [height, width] of its image, {list(size_hw)}")
    if isinstance(counts, str):
        compressed = counts.encode(errors="replace")
        runs = decompress_runs(compressed)
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        compressed, runs = None, counts
    else:
        _bad(Kind.RLE, "RLE has no 'counts', allowed: a list of integers or a compressed text")
    if min(runs, default=-1) < 0 or sum(runs) != size_hw[0] * size_hw[1]:
        _bad(
            Kind.RLE,
            f"RLE covers {sum(runs)} pixels, allowed: the {size_hw[0] * size_hw[1]} of its image, in runs >= 0",
        )
    if compressed is None:
        compressed = coco_mask.frPyObjects({"size": size, "counts": runs}, *size_hw)["counts"]
    return compressed


def decompress_runs(compressed: bytes) -> list[int]:
    """The run lengths of a compressed RLE: 6-bit characters from '0', five bits of value each, the sixth says
    "more"; from the fourth run on, the difference to the run two before.

    Checked here because the decoder of pycocotools trusts its input.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in compressed:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            _bad(Kind.RLE, "RLE 'counts' is no compressed RLE text")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:  # two's complement: the sign bit of the last five
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        _bad(Kind.RLE, "RLE 'counts' ends in the middle of a number")
    return runs


def _bad(kind: Kind, text: str) -> NoReturn:
    raise BadValue(kind, text)
