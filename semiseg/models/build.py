"""From the configuration of a model to its network: the only reader of `ModelConfig` among the models."""

from __future__ import annotations

from collections.abc import Sequence

from semiseg.config import ModelConfig
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
    neck = _build_neck(config, backbone.channels)
    detector = FCOSHead(
        config.neck_channels,
        num_classes=num_classes,
        num_levels=len(config.strides),
        tower_convs=config.tower_convs,
        groups=config.tower_groups,
    )
    return Segmenter(
        backbone=backbone,
        neck=neck,
        detector=detector,
        mask_head=build_mask_head(config),
        strides=config.strides,
        level_ranges=config.level_ranges,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
    )


def mask_stride(config: ModelConfig) -> int | None:
    """Stride in input pixels of the one grid of all masks; None where the mask head has a grid for each of them."""
    return config.mask_stride


def build_mask_head(config: ModelConfig) -> MaskHead:
    """The mask head alone."""
    level_strides = [stride for stride in BACKBONE_STRIDES if stride >= config.mask_feature_stride]
    branch = MaskBranch(
        config.neck_channels,
        num_levels=len(level_strides),
        channels=config.mask_branch_channels,
        convs=config.mask_branch_convs,
        out_channels=config.mask_channels,
        norm=config.mask_branch_norm,
    )
    return DynamicMasks(
        branch=branch,
        channels=config.neck_channels,
        level_strides=level_strides,
        stride=config.mask_stride,
        coordinate_ranges=[*map(float, config.level_ranges), 2.0 * config.level_ranges[-1]],
        dynamic_channels=config.dynamic_channels,
        dynamic_layers=config.dynamic_layers,
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
