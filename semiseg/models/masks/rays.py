"""PolarMask's mask head: a mask is a centre and how far it reaches in evenly spaced directions.

The polygon through the rays' ends is drawn as a map whose logit falls with the distance from the outline, so that every
loss of masks and boxes works on it. Shapes that a centre does not see whole (rings, crescents) are out of reach.
Source: PolarMask (Xie et al. 2020), section 3; the drawing and rays that end in a box are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from semiseg.models.detectors.fcos import HEAD_STD, conv_tower, flatten_levels
from semiseg.models.masks.head import MaskHead, convolve_at
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import grid_size
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs

LARGEST_LOG = 7.0  # of a ray in strides of its level: a thousand, whatever the features
FIRST_SHARE = 0.95  # of the ellipse's radius, with which rays that start from a box begin
SHARES = (0.02, 0.97)  # of a ray's room in the box: what it can begin with
SHORTEST = 0.01  # input pixels: of a ray where it is drawn, and of its room
STEEPEST = 0.02  # cosine between a ray and what stands upright on the outline


class RayMasks(MaskHead):
    """A tower of its own beside the detector's two, and one distance for each direction.

    Attributes:
        start: what a ray is measured by. "stride": that of its level, without end (the original's). "box": its room in
            the query's box, which it never leaves; at first the rays end near the ellipse in the box.
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
        start: Literal["stride", "box"],
        tower_convs: int,
        groups: int,
        strides: Sequence[int],
        stride: int,
        softness: float,
    ) -> None:
        super().__init__()
        self.start, self.strides, self.stride, self.softness = start, tuple(strides), stride, softness
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

    def forward(self, levels: Mapping[int, Tensor], box_towers: Sequence[Tensor]) -> Tensor:
        """As `MaskHead.forward`: (B, R, F') behind the tower, 0 in a training without masks."""
        tower = torch.zeros_like if self.training and not self.learns else self.tower
        return flatten_levels([tower(levels[stride]) for stride in self.strides])

    def grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> WholeMap:
        """The whole padded map at `stride`, whatever the boxes."""
        return WholeMap(self.stride, grid_size(padded_size_hw, self.stride))

    def distances(self, outputs: Outputs, queries: MaskQueries) -> Tensor:
        """(Q, rays) float32, input pixels from the queried locations; see `draw_rays`."""
        locations, padded_hw = outputs.locations, outputs.padded_hw
        assert padded_hw is not None
        x = convolve_at(self.rays, outputs.mask_inputs, outputs, queries, padded_hw).float()
        scaled = self.level_scales[locations.level[queries.location_index]][:, None] * x
        if self.start == "stride":
            return scaled.clamp(max=LARGEST_LOG).exp() * locations.stride[queries.location_index][:, None]
        # The box and half a cell: cells that the box includes are not on the outline of a mask that fills it.
        centres = locations.xy[queries.location_index]
        room, ellipse = rooms(centres, queries.boxes_xyxy, x.shape[1], margin=self.stride / 2)
        first = (FIRST_SHARE * ellipse / room).clamp(*SHARES).logit()
        return room * (scaled + first).sigmoid()

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """As `MaskHead.predict_masks`: the rays of the queried locations, drawn."""
        distances, centres = self.distances(outputs, queries), outputs.locations.xy[queries.location_index]
        assert outputs.padded_hw is not None
        grid = self.grid(queries.boxes_xyxy, outputs.padded_hw)
        logits = draw_rays(distances, centres, grid) / (self.softness * self.stride)
        return MaskLogits(logits, queries.image_index, queries.instance_index, grid, ray_ends(distances, centres))


def directions(count: int, device: torch.device) -> Tensor:
    """(2, count) float32 unit vectors x, y: ray k points to the angle 2 pi k / count, from x towards y."""
    angle = torch.arange(count, device=device) * (2 * math.pi / count)
    return torch.stack([angle.cos(), angle.sin()])


def ray_ends(distances: Tensor, centres_xy: Tensor) -> Tensor:
    """(Q, K, 2) x, y of the ends of rays (Q, K) from points (Q, 2), in their frame."""
    return centres_xy[:, None] + distances[:, :, None] * directions(distances.shape[1], distances.device).T


def rooms(centres_xy: Tensor, boxes_xyxy: Tensor, count: int, *, margin: float) -> tuple[Tensor, Tensor]:
    """How far rays from points reach in a box, and in the ellipse that touches its sides: (Q, count) each, > 0.

    Args:
        centres_xy: (Q, 2); a point outside the box (outside the ellipse) is taken for one at its border.
        boxes_xyxy: (Q, 4) in the same frame.
        margin: what a box is widened by on every side.
    """
    low, high = boxes_xyxy[:, :2] - margin, boxes_xyxy[:, 2:] + margin
    way = directions(count, centres_xy.device)
    before, after = centres_xy - low, high - centres_xy
    side = torch.where(way > 0, after[:, :, None], before[:, :, None]).clamp(min=SHORTEST)  # (Q, xy, count)
    to_box = (side / way.abs().clamp(min=1e-6)).amin(1)
    # In units of the half axes the ellipse is a circle: |point + t way| = 1.
    half = ((high - low) / 2).clamp(min=SHORTEST)
    point = (centres_xy - (low + high) / 2) / half
    point = point * (FIRST_SHARE / point.norm(dim=1, keepdim=True).clamp(min=FIRST_SHARE))
    scaled = way / half[:, :, None]
    square, along = scaled.square().sum(1), (point[:, :, None] * scaled).sum(1)
    inner = 1 - point.square().sum(1, keepdim=True)
    return to_box, ((along.square() + square * inner).sqrt() - along) / square


def draw_rays(distances: Tensor, centres_xy: Tensor, grid: WholeMap) -> Tensor:
    """How far inside the polygon through the rays' ends each cell lies, negative beyond it: (Q, h, w) input pixels.

    Inside it is the distance to the line of the side that the cell looks at, so that the middle of a thin spike is not
    far inside; beyond it is measured along the ray, so that nothing grows from a spike's tip.

    Args:
        distances: (Q, rays) input pixels, see `directions`.
        centres_xy: (Q, 2) input pixels.
    """
    rows, columns = (
        torch.arange(side, device=distances.device) * grid.stride + grid.stride // 2 for side in grid.size_hw
    )
    dx = (columns[None] - centres_xy[:, :1])[:, None, :]  # (Q, 1, w)
    dy = (rows[None] - centres_xy[:, 1:])[:, :, None]  # (Q, h, 1)
    number = distances.shape[1]
    ends = distances.clamp(min=SHORTEST)[:, None] * directions(number, distances.device).to(distances.dtype)
    x, y = ends.unbind(1)
    along_x, along_y = (ends.roll(-1, 2) - ends).unbind(1)  # the sides, from each end to the next
    length = torch.hypot(along_x, along_y)
    upright_x, upright_y = along_y / length, -along_x / length  # outwards
    offset = x * upright_x + y * upright_y  # of the side's line from the centre
    # Which side each cell looks at; the remainder of a tiny negative angle is rounded to `number` itself.
    side = (torch.atan2(dy, dx) * (number / (2 * math.pi)) % number).long() % number  # (Q, h, w)
    flat = side.flatten(1)
    offset, upright_x, upright_y = (each.gather(1, flat).view(side.shape) for each in (offset, upright_x, upright_y))
    outwards = upright_x * dx + upright_y * dy
    inside = offset - outwards
    cosine = outwards / torch.hypot(dx, dy).clamp(min=SHORTEST)
    return torch.where(inside < 0, inside / cosine.clamp(min=STEEPEST), inside)
