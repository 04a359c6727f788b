"""From images to their detections: the one way that the evaluation, `semiseg predict` and the Python API share.

An image's detections do not depend on the images beside it: only images of equal padded size go through the network
together, since norms that look at the whole map (GroupNorm) would see the padding that a larger neighbour brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pycocotools import mask as rle_codec
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from semiseg.config import InferenceConfig
from semiseg.engine.checkpoint import ModelInfo, load_model_folder
from semiseg.errors import UserError
from semiseg.models.build import build_model
from semiseg.models.paste import MASK_THRESHOLD, iter_masks, to_output_boxes
from semiseg.models.refine import Refiner, build_refiner
from semiseg.models.segmenter import Segmenter
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import pad_images
from semiseg.structures.masks import PlacedMask
from semiseg.structures.outputs import Candidates, Detections, Outputs

# Padded pixels of one forward, or one image: three of 800 x 1333. With ResNet-50 about 1.5 GB.
FORWARD_PIXELS = 2**22
Made = TypeVar("Made")


@dataclass(frozen=True)
class LoadedModel:
    """A trained network with what its model folder says of it."""

    network: Segmenter  # in evaluation mode, its parameters without gradients
    info: ModelInfo  # class names, category ids, resize rule and thresholds
    device: torch.device  # where the network is

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.info.class_names


@dataclass(frozen=True)
class ImageDetections:
    """The detections of one image, best first, with their masks still to be made."""

    number: int  # of the image in the list that was given
    output_hw: tuple[int, int]  # height and width that boxes and masks are scaled to
    boxes_xyxy: Tensor  # (N, 4) float32, output pixels, clipped to the output
    scores: Tensor  # (N,) float32 in [0, 1], descending
    labels: Tensor  # (N,) int64 in 0..C-1
    masks: Iterator[PlacedMask]  # of each detection, made one at a time, so that memory does not grow with N


def load_model(folder: Path, *, device: str | torch.device | None = None) -> LoadedModel:
    """Reads a model folder, or the `model/` of a run's folder, for a device, None = the best; see `api.load_model`."""
    chosen = find_device(device)
    weights, info = load_model_folder(folder / "model" if (folder / "model").is_dir() else folder)
    network = build_network(weights, info, where=folder).to(chosen).eval().requires_grad_(False)
    return LoadedModel(network, info, chosen)


def build_network(weights: dict[str, Tensor], info: ModelInfo, *, where: Path) -> Segmenter:
    """The network that a model folder describes with its weights, on the CPU; `where` names it in the error."""
    try:
        with torch.device("meta"):  # first without memory: sizes that are not the weights' own may be of any size
            build_model(info.config, num_classes=len(info.class_names)).load_state_dict(weights, assign=True)
        network = build_model(info.config, num_classes=len(info.class_names))
        network.load_state_dict(weights)
    except RuntimeError:
        raise UserError(f"{where}: the weights are not those of the model that its config.json describes") from None
    # The layout in which images are decoded: a forward of a ResNet-50 takes a tenth less time on a CPU.
    return network.to(memory_format=torch.channels_last)


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, or the best there is; a device that this machine has not is a `UserError`."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        raise UserError(f"device {str(name)!r} is not on this machine; allowed: cpu, or cuda with a GPU") from None
    return device


def forward_groups(sizes_hw: Sequence[tuple[int, int]], *, size_divisor: int, forward_pixels: int) -> list[list[int]]:
    """Which images, by index, go through the network together: those of equal padded size, in their order.

    A group has at most so many padded pixels, or a single image; sizes are those before padding.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (height, width) in enumerate(sizes_hw):
        padded_hw = (-(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor)
        alike.setdefault(padded_hw, []).append(number)
    groups = []
    for (height, width), numbers in alike.items():
        size = max(forward_pixels // (height * width), 1)
        groups += [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return groups


def find_instances(
    network: Segmenter,
    images: Sequence[Tensor],
    *,
    output_sizes: Sequence[tuple[int, int]],
    limits: InferenceConfig,
    originals: Callable[[int], Tensor] | None = None,
    forward_pixels: int = FORWARD_PIXELS,
) -> Iterator[ImageDetections]:
    """Yields the detections of every image once, group by group (see `forward_groups`), not in the images' order.

    To be called without gradients. A group's predictions stay in memory until its last image's masks are made.

    Args:
        network: in evaluation mode; the images are moved to its device.
        images: (3, H, W) uint8 RGB each, of any sizes; the network sees them as they are.
        output_sizes: (height, width) of boxes and masks, for each image.
        limits: which candidates are kept, and how masks are refined; its sizes are not read.
        originals: number of an image -> (3, height, width) uint8 of its output size, which refined masks follow; None =
            the image itself, resized.
    """
    refiner, polar = build_refiner(limits.refine), limits.decoding == "polarmask"
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    device = network.pixel_mean.device
    for numbers in forward_groups(sizes, size_divisor=network.size_divisor, forward_pixels=forward_pixels):
        padded, sizes_hw = pad_images([images[number].to(device) for number in numbers], network.size_divisor)
        sizes_hw = sizes_hw.to(device)
        outputs = network(padded, sizes_hw)
        chosen = network.candidates(
            outputs,
            sizes_hw,
            score_threshold=limits.score_threshold,
            candidates_per_level=limits.candidates_per_level,
            nms_threshold=limits.nms_threshold,
            max_detections=limits.max_detections,
            **({"decoding": limits.decoding} if polar else {}),  # other detectors know none
        )
        for number, candidates in zip(numbers, chosen, strict=True):
            input_hw, output_hw = sizes[number], output_sizes[number]
            if limits.rescore:
                candidates = _rescored(network, outputs, candidates, input_hw)
            boxes_xyxy, refine = to_output_boxes(candidates.boxes_xyxy, input_hw, output_hw), None
            if refiner is not None:
                original = _resized(images[number], output_hw) if originals is None else originals(number)
                refine = partial(_refined, refiner, original, boxes_xyxy)
            yield ImageDetections(
                number=number,
                output_hw=output_hw,
                boxes_xyxy=boxes_xyxy,
                scores=candidates.scores,
                labels=candidates.labels,
                masks=iter_masks(
                    network, outputs, candidates.queries, input_hw, output_hw, refine=refine, polygons=polar
                ),
            )


def _refined(refiner: Refiner, image: Tensor, boxes_xyxy: Tensor, numbers: Tensor, probabilities: Tensor) -> Tensor:
    return refiner(image, boxes_xyxy[numbers], probabilities)


def _resized(image: Tensor, size_hw: tuple[int, int]) -> Tensor:
    same = (image.shape[1], image.shape[2]) == size_hw
    return image if same else resize(image, list(size_hw), antialias=True)


def _rescored(network: Segmenter, outputs: Outputs, candidates: Candidates, input_hw: tuple[int, int]) -> Candidates:
    """The candidates with scores by which their masks count, too (`InferenceConfig.rescore`), best first again."""
    predicted = network.predict_masks(outputs, candidates.queries)
    probability = predicted.logits.float().sigmoid()
    if isinstance(predicted.grid, WholeMap):  # the padding's cells are not the image's
        rows, columns = (-(-side // predicted.grid.stride) for side in input_hw)
        probability = probability[:, :rows, :columns]
    inside = probability > MASK_THRESHOLD
    mean = (probability * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    scores, order = (candidates.scores * mean).sort(descending=True, stable=True)
    moved = {name: getattr(candidates.queries, name)[order] for name in ("location_index", "boxes_xyxy", "labels")}
    shape = candidates.queries.shape_index
    moved["shape_index"] = None if shape is None else shape[order]
    return Candidates(scores, replace(candidates.queries, **moved))


def each_image(
    network: Segmenter,
    images: Sequence[Tensor],
    make: Callable[[ImageDetections], Made],
    *,
    output_sizes: Sequence[tuple[int, int]],
    limits: InferenceConfig,
    originals: Callable[[int], Tensor] | None = None,
) -> list[Made]:
    """What `make` gives for the detections of each image, in the order of the images; else as `find_instances`."""
    with torch.inference_mode():
        instances = find_instances(network, images, output_sizes=output_sizes, limits=limits, originals=originals)
        made = {detections.number: make(detections) for detections in instances}
    return [made[number] for number in range(len(images))]


def collected(detections: ImageDetections) -> Detections:
    """All detections of an image with their masks, on the CPU. Uses up `detections.masks`."""
    with torch.inference_mode(False):  # ordinary tensors, which a caller may change and differentiate
        boxes, scores, labels = (
            values.cpu().clone() for values in (detections.boxes_xyxy, detections.scores, detections.labels)
        )
        masks = torch.zeros(len(scores), *detections.output_hw, dtype=torch.bool)
    for mask, placed in zip(masks, detections.masks, strict=True):
        placed.write(mask)
    return Detections(boxes=boxes, scores=scores, labels=labels, masks=masks)


def coco_results(detections: ImageDetections, *, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One image's detections as COCO results: boxes xywh and RLE masks in output pixels, best first.

    Uses up `detections.masks`; masks become RLE one by one.
    """
    rles = [encode_placed(placed, detections.output_hw) for placed in detections.masks]
    scores, labels = detections.scores.tolist(), detections.labels.tolist()
    corners = detections.boxes_xyxy
    boxes_xywh = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(value, 3) for value in box],
            "score": score,
            "segmentation": rle,
        }
        for box, score, label, rle in zip(boxes_xywh, scores, labels, rles, strict=True)
    ]


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """(N, H, W) bool masks as COCO's compressed RLE with text counts."""
    return [encode_placed(PlacedMask(mask, 0, 0), (mask.shape[0], mask.shape[1])) for mask in masks.cpu()]


def encode_placed(placed: PlacedMask, size_hw: tuple[int, int]) -> dict[str, Any]:
    """What `rle_codec.encode` gives for the mask in its image, from its own pixels alone."""
    inside, (height, width) = placed.inside.cpu().numpy(), size_hw
    changes = np.zeros(0, dtype=np.int64)
    if inside.size:
        # Where a pixel differs from the one above it; above and below all is outside.
        differs = np.empty((len(inside) + 1, inside.shape[1]), dtype=bool)
        differs[0], differs[-1] = inside[0], inside[-1]
        np.not_equal(inside[1:], inside[:-1], out=differs[1:-1])
        row, column = np.divmod(np.flatnonzero(differs), inside.shape[1])
        changes = (placed.left + column) * height + placed.top + row
        changes.sort()  # RLE runs down the columns
        # Where the image ends with the mask, a run goes on in the next column.
        if (goes_on := np.flatnonzero(changes[1:] == changes[:-1])).size:
            changes = np.delete(changes, np.concatenate([goes_on, goes_on + 1]))
    counts = np.diff(changes, prepend=0, append=height * width)  # of pixels outside, inside, outside, ...
    if len(changes) and counts[-1] == 0:
        counts = counts[:-1]
    encoded = rle_codec.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}
