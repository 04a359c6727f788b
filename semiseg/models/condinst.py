"""CondInst: backbone, pyramid, FCOS head, mask branch and the controller that writes each instance's mask head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semiseg.config import ModelConfig
from semiseg.models.bifpn import BiFPN
from semiseg.models.dynamic_mask import dynamic_masks, filter_shapes, num_filter_numbers
from semiseg.models.fcos_head import HEAD_STD, FCOSHead, flatten_levels, make_locations, neighbourhoods
from semiseg.models.fpn import FeaturePyramid
from semiseg.models.mask_branch import MaskBranch
from semiseg.models.resnet import BACKBONE_STRIDES, ResNetFeatures, SmallResNet, build_resnet, build_small_resnet
from semiseg.models.upsample import aligned_upsample
from semiseg.structures.inputs import grid_size
from semiseg.structures.outputs import DenseOutputs, Locations, MaskLogits, MaskQueries


class CondInst(nn.Module):
    """Dense predictions of a batch, and the masks of chosen locations from them.

    `forward` returns the same structure in training and evaluation and has no data-dependent control flow;
    assignment, sampling, losses and post-processing are elsewhere. Source: CondInst (Tian et al. 2020), METHOD
    section 3.

    Attributes:
        num_classes: C.
        strides: of the levels at which the head predicts, finest first.
        size_divisor: height and width of `forward`'s images divide by it.
        mask_feature_stride, mask_stride: input pixels per cell of the shared features and of the predicted masks.
        level_ranges: boundaries in pixels of max(l, t, r, b) between consecutive levels, for the assignment.
        coordinate_ranges: (levels,) input pixels by which the relative coordinates of a level are divided: the upper
            ends of `level_ranges`, twice the last for the last level.
        learns_masks: False after `freeze_masks`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    coordinate_ranges: Tensor

    def __init__(
        self,
        *,
        backbone: ResNetFeatures | SmallResNet,
        neck: FeaturePyramid | BiFPN,
        head: FCOSHead,
        mask_branch: MaskBranch,
        strides: Sequence[int],
        level_ranges: Sequence[float],
        mask_feature_stride: int,
        mask_stride: int,
        dynamic_channels: int,
        dynamic_layers: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.num_classes = head.num_classes
        self.strides = tuple(strides)
        self.size_divisor = BACKBONE_STRIDES[-1]
        self.mask_feature_stride = mask_feature_stride
        self.mask_stride = mask_stride
        self.mask_level_strides = [s for s in BACKBONE_STRIDES if s >= mask_feature_stride]
        self.level_ranges = tuple(float(value) for value in level_ranges)
        self.filter_shapes = filter_shapes(mask_branch.out_channels, dynamic_channels, dynamic_layers)
        self.backbone = backbone
        self.neck = neck
        self.head = head
        self.controller = _controller(neck.channels, num_filter_numbers(self.filter_shapes))
        self.mask_branch = mask_branch
        self.learns_masks = True
        ranges = [*self.level_ranges, 2 * self.level_ranges[-1]]
        # buffers for their device only: they follow from the configuration, so they are not part of the weights
        self.register_buffer("coordinate_ranges", torch.tensor(ranges), persistent=False)
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
        """For a training that has no mask loss: what only masks need is not trained, and the branch not computed in it.

        Its gradients would be 0 everywhere, and on the finest map they cost about as much as others.
        """
        self.learns_masks = False
        for part in (self.mask_branch, self.controller, *self.neck.parts_of_finer_levels(self.strides[0])):
            part.requires_grad_(False)

    def forward(self, images: Tensor, image_sizes_hw: Tensor) -> DenseOutputs:
        """Predicts at every location of every level; mask features are 0 in a training without masks.

        Args:
            images: (B, 3, H, W) uint8 RGB, padded right and bottom so that H and W divide by `size_divisor`.
            image_sizes_hw: (B, 2) int64, height and width before padding.
        """
        levels = self.neck(self.backbone(self.normalise(images, image_sizes_hw)))  # by stride
        predictions = self.head([levels[stride] for stride in self.strides])
        return DenseOutputs(
            class_logits=flatten_levels([level.class_logits for level in predictions]),
            box_distances=flatten_levels([level.box_distances for level in predictions]),
            centreness_logits=flatten_levels([level.centreness_logits for level in predictions])[..., 0],
            filter_features=flatten_levels([level.box_tower for level in predictions]),
            mask_features=self._mask_features([levels[stride] for stride in self.mask_level_strides]),
            mask_feature_stride=self.mask_feature_stride,
            locations=self.locations((images.shape[2], images.shape[3]), device=images.device),
        )

    def _mask_features(self, levels: Sequence[Tensor]) -> Tensor:
        if self.training and not self.learns_masks:
            batch, _, height, width = levels[0].shape
            return levels[0].new_zeros(batch, self.mask_branch.out_channels, height, width)
        features: Tensor = self.mask_branch(levels)
        return features

    def locations(self, padded_size_hw: tuple[int, int], *, device: torch.device) -> Locations:
        """The locations of `forward`'s predictions for images of a padded size, which divides by `size_divisor`."""
        return make_locations(self.level_sizes(padded_size_hw), self.strides, device)

    def level_sizes(self, padded_size_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width in cells of the levels at which the head predicts, for images of a padded size."""
        return [grid_size(padded_size_hw, stride) for stride in self.strides]

    def predict_masks(self, outputs: DenseOutputs, queries: MaskQueries) -> MaskLogits:
        """Mask logits (Q, h, w) of the queried locations on the whole padded map, at `mask_stride`.

        The order is that of the queries. Without queries the result is (0, h, w) and still on the graph.
        """
        locations = outputs.locations
        logits = dynamic_masks(
            outputs.mask_features,
            self.filters(outputs, queries),
            queries.image_index,
            locations.xy[queries.location_index],
            self.coordinate_ranges[locations.level[queries.location_index]],
            shapes=self.filter_shapes,
            stride=outputs.mask_feature_stride,
            counts=queries.counts,
        )
        logits = aligned_upsample(logits.unsqueeze(1), outputs.mask_feature_stride // self.mask_stride).squeeze(1)
        return MaskLogits(
            logits=logits,
            image_index=queries.image_index,
            instance_index=queries.instance_index,
            stride=self.mask_stride,
        )

    def filters(self, outputs: DenseOutputs, queries: MaskQueries) -> Tensor:
        """The filters (Q, D) of the queried locations: weights of all layers, then biases.

        The controller is a 3x3 convolution. It is computed where a mask is wanted only, a few hundred of the many
        thousand locations, as a product with the 3x3 features around each.
        """
        height, width = (side * outputs.mask_feature_stride for side in outputs.mask_features.shape[-2:])
        around, exists = neighbourhoods(outputs.locations, queries.location_index, (height, width))
        patches = outputs.filter_features[queries.image_index[:, None], around] * exists[:, :, None]  # (Q, 9, C)
        weight = self.controller.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 9 C)
        return F.linear(patches.flatten(1), weight, self.controller.bias)


def _controller(channels: int, numbers: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, numbers, kernel_size=3, padding=1)
    assert conv.bias is not None
    nn.init.normal_(conv.weight, std=HEAD_STD)
    nn.init.zeros_(conv.bias)
    return conv


def build_model(config: ModelConfig, *, num_classes: int) -> CondInst:
    """The network that a configuration describes, its backbone's weights loaded.

    Raises:
        UserError: weights that cannot be had or do not fit, widths that do not fit.
    """
    backbone = _build_backbone(config)
    neck = _build_neck(config, backbone.channels)
    head = FCOSHead(
        config.neck_channels,
        num_classes=num_classes,
        num_levels=len(config.strides),
        tower_convs=config.tower_convs,
        groups=config.tower_groups,
    )
    mask_branch = MaskBranch(
        config.neck_channels,
        num_levels=sum(stride >= config.mask_feature_stride for stride in BACKBONE_STRIDES),
        channels=config.mask_branch_channels,
        convs=config.mask_branch_convs,
        out_channels=config.mask_channels,
        norm=config.mask_branch_norm,
    )
    return CondInst(
        backbone=backbone,
        neck=neck,
        head=head,
        mask_branch=mask_branch,
        strides=config.strides,
        level_ranges=config.level_ranges,
        mask_feature_stride=config.mask_feature_stride,
        mask_stride=config.mask_stride,
        dynamic_channels=config.dynamic_channels,
        dynamic_layers=config.dynamic_layers,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


def _build_backbone(config: ModelConfig) -> ResNetFeatures | SmallResNet:
    weights = None if config.weights == "random" else config.weights
    if config.backbone == "small":
        return build_small_resnet(
            config.small_widths,
            norm=config.backbone_norm,
            weights=weights,
            frozen_stages=config.frozen_stages,
        )
    return build_resnet(
        config.backbone,
        norm=config.backbone_norm,
        weights=weights,
        frozen_stages=config.frozen_stages,
        stride_in_1x1=config.stride_in_1x1,
        deformable_interval=config.deformable_interval,
    )


def _build_neck(config: ModelConfig, backbone_channels: Sequence[int]) -> FeaturePyramid | BiFPN:
    if config.neck == "bifpn":
        return BiFPN(backbone_channels, config.neck_channels, repeats=config.neck_repeats, norm=config.neck_norm)
    return FeaturePyramid(
        backbone_channels,
        config.neck_channels,
        first_stride=min(config.strides[0], config.mask_feature_stride),
        last_stride=config.strides[-1],
    )
