"""Which neighbouring cells of an image look alike: Lab colours, their affinity, and the edges that it leaves.

Letters: B images, K = size^2 - 1 neighbours in row-major order of their offset, the centre left out; (h, w) the mask
grid of the padded batch. Cell (i, j) of stride s stands for the input pixel (s*i + s//2, s*j + s//2).
Source: METHOD section 2; BoxInst (arXiv 2012.02310), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# sRGB to CIE XYZ (IEC 61966-2-1, the digits that scikit-image uses) and its white, D65 seen at 2 degrees.
SRGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE_XYZ = (0.95047, 1.0, 1.08883)


def neighbour_offsets(size: int, dilation: int) -> list[tuple[int, int]]:
    """The K offsets (rows, columns) from a cell to its neighbours; offset k and K-1-k are opposite."""
    reach = range(-(size // 2), size // 2 + 1)
    return [(row * dilation, column * dilation) for row in reach for column in reach if (row, column) != (0, 0)]


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """CIE Lab of sRGB colours: L in 0..100, white point D65 at 2 degrees.

    Args:
        rgb: (B, 3, h, w) uint8.

    Returns:
        (B, 3, h, w) float32.
    """
    # In double up to the result: 500 * (x - y) would lift float32's rounding to 5e-5, beyond what thresholds bear.
    # The power is taken of 256 values only.
    value = torch.arange(256, dtype=torch.float64, device=rgb.device) / 255
    linear = torch.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    red, green, blue = linear.index_select(0, rgb.reshape(-1).int()).view_as(rgb).unbind(1)  # (B, h, w) each
    x, y, z = (
        _lab_curve((m[0] * red + m[1] * green + m[2] * blue) / white)
        for m, white in zip(SRGB_TO_XYZ, WHITE_XYZ, strict=True)
    )
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1).float()


def _lab_curve(value: Tensor) -> Tensor:
    root = value.log().div_(3).exp_()  # a quarter of the time of a power; log 0 = -inf, whose exponential is 0
    return torch.where(value > 0.008856, root, 7.787 * value + 16 / 116)


def downsample_images(images: Tensor, *, stride: int) -> Tensor:
    """Means over stride x stride pixels, truncated: (B, 3, H, W) uint8 -> (B, 3, h, w) uint8, (h, w) rounded up."""
    rows, columns = images.shape[-2:]
    images = F.pad(images, (0, -columns % stride, 0, -rows % stride))  # with raw 0, like all padding
    # Added as integers: a quarter of the time of average pooling in floating point.
    whole = torch.int16 if stride**2 * 255 < 2**15 else torch.int32
    total = _sum_of_every(_sum_of_every(images, stride, 2, whole), stride, 3, whole)
    # Quotients of small integers are exact in float32 (one correctly rounded division), so truncation is, too.
    return total.float().div_(stride**2).to(torch.uint8).contiguous()  # colours as planes, whatever the images were


def _sum_of_every(values: Tensor, number: int, axis: int, dtype: torch.dtype) -> Tensor:
    """Sums of so many neighbouring values along an axis, whose length it divides."""
    first, *others = values.unflatten(axis, (-1, number)).unbind(axis + 1)
    total: Tensor = first.to(dtype, copy=True)
    for other in others:
        total += other
    return total


def neighbour_inside(
    image_sizes_hw: Tensor, bottom_rows: Tensor, *, stride: int, grid_hw: tuple[int, int], size: int, dilation: int
) -> Tensor:
    """Whether each cell has its k-th neighbour: in the grid, in the unpadded image, above the bottom rows.

    A cell is in the image if its pixel (s*i + s//2, s*j + s//2) is; a cell at the right or bottom border whose pixel
    lies in the padding is no neighbour even where it covers a strip of the image. Only neighbours are judged: the
    cell itself may lie anywhere.

    Args:
        image_sizes_hw: (B, 2) unpadded height and width, input pixels.
        bottom_rows: (B,) input pixel rows at the bottom of the unpadded image that are left out, at least 0.
        stride: of the mask grid; grid_hw: its size; size, dilation: of the neighbourhood.

    Returns:
        (B, K, h, w) bool.
    """
    row_in, column_in = rows_and_columns_inside(image_sizes_hw, bottom_rows, stride=stride, grid_hw=grid_hw)
    return inside_of_neighbours(row_in, column_in, size=size, dilation=dilation)


def rows_and_columns_inside(
    image_sizes_hw: Tensor, bottom_rows: Tensor, *, stride: int, grid_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which rows (B, h) and columns (B, w) of the grid are inside, in the sense of `neighbour_inside`."""
    rows, columns = (torch.arange(side, device=image_sizes_hw.device) * stride + stride // 2 for side in grid_hw)
    return rows < (image_sizes_hw[:, 0] - bottom_rows)[:, None], columns < image_sizes_hw[:, 1:]


def inside_of_neighbours(row_in: Tensor, column_in: Tensor, *, size: int, dilation: int) -> Tensor:
    """Whether the k-th neighbour of each cell is in a row (B, h) and a column (B, w) that are inside: (B, K, h, w)."""
    rows_in, columns_in = (_moved(inside, size, dilation) for inside in (row_in, column_in))
    cells = [(row, column) for row in range(size) for column in range(size)]
    del cells[len(cells) // 2]
    return torch.stack([rows_in[:, row, :, None] & columns_in[:, column, None, :] for row, column in cells], dim=1)


def _moved(inside: Tensor, size: int, dilation: int) -> Tensor:
    """(B, n) bool along one axis of the grid -> (B, size, n): of the cell at each step away, False beyond the grid."""
    reach, length = size // 2 * dilation, inside.shape[1]
    padded = F.pad(inside, (reach, reach))
    return torch.stack([padded[:, step * dilation : step * dilation + length] for step in range(size)], dim=1)


@torch.no_grad()
def colour_affinity(
    images: Tensor, image_sizes_hw: Tensor, bottom_rows: Tensor, *, stride: int, size: int, dilation: int
) -> Tensor:
    """S = exp(-|Lab_i - Lab_j| / 2) of every cell i and each of its K neighbours j, 0 where there is none.

    Args:
        images: (B, 3, H, W) uint8 RGB, padded right and bottom with raw 0.
        image_sizes_hw, bottom_rows, stride, size, dilation: see `neighbour_inside`.

    Returns:
        (B, K, h, w) float32 in [0, 1], on the device of the images, without gradient.
    """
    lab = rgb_to_lab(downsample_images(images, stride=stride))
    similar = similarity(lab_distances(lab, size=size, dilation=dilation))
    return from_both_ends(similar, size=size, dilation=dilation) * neighbour_inside(
        image_sizes_hw, bottom_rows, stride=stride, grid_hw=_grid(lab), size=size, dilation=dilation
    )


@torch.no_grad()
def affinity_edges(
    images: Tensor,
    image_sizes_hw: Tensor,
    bottom_rows: Tensor,
    *,
    stride: int,
    size: int,
    dilation: int,
    threshold: float,
) -> Tensor:
    """The edges that count: the neighbour is inside and S >= threshold (so a threshold of 0 keeps all of those).

    Arguments as for `colour_affinity`; threshold in [0, 1]. Returns (B, K, h, w) bool.
    """
    lab = rgb_to_lab(downsample_images(images, stride=stride))
    inside = neighbour_inside(
        image_sizes_hw, bottom_rows, stride=stride, grid_hw=_grid(lab), size=size, dilation=dilation
    )
    return edges_of(lab, inside, size=size, dilation=dilation, threshold=threshold)


def edges_of(lab: Tensor, inside: Tensor, *, size: int, dilation: int, threshold: float) -> Tensor:
    """Those of the edges `inside` (B, K, h, w) bool, changed in place, whose cells' colours (B, 3, h, w) are alike."""
    alike = similarity(lab_distances(lab, size=size, dilation=dilation)) >= threshold
    return inside.logical_and_(from_both_ends(alike, size=size, dilation=dilation))


def lab_distances(lab: Tensor, *, size: int, dilation: int) -> Tensor:
    """|Lab_i - Lab_j| of each cell i and its first K / 2 neighbours j (B, K / 2, h, w), 0 where j is not in the grid.

    The other neighbours' edges are the same ones, seen from their other ends.
    """
    offsets = neighbour_offsets(size, dilation)
    result = lab.new_zeros(len(lab), len(offsets) // 2, *_grid(lab))
    for k, offset in enumerate(offsets[: len(offsets) // 2]):
        here, there = overlap(_grid(lab), offset)
        result[:, k][here] = (lab[:, :, *here[1:]] - lab[:, :, *there[1:]]).square_().sum(1).sqrt_()
    return result


def first_neighbours(cells: Tensor, *, size: int, dilation: int, beyond: int) -> Tensor:
    """Of each cell (B, h, w) its first K / 2 neighbours (B, K / 2, h, w), `beyond` where those are off the grid."""
    reach, (height, width) = size // 2 * dilation, _grid(cells)
    padded = F.pad(cells, (reach, reach, reach, 0), value=beyond)
    offsets = neighbour_offsets(size, dilation)
    return torch.stack(
        [
            padded[:, reach + row : reach + row + height, reach + column : reach + column + width]
            for row, column in offsets[: len(offsets) // 2]
        ],
        dim=1,
    )


def from_both_ends(edges: Tensor, *, size: int, dilation: int) -> Tensor:
    """Values (B, K / 2, h, w) of edges to the first neighbours -> (B, K, h, w) of the edges to all of them."""
    result = edges.new_zeros(len(edges), 2 * edges.shape[1], *_grid(edges))
    for k, offset in enumerate(neighbour_offsets(size, dilation)[: edges.shape[1]]):
        here, there = overlap(_grid(edges), offset)
        result[:, k][here] = edges[:, k][here]
        result[:, -1 - k][there] = edges[:, k][here]
    return result


def similarity(distances: Tensor) -> Tensor:
    """S = exp(-d / 2) of distances d between Lab colours."""
    return distances.mul(-0.5).exp_()


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def overlap(grid_hw: tuple[int, int], offset: tuple[int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Index of the cells (B, h, w) whose neighbour at `offset` is in the grid, and the index of those neighbours."""
    here = [slice(max(0, -step), max(0, length - step)) for length, step in zip(grid_hw, offset, strict=True)]
    there = [slice(max(0, step), max(0, length + step)) for length, step in zip(grid_hw, offset, strict=True)]
    return (slice(None), *here), (slice(None), *there)
