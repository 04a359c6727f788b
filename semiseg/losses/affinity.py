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
    total = _sum_of_every(_sum_of_every(images.to(whole), stride, 2), stride, 3)
    # Quotients of small integers are exact in float32 (one correctly rounded division), so truncation is, too.
    return total.float().div_(stride**2).to(torch.uint8)


def _sum_of_every(values: Tensor, number: int, axis: int) -> Tensor:
    """Sums of so many neighbouring values along an axis, whose length it divides."""
    parts = values.unflatten(axis, (-1, number)).unbind(axis + 1)
    return sum(parts[1:], start=parts[0].clone())


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
    height, width = grid_hw
    device = image_sizes_hw.device
    rows = torch.arange(height, device=device) * stride + stride // 2
    columns = torch.arange(width, device=device) * stride + stride // 2
    row_in = rows < (image_sizes_hw[:, 0] - bottom_rows)[:, None]  # (B, h)
    column_in = columns < image_sizes_hw[:, 1:]  # (B, w)
    inside = row_in[:, :, None] & column_in[:, None, :]
    offsets = neighbour_offsets(size, dilation)
    result = inside.new_zeros(inside.shape[0], len(offsets), height, width)
    for k, offset in enumerate(offsets):
        here, there = _overlap(grid_hw, offset)
        result[:, k][here] = inside[there]
    return result


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
    similar = _similarity(images, stride=stride, size=size, dilation=dilation)
    inside = neighbour_inside(
        image_sizes_hw, bottom_rows, stride=stride, grid_hw=_grid(similar), size=size, dilation=dilation
    )
    return similar * inside


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
    similar = _similarity(images, stride=stride, size=size, dilation=dilation)
    inside = neighbour_inside(
        image_sizes_hw, bottom_rows, stride=stride, grid_hw=_grid(similar), size=size, dilation=dilation
    )
    return inside & (similar >= threshold)


@torch.no_grad()
def _similarity(images: Tensor, *, stride: int, size: int, dilation: int) -> Tensor:
    lab = rgb_to_lab(downsample_images(images, stride=stride))
    grid_hw = _grid(lab)
    offsets = neighbour_offsets(size, dilation)
    result = lab.new_zeros(lab.shape[0], len(offsets), *grid_hw)
    for k, offset in enumerate(offsets[: len(offsets) // 2]):
        here, there = _overlap(grid_hw, offset)
        distance = (lab[:, :, *here[1:]] - lab[:, :, *there[1:]]).square_().sum(1).sqrt_()
        result[:, k][here] = distance.mul_(-0.5).exp_()
        result[:, -1 - k][there] = result[:, k][here]  # the same edge seen from its other end
    return result


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def _overlap(grid_hw: tuple[int, int], offset: tuple[int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Index of the cells (B, h, w) whose neighbour at `offset` is in the grid, and the index of those neighbours."""
    here = [slice(max(0, -step), max(0, length - step)) for length, step in zip(grid_hw, offset, strict=True)]
    there = [slice(max(0, step), max(0, length + step)) for length, step in zip(grid_hw, offset, strict=True)]
    return (slice(None), *here), (slice(None), *there)
