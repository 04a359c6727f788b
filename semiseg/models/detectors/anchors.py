"""YOLACT's detector: one convolution shared by all levels, then the class, box and mask of every anchor.

Source: YOLACT (Bolya et al. 2019), sections 3 and 5; sizes and order are those of its released networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from semiseg.models.detectors.boxes import decode_boxes
from semiseg.models.detectors.detector import Detector
from semiseg.models.detectors.fcos import flatten_levels, make_locations
from semiseg.models.detectors.select import cell_exists, overlaps_image
from semiseg.structures.inputs import grid_size, require
from semiseg.structures.outputs import Candidates, MaskQueries, Outputs

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the four numbers of a box beside its anchor


@dataclass(frozen=True)
class AnchorOutputs(Outputs):
    """One prediction for each of A anchors: level after level, by location, then by shape."""

    class_logits: Tensor  # (B, A, C + 1), the background first
    box_deltas: Tensor  # (B, A, 4) float32, see `encode_boxes`
    anchors_xyxy: Tensor  # (A, 4) float32, padded input's pixels
    shapes: int  # anchors of a location
    semantic_logits: Tensor | None = None  # (B, C, h, w) of the finest level, in training

    def __post_init__(self) -> None:
        batch, count = self.class_logits.shape[:2]
        require(self.box_deltas.shape == (batch, count, 4), "box_deltas must be (B, A, 4)")
        require(self.anchors_xyxy.shape == (count, 4), "anchors_xyxy must be (A, 4)")
        require(self.locations.xy.shape[0] * self.shapes == count, "as many anchors for each location")


class AnchorDetector(Detector):
    """A 3x3 convolution with ReLU, and on it 3x3 convolutions for classes and boxes; weights start as Xavier's.

    Attributes:
        sides: of an anchor in pixels, one for each level.
        scales: of the anchors of a location, by that side.
        candidates_per_class: the best of an image that NMS looks at.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_classes: int,
        strides: Sequence[int],
        sides: Sequence[int],
        scales: Sequence[float],
        candidates_per_class: int,
    ) -> None:
        super().__init__()
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.sides, self.scales, self.candidates_per_class = tuple(sides), tuple(scales), candidates_per_class
        self.tower = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.boxes = nn.Conv2d(channels, 4 * len(self.scales), kernel_size=3, padding=1)
        self.classes = nn.Conv2d(channels, (num_classes + 1) * len(self.scales), kernel_size=3, padding=1)
        self.semantic = nn.Conv2d(channels, num_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def predict(
        self, levels: Mapping[int, Tensor], padded_size_hw: tuple[int, int], image_sizes_hw: Tensor
    ) -> tuple[AnchorOutputs, Sequence[Tensor]]:
        """As `Detector.predict`; the features are those behind the shared convolution."""
        shapes, device = len(self.scales), image_sizes_hw.device
        towers = [self.tower(levels[stride]).relu() for stride in self.strides]
        with torch.autocast(device.type, enabled=False):  # as FCOS's: half precision would move a large box's sides
            boxes = [self.boxes(tower.float()) for tower in towers]
        sizes = [grid_size(padded_size_hw, stride) for stride in self.strides]
        outputs = AnchorOutputs(
            class_logits=_by_anchor([self.classes(tower) for tower in towers], shapes),
            box_deltas=_by_anchor(boxes, shapes),
            anchors_xyxy=square_anchors(sizes, padded_size_hw, self.sides, self.scales, device),
            shapes=shapes,
            semantic_logits=self.semantic(levels[self.strides[0]]) if self.training else None,
            locations=make_locations(sizes, self.strides, device),
        )
        return outputs, towers

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
        """As `Detector.candidates`; a score is a class's probability. `candidates_per_level` is not read.

        The threshold is of an anchor's best class: its other classes stay candidates, too, as in the original.
        """
        assert isinstance(outputs, AnchorOutputs)
        own_sizes = (image_sizes_hw + size_divisor - 1) // size_divisor * size_divisor
        results = []
        for image, logits in enumerate(outputs.class_logits):
            scores = logits.float().softmax(1)[:, 1:]  # (A, C)
            # cells that the image would not have if it were alone, see `select_detections`
            exists = cell_exists(outputs.locations, own_sizes[image]).repeat_interleave(outputs.shapes)
            (anchor,) = torch.nonzero((scores.amax(1) > score_threshold) & exists, as_tuple=True)
            boxes = decode_boxes(outputs.box_deltas[image, anchor].float(), outputs.anchors_xyxy[anchor], WEIGHTS)
            index, label, score = fast_nms(
                boxes, scores[anchor].T, threshold=nms_threshold, per_class=self.candidates_per_class
            )
            index, label, score = index[:max_detections], label[:max_detections], score[:max_detections]
            inside = overlaps_image(boxes[index], image_sizes_hw[image])
            index, label, score = index[inside], label[inside], score[inside]
            queries = MaskQueries(
                image_index=torch.full_like(index, image),
                location_index=anchor[index] // outputs.shapes,
                instance_index=torch.arange(len(index), device=index.device),
                boxes_xyxy=boxes[index],
                labels=label,
                shape_index=anchor[index] % outputs.shapes,
            )
            results.append(Candidates(scores=score, queries=queries))
        return results


def square_anchors(
    sizes_hw: Sequence[tuple[int, int]],
    padded_hw: tuple[int, int],
    sides: Sequence[int],
    scales: Sequence[float],
    device: torch.device,
) -> Tensor:
    """(A, 4) boxes in the padded input's pixels: level after level, by location, then by scale.

    They stand at the centres of the equal parts that a level's cells cut the input into.

    Args:
        sizes_hw: of the levels, in cells.
        sides: of an anchor in pixels, for each level; scales: what they are multiplied with.
    """
    result = []
    for size, side in zip(sizes_hw, sides, strict=True):
        y, x = ((torch.arange(n, device=device) + 0.5) * (full / n) for n, full in zip(size, padded_hw, strict=True))
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([columns, rows, columns, rows], dim=-1).view(-1, 1, 4)
        half = torch.tensor([[side * scale / 2] for scale in scales], device=device)  # (S, 1)
        result.append((centre + torch.cat([-half, -half, half, half], dim=1)).reshape(-1, 4).float())
    return torch.cat(result)


def fast_nms(boxes_xyxy: Tensor, scores: Tensor, *, threshold: float, per_class: int) -> tuple[Tensor, Tensor, Tensor]:
    """YOLACT's NMS, which asks every better box of the class, whether that is dropped itself or not.

    Args:
        boxes_xyxy: (K, 4), the same for all classes.
        scores: (C, K).
        threshold: of the IoU above which the worse box goes.
        per_class: so many of each class are looked at.

    Returns:
        box, class and score of what is kept, (N,) each, best first; equal scores: the lower class, then box.
    """
    classes, count = scores.shape
    if not count:
        return (nothing := scores.new_zeros(0).long()), nothing, scores.new_zeros(0)
    score, index = scores.sort(dim=1, descending=True, stable=True)
    score, index = score[:, :per_class], index[:, :per_class]
    kept = torch.stack([_not_covered(boxes_xyxy[own], threshold) for own in index])
    label = torch.arange(classes, device=scores.device)[:, None].expand_as(index)
    index, label, score = index[kept], label[kept], score[kept]
    score, order = score.sort(descending=True, stable=True)
    return index[order], label[order], score


def _not_covered(boxes_xyxy: Tensor, threshold: float) -> Tensor:
    """(K,) bool: no earlier box has an IoU above the threshold."""
    best: Tensor = box_iou(boxes_xyxy, boxes_xyxy).triu(1).amax(0)  # of those before
    return best <= threshold


def _by_anchor(maps: Sequence[Tensor], shapes: int) -> Tensor:
    """(B, S * K, h, w) of each level -> (B, A, K)."""
    batch, _, *_ = maps[0].shape
    of_locations = flatten_levels(maps)  # (B, R, S * K)
    return of_locations.reshape(batch, shapes * of_locations.shape[1], -1)
