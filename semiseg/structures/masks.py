"""Given masks on their way to a grid, by the places where each changes; made masks at their place in an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlacedMask:
    """One mask of an image, as large as what of it may be inside; the rest of the image is outside."""

    inside: Tensor  # (h, w) bool, of 0 x 0 for a mask without a pixel
    top: int  # row and column of the image where it begins
    left: int

    def write(self, image: Tensor) -> None:
        """Writes it into a mask (H, W) bool of the whole image, which is outside everywhere."""
        height, width = self.inside.shape
        image[self.top : self.top + height, self.left : self.left + width] = self.inside


@dataclass(frozen=True)
class EncodedMasks:
    """M masks, each on a raster of its own that the input was resized (and flipped) from."""

    # (T,) int64, where masks change from outside to inside and back, ascending: mask * 2^40 + the pixel of its raster,
    # counted column by column
    changes: Tensor
    raster_hw: Tensor  # (M, 2) int64, height and width of each raster
    input_hw: Tensor  # (M, 2) int64, of the resized image
    flipped: Tensor  # (M,) bool, whether that was flipped from left to right
    number: Tensor | None = None  # (M,) int64, which of the masks in `changes` each is; None = each its own

    def __len__(self) -> int:
        return len(self.raster_hw)

    def of(self, index: Tensor) -> EncodedMasks:
        """Some of the masks (K,) int64, each as often as it is named."""
        number = index if self.number is None else self.number[index]
        return EncodedMasks(self.changes, self.raster_hw[index], self.input_hw[index], self.flipped[index], number)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether the input pixels that hold the points (rows[m, i], columns[m, j]) are inside mask m.

        A pixel of the input has the value of the raster's pixel that holds its centre; beyond the image it is outside.

        Args:
            rows, columns: (M, h) and (M, w), continuous input pixels.

        Returns:
            (M, h, w) bool.
        """
        row, row_in = _source(rows, self.input_hw[:, :1], self.raster_hw[:, :1], None)
        column, column_in = _source(columns, self.input_hw[:, 1:], self.raster_hw[:, 1:], self.flipped[:, None])
        number = torch.arange(len(self), device=rows.device) if self.number is None else self.number
        mask = number[:, None, None]
        place = (mask << MASK_BITS) + column[:, None, :] * self.raster_hw[:, :1, None] + row[:, :, None]
        before = torch.searchsorted(self.changes, place, right=True)
        first = torch.searchsorted(self.changes, mask << MASK_BITS)
        inside = (before - first) % 2 == 1
        return inside & row_in[:, :, None] & column_in[:, None, :]


MASK_BITS = 40  # a raster has fewer pixels than 2^40, and a batch fewer masks than 2^23


def _source(points: Tensor, size: Tensor, raster: Tensor, flipped: Tensor | None) -> tuple[Tensor, Tensor]:
    """The raster's pixels (M, n) of points along one side, and which of these are in the image."""
    pixel = points.floor()
    inside = (pixel >= 0) & (pixel < size)
    if flipped is not None:
        pixel = torch.where(flipped, size - 1 - pixel, pixel)
    scale = raster.float() / size.float()  # in float32, as `Geometry.source_rows` has it
    source = ((pixel.float() + 0.5) * scale).long()
    return source.clamp_(min=0).minimum(raster - 1), inside
