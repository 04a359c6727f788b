"""The two-stage detector of Mask R-CNN: a region proposal network, and a head that classifies and refines its regions.

The layers are torchvision's and have its names, so that its weights load; what is around them (sampling, losses, the
choice of detections) is written anew, since torchvision's draws from the global generator.
Source: Faster R-CNN (Ren et al. 2015); Mask R-CNN (He et al. 2017), section 3; FPN (Lin et al. 2017), section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms

from semiseg.models.detectors.boxes import clip_boxes, decode_boxes
from semiseg.models.detectors.detector import Detector
from semiseg.models.detectors.fcos import make_locations
from semiseg.models.region_features import region_features
from semiseg.structures.inputs import grid_size, require
from semiseg.structures.outputs import Candidates, MaskQueries, Outputs

ANCHOR_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the four numbers of a box beside an anchor
REGION_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # and beside a proposal
SMALLEST_PROPOSAL, SMALLEST_DETECTION = 1e-3, 1e-2  # pixels of a side


@dataclass(frozen=True)
class RegionOutputs(Outputs):
    """The proposal network's predictions, and the features from which regions are looked at."""

    objectness_logits: Tensor  # (B, A) of the anchors, level after level, by location, then by shape
    anchor_deltas: Tensor  # (B, A, 4) float32, see `encode_boxes`
    anchors_xyxy: Tensor  # (A, 4) float32, padded input's pixels
    anchors_per_level: tuple[int, ...]
    features: tuple[Tensor, ...]  # (B, channels, h, w) of the levels that regions are taken from
    image_sizes_hw: Tensor  # (B, 2) int64, before padding
    proposals: tuple[Tensor, ...] = ()  # in training, (k, 4) of each image, see `RegionDetector.proposals`

    def __post_init__(self) -> None:
        batch, count = self.objectness_logits.shape
        require(self.anchor_deltas.shape == (batch, count, 4), "anchor_deltas must be (B, A, 4)")
        require(self.anchors_xyxy.shape == (count, 4), "anchors_xyxy must be (A, 4)")
        require(sum(self.anchors_per_level) == count, "anchors_per_level must add up to A")


class RegionDetector(Detector):
    """Anchors of three shapes at every location of every level; regions from the levels of the backbone.

    Attributes:
        sides: of a square anchor in pixels, one for each level.
        ratios: of height and width.
        size: cells of a region's features in each direction.
        aligned: whether a region's cells are taken half a feature cell further up and left, where they belong.
        proposal_nms: IoU above which the worse of two proposals of a level goes.
        training_proposals: so many of an image in training.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_classes: int,
        strides: Sequence[int],
        region_strides: Sequence[int],
        sides: Sequence[int],
        ratios: Sequence[float],
        size: int,
        hidden: int,
        aligned: bool,
        proposal_nms: float,
        training_proposals: int,
    ) -> None:
        super().__init__()
        self.num_classes, self.strides, self.region_strides = num_classes, tuple(strides), tuple(region_strides)
        self.sides, self.ratios, self.size, self.aligned = tuple(sides), tuple(ratios), size, aligned
        self.proposal_nms, self.training_proposals = proposal_nms, training_proposals
        self.anchors = RPNHead(channels, len(self.ratios))
        self.regions = TwoMLPHead(channels * size**2, hidden)
        self.boxes = FastRCNNPredictor(hidden, num_classes + 1)

    def predict(
        self, levels: Mapping[int, Tensor], padded_size_hw: tuple[int, int], image_sizes_hw: Tensor
    ) -> tuple[RegionOutputs, Sequence[Tensor]]:
        """As `Detector.predict`; there are no features of locations."""
        sizes = [grid_size(padded_size_hw, stride) for stride in self.strides]
        objectness, deltas = self.anchors([levels[stride] for stride in self.strides])
        shapes = len(self.ratios)
        outputs = RegionOutputs(
            objectness_logits=torch.cat([each.permute(0, 2, 3, 1).flatten(1) for each in objectness], dim=1),
            anchor_deltas=torch.cat([_by_anchor(each.float(), shapes) for each in deltas], dim=1),
            anchors_xyxy=make_anchors(sizes, self.strides[0], self.sides, self.ratios, image_sizes_hw.device),
            anchors_per_level=tuple(shapes * height * width for height, width in sizes),
            features=tuple(levels[stride] for stride in self.region_strides),
            image_sizes_hw=image_sizes_hw,
            locations=make_locations(sizes, self.strides, image_sizes_hw.device),
        )
        if self.training:
            outputs = replace(outputs, proposals=tuple(self.proposals(outputs, number=self.training_proposals)))
        return outputs, ()

    @torch.no_grad()
    def proposals(self, outputs: RegionOutputs, *, number: int) -> list[Tensor]:
        """(K, 4) boxes of each image in its pixels, clipped, best first.

        So many of each level, by NMS within it, and of these as many of the image.
        """
        results = []
        for image, size_hw in enumerate(outputs.image_sizes_hw):
            kept, scores, of_level = [], [], []
            start = 0
            for level, count in enumerate(outputs.anchors_per_level):
                logits = outputs.objectness_logits[image, start : start + count].float()
                best, index = logits.topk(min(number, count))
                index = index + start
                boxes = decode_boxes(outputs.anchor_deltas[image, index], outputs.anchors_xyxy[index], ANCHOR_WEIGHTS)
                kept.append(clip_boxes(boxes, size_hw))
                scores.append(best.sigmoid())
                of_level.append(torch.full_like(index, level))
                start += count
            boxes, score, level_of = torch.cat(kept), torch.cat(scores), torch.cat(of_level)
            large = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_PROPOSAL).all(1)
            boxes, score, level_of = boxes[large], score[large], level_of[large]
            order = batched_nms(boxes, score, level_of, self.proposal_nms)
            results.append(boxes[order[:number]])
        return results

    def refine(self, outputs: RegionOutputs, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (K, C + 1), the background first, and deltas (K, C + 1, 4) of all regions (k, 4), by image."""
        image = torch.cat([torch.full((len(own),), number) for number, own in enumerate(boxes)])
        rois = torch.cat(list(boxes))
        rois = torch.cat([image[:, None].to(rois), rois], dim=1)
        features = region_features(
            outputs.features, rois, strides=self.region_strides, size=self.size, aligned=self.aligned
        )
        logits, deltas = self.boxes(self.regions(features))
        return logits.float(), deltas.float().unflatten(1, (-1, 4))

    @torch.no_grad()
    def candidates(
        self,
        outputs: Outputs,
        image_sizes_hw: Tensor,
        *,
        score_threshold: float,
        candidates_per_level: int,
        nms_threshold: float,
        max_detections: int,
        size_divisor: int,
    ) -> list[Candidates]:
        """As `Detector.candidates`; the boxes are clipped. There are at most `candidates_per_level` proposals."""
        assert isinstance(outputs, RegionOutputs)
        proposals = self.proposals(outputs, number=candidates_per_level)
        logits, deltas = self.refine(outputs, proposals)
        counts = [len(own) for own in proposals]
        results = []
        for image, parts in enumerate(zip(proposals, logits.split(counts), deltas.split(counts), strict=True)):
            own, own_logits, own_deltas = parts
            scores = own_logits.softmax(1)[:, 1:]  # (k, C)
            boxes = clip_boxes(decode_boxes(own_deltas, own[:, None], REGION_WEIGHTS)[:, 1:], image_sizes_hw[image])
            large = ((boxes[..., 2:] - boxes[..., :2]) >= SMALLEST_DETECTION).all(2)
            region, label = ((scores > score_threshold) & large).nonzero().unbind(1)
            score, box = scores[region, label], boxes[region, label]
            kept = batched_nms(box.double(), score.double(), label, nms_threshold)[:max_detections]
            queries = MaskQueries(
                image_index=torch.full_like(kept, image),
                location_index=torch.zeros_like(kept),  # masks are made from boxes
                instance_index=torch.arange(len(kept), device=kept.device),
                boxes_xyxy=box[kept],
                labels=label[kept],
            )
            results.append(Candidates(scores=score[kept], queries=queries))
        return results


def make_anchors(
    sizes_hw: Sequence[tuple[int, int]],
    first_stride: int,
    sides: Sequence[int],
    ratios: Sequence[float],
    device: torch.device,
) -> Tensor:
    """(A, 4) boxes in the padded input's pixels: level after level, by location, then by ratio.

    Args:
        sizes_hw: of the levels, in cells; `first_stride` is that of the first, which divides the padded input.
        sides: of a square anchor, for each level. Anchors of a level have one area; they stand at a cell's corner,
            and their own corners are rounded to pixels before they are moved there, as torchvision's are.
        ratios: height by width.
    """
    padded = tuple(side * first_stride for side in sizes_hw[0])
    result = []
    for (height, width), side in zip(sizes_hw, sides, strict=True):
        root = torch.tensor(ratios).sqrt()
        half = torch.stack([side / root, side * root], dim=1) / 2  # (S, xy)
        shapes = torch.cat([-half, half], dim=1).round().to(device)
        # a level whose cells do not divide the input has cells of this many pixels, as torchvision counts
        down, across = (
            torch.arange(n, device=device) * (full // n) for n, full in ((height, padded[0]), (width, padded[1]))
        )
        y, x = torch.meshgrid(down, across, indexing="ij")
        corners = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
        result.append((corners + shapes).reshape(-1, 4).float())
    return torch.cat(result)


def _by_anchor(deltas: Tensor, shapes: int) -> Tensor:
    """(B, S * 4, h, w) -> (B, h * w * S, 4)."""
    batch, _, height, width = deltas.shape
    return deltas.view(batch, shapes, 4, height, width).permute(0, 3, 4, 1, 2).reshape(batch, -1, 4)
