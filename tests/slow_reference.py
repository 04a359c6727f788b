"""The losses once more, slow and obvious: plain loops over cells and edges, straight from the definitions.

Scalars are float64 tensors where a gradient is wanted, Python numbers elsewhere. Nothing here is shared with semiseg.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def in_box(box_xyxy: list[float], row: int, column: int, stride: int) -> bool:
    x1, y1, x2, y2 = box_xyxy
    x, y = stride * column + stride // 2, stride * row + stride // 2
    return math.floor(y1) <= y < math.floor(y2 + 1) and math.floor(x1) <= x < math.floor(x2 + 1)


def box_mask(box_xyxy: list[float], grid_hw: tuple[int, int], stride: int) -> Tensor:
    rows, columns = grid_hw
    return torch.tensor([[in_box(box_xyxy, i, j, stride) for j in range(columns)] for i in range(rows)])


def dice(scores: list[Tensor], targets: list[bool]) -> Tensor:
    overlap = torch.stack([m * t for m, t in zip(scores, targets, strict=True)]).sum()
    size = torch.stack([m * m for m in scores]).sum() + sum(targets)
    return 1 - 2 * overlap / (size + 1e-5)


def dice_of_maps(logits: Tensor, mask: Tensor) -> Tensor:
    return dice(list(logits.sigmoid().flatten()), mask.flatten().tolist())


def projection(logits: Tensor, mask: Tensor) -> Tensor:
    m = logits.sigmoid()
    rows, columns = m.shape
    on_rows = dice([max(m[i, j] for j in range(columns)) for i in range(rows)], [any(r) for r in mask.tolist()])
    on_columns = dice([max(m[i, j] for i in range(rows)) for j in range(columns)], [any(c) for c in mask.T.tolist()])
    return on_rows + on_columns


def offsets(size: int, dilation: int) -> list[tuple[int, int]]:
    half = size // 2
    steps = [i * dilation for i in range(-half, half + 1)]
    return [(dy, dx) for dy in steps for dx in steps if dy or dx]


def is_neighbour(row: int, column: int, *, size_hw: tuple[int, int], bottom: int, stride: int) -> bool:
    y, x = stride * row + stride // 2, stride * column + stride // 2
    return row >= 0 and column >= 0 and y < size_hw[0] - bottom and x < size_hw[1]


def lab(rgb: list[int]) -> tuple[float, float, float]:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    matrix = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
    white = (0.95047, 1.0, 1.08883)
    xyz = [sum(m * c for m, c in zip(row, linear, strict=True)) / w for row, w in zip(matrix, white, strict=True)]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def affinity(
    image: Tensor, *, size_hw: tuple[int, int], bottom: int, stride: int, size: int, dilation: int
) -> list[list[list[float | None]]]:
    """[k][row][column] of one padded image (3, H, W): S, or None where there is no neighbour."""
    rows, columns = image.shape[1] // stride, image.shape[2] // stride
    colours = [[(0.0, 0.0, 0.0)] * columns for _ in range(rows)]
    for i in range(rows):
        for j in range(columns):
            block = image[:, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            colours[i][j] = lab([int(channel.double().mean()) for channel in block])
    result: list[list[list[float | None]]] = []
    for dy, dx in offsets(size, dilation):
        plane: list[list[float | None]] = [[None] * columns for _ in range(rows)]
        for i in range(rows):
            for j in range(columns):
                p, q = i + dy, j + dx
                if p < rows and q < columns and is_neighbour(p, q, size_hw=size_hw, bottom=bottom, stride=stride):
                    plane[i][j] = math.exp(-math.dist(colours[i][j], colours[p][q]) / 2)
        result.append(plane)
    return result


def edge(logit: Tensor, other: Tensor, same: bool) -> Tensor:
    m, n = logit.sigmoid(), other.sigmoid()
    agree = m * n + (1 - m) * (1 - n)
    differ = m * (1 - n) + (1 - m) * n
    return -torch.log(agree if same else differ)


def pairwise(logits: Tensor, inside_box: Tensor, edges: Tensor, *, size: int, dilation: int) -> tuple[Tensor, int]:
    """Sum and number over the edges (K, h, w) bool with their centre in the box."""
    total, count = logits.new_zeros(()), 0
    for k, (dy, dx) in enumerate(offsets(size, dilation)):
        for i, j in inside_box.nonzero().tolist():
            if edges[k, i, j]:
                total = total + edge(logits[i, j], logits[i + dy, j + dx], True)
                count += 1
    return total, count


def labelled_pairwise(
    logits: Tensor, inside_box: Tensor, mask: Tensor, inside: Tensor, *, size: int, dilation: int
) -> tuple[Tensor, int]:
    total, count = logits.new_zeros(()), 0
    for k, (dy, dx) in enumerate(offsets(size, dilation)):
        for i, j in inside_box.nonzero().tolist():
            if inside[k, i, j]:
                same = bool(mask[i, j] == mask[i + dy, j + dx])
                total = total + edge(logits[i, j], logits[i + dy, j + dx], same)
                count += 1
    return total, count


def focal(logit: Tensor, positive: bool) -> Tensor:
    p = logit.sigmoid()
    return -0.25 * (1 - p) ** 2 * torch.log(p) if positive else -0.75 * p**2 * torch.log(1 - p)


def generalised_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Of two boxes given by distances (4,) from a point; the point is put at (0, 0)."""

    def area(l: Tensor, t: Tensor, r: Tensor, b: Tensor) -> Tensor:  # noqa: E741
        return (l + r) * (t + b)

    pairs = list(zip(predicted, target, strict=True))
    intersection = area(*(min(p, t) for p, t in pairs))
    union = area(*predicted) + area(*target) - intersection
    around = area(*(max(p, t) for p, t in pairs))
    return (intersection + 1) / (union + 1) - (around - union) / around
