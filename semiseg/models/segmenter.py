"""The network: backbone, neck, detector and mask head, and the masks of chosen instances from its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from semiseg.models.bifpn import BiFPN
from semiseg.models.detectors.detector import Detector
from semiseg.models.detectors.fcos import make_locations
from semiseg.models.fpn import FeaturePyramid
from semiseg.models.masks.head import MaskHead
from semiseg.models.resnet import BACKBONE_STRIDES, ResNetFeatures, SmallResNet
from semiseg.models.timm_features import TimmFeatures
from semiseg.structures.grids import MaskGrid
from semiseg.structures.inputs import grid_size
from semiseg.structures.outputs import Candidates, Locations, MaskLogits, MaskQueries, Outputs

# What model folders and checkpoints have from before detector and mask head were parts of their own.
FORMER_NAMES = {"head.": "detector.", "controller.": "mask_head.controller.", "mask_branch.": "mask_head.branch."}


class Segmenter(nn.Module):
    """Dense predictions of a batch, and the masks of chosen locations from them.

    `forward` returns the same structure in training and evaluation and has no data-dependent control flow;
    assignment, sampling, losses and the choice of detections are elsewhere.

    Attributes:
        num_classes: C.
        strides: of the levels at which the detector predicts, finest first.
        size_divisor: height and width of `forward`'s images divide by it.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: ResNetFeatures | SmallResNet | TimmFeatures,
        neck: FeaturePyramid | BiFPN,
        detector: Detector,
        mask_head: MaskHead,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisor: int = BACKBONE_STRIDES[-1],
    ) -> None:
        super().__init__()
        self.num_classes = detector.num_classes
        self.strides = detector.strides
        self.size_divisor = size_divisor
        self.backbone = backbone
        self.neck = neck
        self.detector = detector
        self.mask_head = mask_head
        # buffers for their device only: they follow from the configuration, so they are not part of the weights
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor, image_sizes_hw: Tensor) -> Tensor:
        """Removes mean and deviation per channel and sets the padding to 0: (B, 3, H, W) uint8 -> float32."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < image_sizes_hw[:, :1]  # (B, H)
        columns = torch.arange(width, device=images.device) < image_sizes_hw[:, 1:]  # (B, W)
        inside = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
        return images.float().sub_(self.pixel_mean).div_(self.pixel_std).mul_(inside)

    def freeze_masks(self) -> None:
        """For a training that has no mask loss: what only masks need is not trained."""
        self.mask_head.freeze()
        for part in self.neck.parts_of_finer_levels(self.strides[0]):
            part.requires_grad_(False)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The parts whose work follows from the size of the images alone; masks depend on how many there are."""
        return (self.backbone, self.neck, self.detector, *self.mask_head.compiled_parts())

    def forward(self, images: Tensor, image_sizes_hw: Tensor) -> Outputs:
        """Predicts at every location of every level.

        Args:
            images: (B, 3, H, W) uint8 RGB, padded right and bottom so that H and W divide by `size_divisor`.
            image_sizes_hw: (B, 2) int64, height and width before padding.
        """
        levels = self.neck(self.backbone(self.normalise(images, image_sizes_hw)))  # by stride
        size_hw = (images.shape[2], images.shape[3])
        outputs, features = self.detector.predict(levels, size_hw, image_sizes_hw)
        return replace(outputs, mask_inputs=self.mask_head(levels, features), padded_hw=size_hw)

    def candidates(self, outputs: Outputs, image_sizes_hw: Tensor, **limits: Any) -> list[Candidates]:
        """See `Detector.candidates`."""
        return self.detector.candidates(outputs, image_sizes_hw, size_divisor=self.size_divisor, **limits)

    def locations(self, padded_size_hw: tuple[int, int], *, device: torch.device) -> Locations:
        """The locations of `forward`'s predictions for images of a padded size, which divides by `size_divisor`."""
        return make_locations(self.level_sizes(padded_size_hw), self.strides, device)

    def level_sizes(self, padded_size_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width in cells of the levels at which the detector predicts, for images of a padded size."""
        return [grid_size(padded_size_hw, stride) for stride in self.strides]

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """One mask per query, see `MaskHead.predict_masks`."""
        return self.mask_head.predict_masks(outputs, queries)

    def mask_grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> MaskGrid:
        """See `MaskHead.grid`."""
        return self.mask_head.grid(boxes_xyxy, padded_size_hw)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's, of weights under their present or former names."""
        return super().load_state_dict(with_present_names(state_dict), strict=strict, assign=assign)


def with_present_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by the names of today's parameters, see `FORMER_NAMES`."""
    renamed = {}
    for name, value in weights.items():
        former = next((prefix for prefix in FORMER_NAMES if name.startswith(prefix)), None)
        renamed[name if former is None else FORMER_NAMES[former] + name.removeprefix(former)] = value
    return renamed
