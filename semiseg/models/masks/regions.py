"""Mask R-CNN's mask head: convolutions on features that are taken from each object's own box.

In training the box is the object's, in evaluation the detection's; both a little enlarged. In a region as large as
the box, a mask that fills it would satisfy every loss of a box: the border around it teaches the background.
Source: Mask R-CNN (He et al. 2017), section 3; FPN (Lin et al. 2017), section 4.2, for the levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from semiseg.models.masks.head import MaskHead, conv_layers
from semiseg.models.region_features import region_features
from semiseg.structures.grids import Regions
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs


class RegionMasks(MaskHead):
    """A tower of 3x3 convolutions, a doubling, and a mask for each class or for all.

    Attributes:
        strides: of the levels that features are taken from, finest first.
        size: cells of the features of a region in each direction.
        margin: width and height of the region by those of the box.
        aligned: see `region_features`; without it masks are also pasted as torchvision does, see `Regions`.
    """

    most_per_instance = 1  # all locations of an instance would ask for the mask in its one box

    def __init__(
        self,
        in_channels: int,
        *,
        num_masks: int,
        channels: int,
        convs: int,
        norm: str,
        strides: Sequence[int],
        size: int,
        margin: float,
        aligned: bool,
    ) -> None:
        super().__init__()
        self.strides, self.size, self.margin, self.aligned = tuple(strides), size, margin, aligned
        widths = [in_channels, *[channels] * convs]
        self.tower = conv_layers(widths, norm=norm)
        self.deconv = nn.ConvTranspose2d(widths[-1], channels, kernel_size=2, stride=2)
        self.masks = nn.Conv2d(channels, num_masks, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def freeze(self) -> None:
        self.requires_grad_(False)

    def forward(self, levels: Mapping[int, Tensor], box_towers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The levels that features are taken from."""
        return tuple(levels[stride] for stride in self.strides)

    def grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> Regions:
        """Boxes of at least a pixel, enlarged around their centres."""
        centre = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        half = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=1) * (self.margin / 2)
        boxes = torch.cat([centre - half, centre + half], dim=1)
        return Regions(boxes, (2 * self.size, 2 * self.size), whole_pixels=not self.aligned)

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """As `MaskHead.predict_masks`, of the queries' labels where every class has a mask of its own."""
        regions = self.grid(queries.boxes_xyxy, (0, 0))  # wherever the image ends
        rois = torch.cat([queries.image_index[:, None].to(regions.boxes_xyxy.dtype), regions.boxes_xyxy], dim=1)
        features = region_features(
            outputs.mask_inputs,
            rois,
            strides=self.strides,
            size=self.size,
            aligned=self.aligned,
            margin=self.margin,
        )
        x = self.deconv(self.tower(features)).relu()
        logits = self.masks(x)
        if logits.shape[1] > 1:
            logits = logits[torch.arange(len(logits), device=logits.device), queries.labels]
        else:
            logits = logits[:, 0]
        return MaskLogits(logits, queries.image_index, queries.instance_index, regions)
