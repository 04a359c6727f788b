"""PolarMask's mask head: a mask is a centre and how far it reaches in evenly spaced directions.

The rays are drawn as a map whose logit falls with the distance from the outline, so that every loss of masks and boxes
works on them. Shapes that a centre does not see whole (rings, crescents) are out of reach.
Source: PolarMask (Xie et al. 2020), section 3; the drawing is this project's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semiseg.models.detectors.fcos import HEAD_STD, conv_tower, flatten_levels
from semiseg.models.masks.head import MaskHead, convolve_at
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import grid_size
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs

LARGEST_LOG = 7.0  # of a ray in strides of its level: a thousand, whatever the features


@dataclass(frozen=True)
class RayInputs:
    """What masks are made from, of a batch; see `Outputs.mask_inputs`."""

    features: Tensor  # (B, R, F') behind the tower, from which the rays are computed where a mask is wanted
    padded_hw: tuple[int, int]  # height and width of the padded images


class RayMasks(MaskHead):
    """A tower of its own beside the detector's two, and one distance for each direction.

    Attributes:
        strides: of the levels at which the detector predicts, finest first.
        stride: input pixels per cell of the drawn masks.
        softness: cells over which a logit falls by 1.
        learns: False in a training that has no mask loss.
    """

    def __init__(
        self,
        channels: int,
        *,
        rays: int,
        tower_convs: int,
        groups: int,
        strides: Sequence[int],
        stride: int,
        softness: float,
    ) -> None:
        super().__init__()
        self.strides, self.stride, self.softness = tuple(strides), stride, softness
        self.tower = conv_tower(channels, tower_convs, groups)
        self.rays = nn.Conv2d(channels, rays, kernel_size=3, padding=1)
        self.learns = True
        self.level_scales = nn.Parameter(torch.ones(len(self.strides)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=HEAD_STD)
                nn.init.zeros_(module.bias)

    def freeze(self) -> None:
        """The tower is not computed in such a training."""
        self.learns = False
        self.requires_grad_(False)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The tower."""
        return (self.tower,)

    def forward(self, levels: Mapping[int, Tensor], box_towers: Sequence[Tensor]) -> RayInputs:
        """As `MaskHead.forward`; the features are 0 in a training without masks."""
        height, width = levels[self.strides[0]].shape[-2:]
        tower = torch.zeros_like if self.training and not self.learns else self.tower
        features = flatten_levels([tower(levels[stride]) for stride in self.strides])
        return RayInputs(features, (height * self.strides[0], width * self.strides[0]))

    def grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> WholeMap:
        """The whole padded map at `stride`, whatever the boxes."""
        return WholeMap(self.stride, grid_size(padded_size_hw, self.stride))

    def distances(self, outputs: Outputs, queries: MaskQueries) -> Tensor:
        """(Q, rays) float32, input pixels from the queried locations; see `draw_rays`."""
        inputs, locations = outputs.mask_inputs, outputs.locations
        x = convolve_at(self.rays, inputs.features, outputs, queries, inputs.padded_hw).float()
        scaled = self.level_scales[locations.level[queries.location_index]][:, None] * x
        return scaled.clamp(max=LARGEST_LOG).exp() * locations.stride[queries.location_index][:, None]

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """As `MaskHead.predict_masks`: the rays of the queried locations, drawn."""
        grid = self.grid(queries.boxes_xyxy, outputs.mask_inputs.padded_hw)
        centres = outputs.locations.xy[queries.location_index]
        logits = draw_rays(self.distances(outputs, queries), centres, grid) / (self.softness * self.stride)
        return MaskLogits(logits, queries.image_index, queries.instance_index, grid)


def draw_rays(distances: Tensor, centres_xy: Tensor, grid: WholeMap) -> Tensor:
    """By how many input pixels the outline lies beyond each cell, as seen from the centre: (Q, h, w).

    The outline between two rays is linear in the angle.

    Args:
        distances: (Q, rays) input pixels; ray k points to the angle 2 pi k / rays, from x towards y.
        centres_xy: (Q, 2) input pixels.
    """
    rows, columns = (
        torch.arange(side, device=distances.device) * grid.stride + grid.stride // 2 for side in grid.size_hw
    )
    dx = (columns[None] - centres_xy[:, :1])[:, None, :]  # (Q, 1, w)
    dy = (rows[None] - centres_xy[:, 1:])[:, :, None]  # (Q, h, 1)
    number = distances.shape[1]
    turn = torch.atan2(dy, dx) * (number / (2 * math.pi)) % number  # (Q, h, w), in rays
    before = turn.floor()
    share = turn - before
    before = before.long() % number  # the remainder of a tiny negative angle is rounded to `number` itself
    size = before.shape
    here, there = (distances.gather(1, index.flatten(1)).view(size) for index in (before, (before + 1) % number))
    return torch.lerp(here, there, share) - torch.hypot(dx, dy)
