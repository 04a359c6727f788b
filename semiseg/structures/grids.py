"""Where the cells of masks stand: on one map over the whole padded input, or in a region of its own for each mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeMap:
    """One grid for all masks of a batch: cell (i, j) stands for input pixel (s*i + s//2, s*j + s//2), s its stride."""

    stride: int  # input pixels per cell in x and y
    size_hw: tuple[int, int]  # cells in y and x

    def __post_init__(self) -> None:
        if type(self.stride) is not int or self.stride <= 0:
            raise ValueError("stride must be a positive int")

    def of(self, index: Tensor | slice) -> WholeMap:
        """The grid of some of the masks."""
        return self


@dataclass(frozen=True)
class Regions:
    """A grid for each of N masks: its h x w cells are the equal parts of a box, and each stands for its centre."""

    boxes_xyxy: Tensor  # (N, 4) float32, input pixels, each of some width and height; they may reach beyond the image
    size_hw: tuple[int, int]  # cells in y and x, the same for all
    # Pasted as torchvision does: with a cell around it, a region begins and ends at whole pixels of the output
    whole_pixels: bool = False
    # Each is the whole image: beyond the centres of its outer cells a mask goes on as it is there
    whole_image: bool = False

    def __post_init__(self) -> None:
        if self.boxes_xyxy.ndim != 2 or self.boxes_xyxy.shape[1] != 4:
            raise ValueError("boxes_xyxy must be (N, 4)")

    def of(self, index: Tensor | slice) -> Regions:
        """The grids of some of the masks."""
        return Regions(self.boxes_xyxy[index], self.size_hw, self.whole_pixels, self.whole_image)

    def centres(self) -> tuple[Tensor, Tensor]:
        """y of every row (N, h) and x of every column (N, w), in input pixels: pixel p reaches from p to p + 1."""
        x0, y0, x1, y1 = self.boxes_xyxy[:, :, None].unbind(1)  # (N, 1) each
        rows, columns = (
            (torch.arange(count, device=x0.device, dtype=x0.dtype) + 0.5) / count for count in self.size_hw
        )
        return y0 + (y1 - y0) * rows, x0 + (x1 - x0) * columns


MaskGrid = WholeMap | Regions
