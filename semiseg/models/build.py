"""From the configuration of a model to its network: the only reader of `ModelConfig` among the models."""

from __future__ import annotations

from collections.abc import Sequence

from semiseg.config.model import FPNNeck, ModelConfig, ResNetBackbone
from semiseg.models.bifpn import BiFPN
from semiseg.models.detectors.fcos import FCOSHead
from semiseg.models.fpn import FeaturePyramid
from semiseg.models.masks.dynamic import DynamicMasks, MaskBranch
from semiseg.models.masks.head import MaskHead
from semiseg.models.resnet import BACKBONE_STRIDES, ResNetFeatures, SmallResNet, build_resnet, build_small_resnet
from semiseg.models.segmenter import Segmenter


def build_model(config: ModelConfig, *, num_classes: int) -> Segmenter:
    """The network that a configuration describes, its backbone's weights loaded.

    Raises:
        UserError: weights that cannot be had or do not fit, widths that do not fit.
    """
    backbone = _build_backbone(config)
    detector = FCOSHead(
        config.neck.channels,
        num_classes=num_classes,
        num_levels=len(config.detector.strides),
        tower_convs=config.detector.tower_convs,
        groups=config.detector.tower_groups,
    )
    return Segmenter(
        backbone=backbone,
        neck=_build_neck(config, backbone.channels),
        detector=detector,
        mask_head=build_mask_head(config),
        strides=config.detector.strides,
        level_ranges=config.detector.level_ranges,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


def mask_stride(config: ModelConfig) -> int | None:
    """Stride in input pixels of the one grid of all masks; None where the mask head has a grid for each of them."""
    return config.mask_head.stride


def build_mask_head(config: ModelConfig) -> MaskHead:
    """The mask head alone."""
    head, ranges = config.mask_head, config.detector.level_ranges
    level_strides = [stride for stride in BACKBONE_STRIDES if stride >= head.feature_stride]
    branch = MaskBranch(
        config.neck.channels,
        num_levels=len(level_strides),
        channels=head.branch_channels,
        convs=head.branch_convs,
        out_channels=head.feature_channels,
        norm=head.branch_norm,
    )
    return DynamicMasks(
        branch=branch,
        channels=config.neck.channels,
        level_strides=level_strides,
        stride=head.stride,
        coordinate_ranges=[*map(float, ranges), 2.0 * ranges[-1]],
        dynamic_channels=head.channels,
        dynamic_layers=head.layers,
    )


def _build_backbone(config: ModelConfig) -> ResNetFeatures | SmallResNet:
    backbone = config.backbone
    weights = None if backbone.weights == "random" else backbone.weights
    if isinstance(backbone, ResNetBackbone):
        return build_resnet(
            backbone.depth,
            norm=backbone.norm,
            weights=weights,
            frozen_stages=backbone.frozen_stages,
            stride_in_1x1=backbone.stride_in_1x1,
            deformable_interval=backbone.deformable_interval,
        )
    return build_small_resnet(
        backbone.widths, norm=backbone.norm, weights=weights, frozen_stages=backbone.frozen_stages
    )


def _build_neck(config: ModelConfig, backbone_channels: Sequence[int]) -> FeaturePyramid | BiFPN:
    neck, strides = config.neck, config.detector.strides
    if isinstance(neck, FPNNeck):
        return FeaturePyramid(
            backbone_channels,
            neck.channels,
            first_stride=min(strides[0], config.mask_head.feature_stride),
            last_stride=strides[-1],
        )
    return BiFPN(backbone_channels, neck.channels, repeats=neck.repeats, norm=neck.norm)
