"""From the configuration of a model to its network: the only reader of `ModelConfig` among the models."""

from __future__ import annotations

from collections.abc import Sequence

from semiseg.config.model import (
    AnchorDetector,
    DynamicMaskHead,
    FCOSDetector,
    FPNNeck,
    ModelConfig,
    PrototypeMaskHead,
    RayMaskHead,
    RegionDetector,
    RegionMaskHead,
    ResNetBackbone,
    TimmBackbone,
)
from semiseg.models.bifpn import BiFPN
from semiseg.models.detectors.anchors import AnchorDetector as OneStageDetector
from semiseg.models.detectors.detector import Detector
from semiseg.models.detectors.fcos import FCOSHead
from semiseg.models.detectors.regions import RegionDetector as TwoStageDetector
from semiseg.models.fpn import FeaturePyramid
from semiseg.models.masks.dynamic import DynamicMasks, MaskBranch
from semiseg.models.masks.head import MaskHead
from semiseg.models.masks.prototypes import PrototypeMasks
from semiseg.models.masks.rays import RayMasks
from semiseg.models.masks.regions import RegionMasks
from semiseg.models.resnet import BACKBONE_STRIDES, ResNetFeatures, SmallResNet, build_resnet, build_small_resnet
from semiseg.models.segmenter import Segmenter
from semiseg.models.timm_features import TimmFeatures, build_timm


def build_model(config: ModelConfig, *, num_classes: int) -> Segmenter:
    """The network that a configuration describes, its backbone's weights loaded.

    Raises:
        UserError: weights that cannot be had or do not fit, widths that do not fit.
    """
    backbone = _build_backbone(config)
    detector = _build_detector(config, num_classes=num_classes)
    return Segmenter(
        backbone=backbone,
        neck=_build_neck(config, backbone.channels),
        detector=detector,
        mask_head=build_mask_head(config, num_classes=num_classes),
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        size_divisor=config.size_divisor,
    )


def _build_detector(config: ModelConfig, *, num_classes: int) -> Detector:
    part, channels = config.detector, config.neck.channels
    match part:
        case RegionDetector():
            return TwoStageDetector(
                channels,
                num_classes=num_classes,
                strides=part.strides,
                region_strides=[stride for stride in BACKBONE_STRIDES if stride >= part.strides[0]],
                sides=part.anchor_sides,
                ratios=part.anchor_ratios,
                size=part.region_size,
                hidden=part.hidden,
                aligned=part.aligned,
                proposal_nms=part.proposal_nms,
                training_proposals=part.training_proposals,
            )
        case AnchorDetector():
            return OneStageDetector(
                channels,
                num_classes=num_classes,
                strides=part.strides,
                sides=part.anchor_sides,
                scales=part.anchor_scales,
                candidates_per_class=part.candidates_per_class,
            )
        case FCOSDetector():
            return FCOSHead(
                channels,
                num_classes=num_classes,
                strides=part.strides,
                tower_convs=part.tower_convs,
                groups=part.tower_groups,
            )


def mask_stride(config: ModelConfig) -> int | None:
    """Stride in input pixels of the one grid of all masks; None where the mask head has a grid for each of them."""
    if isinstance(config.mask_head, RegionMaskHead) or config.masks_in_parts:
        return None
    return config.mask_head.stride


def mask_cells(config: ModelConfig, long_side: int) -> int:
    """How many cells a mask has in a row or column at most, in images of at most so many pixels."""
    if isinstance(config.mask_head, RegionMaskHead):
        return 2 * config.mask_head.size
    return len(range(config.mask_head.stride // 2, long_side + 1, config.mask_head.stride))


def build_mask_head(config: ModelConfig, *, num_classes: int) -> MaskHead:
    """The mask head alone."""
    head, channels = config.mask_head, config.neck.channels
    match head:
        case PrototypeMaskHead():
            return PrototypeMasks(
                channels,
                prototypes=head.prototypes,
                channels=head.channels,
                convs=head.convs,
                norm=head.norm,
                level_stride=head.feature_stride,
                stride=head.stride,
                from_box=head.start == "box",
                in_parts=config.masks_in_parts,
                shapes=len(config.detector.anchor_scales) if isinstance(config.detector, AnchorDetector) else 1,
            )
        case RayMaskHead():
            return RayMasks(
                channels,
                rays=head.rays,
                start=head.start,
                tower_convs=head.tower_convs,
                groups=head.tower_groups,
                strides=config.detector.strides,
                stride=head.stride,
                softness=head.softness,
            )
        case RegionMaskHead():
            return RegionMasks(
                channels,
                num_masks=1 if head.class_agnostic else num_classes,
                channels=head.channels,
                convs=head.convs,
                norm=head.norm,
                strides=[stride for stride in BACKBONE_STRIDES if stride >= head.feature_stride],
                size=head.size,
                margin=head.margin,
                aligned=head.aligned,
            )
        case DynamicMaskHead():
            assert isinstance(config.detector, FCOSDetector)  # the configuration sees to it
            return _build_dynamic(head, channels, config.detector.level_ranges)


def _build_dynamic(head: DynamicMaskHead, channels: int, ranges: Sequence[int]) -> DynamicMasks:
    level_strides = [stride for stride in BACKBONE_STRIDES if stride >= head.feature_stride]
    branch = MaskBranch(
        channels,
        num_levels=len(level_strides),
        channels=head.branch_channels,
        convs=head.branch_convs,
        out_channels=head.feature_channels,
        norm=head.branch_norm,
    )
    return DynamicMasks(
        branch=branch,
        channels=channels,
        level_strides=level_strides,
        stride=head.stride,
        coordinate_ranges=[*map(float, ranges), 2.0 * ranges[-1]],
        dynamic_channels=head.channels,
        dynamic_layers=head.layers,
    )


def _build_backbone(config: ModelConfig) -> ResNetFeatures | SmallResNet | TimmFeatures:
    backbone = config.backbone
    weights = None if backbone.weights == "random" else backbone.weights
    if isinstance(backbone, TimmBackbone):
        return build_timm(
            backbone.name,
            norm=backbone.norm,
            weights=weights,
            frozen_stages=backbone.frozen_stages,
            size_divisor=config.size_divisor,
        )
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
            first_stride=config.finest_stride,
            last_stride=strides[-1],
            coarse=neck.coarse,
            form=neck.form,
        )
    return BiFPN(backbone_channels, neck.channels, repeats=neck.repeats, norm=neck.norm)
