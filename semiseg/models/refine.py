"""Masks made better after the network, from the colours of the image: GrabCut in a box, and a dense CRF.

Both are a `Refiner`, and neither looks at a class or a score. GrabCut needs a box alone (it is the GrabCut row of the
paper's Table 5, and what SDI's pseudo masks are made by); the CRF is BBTP's (docs/METHOD.md, network).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from semiseg.config.model import RefinerName
from semiseg.errors import UserError
from semiseg.models.paste import MASK_THRESHOLD

# (image (3, H, W) uint8 RGB, boxes_xyxy (N, 4), probabilities (N, H, W) or None) -> masks (N, H, W) bool, on the device
# of the boxes; everything in the image's pixels.
Refiner = Callable[[Tensor, Tensor, Tensor | None], Tensor]

MARGIN = 0.25  # of a box's side: how far around it a crop reaches
GRABCUT_ITERATIONS = 5
GRABCUT_SIDE = 256  # pixels: longer crops are shrunk, which costs a hundredth of IoU on photographs for a fifth of time
LEAST_IOU = 0.15  # with the box: what GrabCut finds below that is not the object (SDI)

CRF_ITERATIONS = 5
CRF_SIDE = 96  # cells: a kernel of 96 x 96 has 85 million numbers
CRF_CLIP = 1e-5
LEAST_EXPONENT = -40.0
GAUSSIAN_WEIGHT, GAUSSIAN_PIXELS = 0.05, 3.0
BILATERAL_WEIGHT, BILATERAL_PIXELS, BILATERAL_COLOURS = 0.005, 60.0, 10.0


def build_refiner(name: RefinerName) -> Refiner | None:
    """The refiner of that name; a UserError if what it needs is not installed."""
    if name == "none":
        return None
    if name == "crf":
        return crf
    opencv()
    return grabcut


def opencv() -> Any:
    """The module cv2, which only GrabCut needs."""
    try:
        import cv2
    except ImportError:
        raise UserError("GrabCut needs OpenCV: pip install 'semiseg[grabcut]'") from None
    return cv2


def grabcut(image: Tensor, boxes_xyxy: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """GrabCut (Rother et al., 2004) begun from each box, without knowledge of the others; equal every time.

    A result that is empty or overlaps its box by less than an IoU of `LEAST_IOU`, and a box that leaves no background
    beside it, give the box. Probabilities are not looked at.
    """
    masks, _ = grabcut_or_box(image, boxes_xyxy)
    return torch.from_numpy(masks).to(boxes_xyxy.device)


def grabcut_or_box(image: Tensor, boxes_xyxy: Tensor) -> tuple[NDArray[np.bool_], list[bool]]:
    """`grabcut`'s masks (N, H, W), and of which of them the box had to stand in."""
    cv2 = opencv()
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    masks = np.zeros((len(boxes_xyxy), *pixels.shape[:2]), dtype=bool)
    corners = pixel_boxes(boxes_xyxy, (pixels.shape[0], pixels.shape[1]))
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:  # OpenCV lets other threads run
        found = list(pool.map(lambda job: _cut(cv2, pixels, *job), zip(corners, masks, strict=True)))
    return masks, [not each for each in found]


def pixel_boxes(boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Of each box the pixels whose centres it holds, at least one: x0, y0, x1, y1, half open, inside the image."""
    height, width = size_hw
    whole = torch.ceil(boxes_xyxy.double() - 0.5).long().tolist()
    return [
        (
            (left := min(max(x0, 0), width - 1)),
            (top := min(max(y0, 0), height - 1)),
            min(max(x1, left + 1), width),
            min(max(y1, top + 1), height),
        )
        for x0, y0, x1, y1 in whole
    ]


def crop_around(box: tuple[int, int, int, int], size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box with `MARGIN` of its sides around it, as far as the image goes."""
    across, down = round(MARGIN * (box[2] - box[0])), round(MARGIN * (box[3] - box[1]))
    height, width = size_hw
    return max(box[0] - across, 0), max(box[1] - down, 0), min(box[2] + across, width), min(box[3] + down, height)


def _cut(cv2: Any, pixels: NDArray[np.uint8], box: tuple[int, int, int, int], mask: NDArray[np.bool_]) -> bool:
    """Writes the object in a box into an empty mask; False where it is the box."""
    x0, y0, x1, y1 = crop_around(box, (mask.shape[0], mask.shape[1]))
    crop, inside = pixels[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    full_hw, longest = inside.shape, max(inside.shape)
    if longest > GRABCUT_SIDE:
        small_hw = [max(round(side * GRABCUT_SIDE / longest), 1) for side in full_hw]
        crop = cv2.resize(crop, small_hw[::-1], interpolation=cv2.INTER_AREA)
    scale_y, scale_x = (small / full for small, full in zip(crop.shape[:2], full_hw, strict=True))
    left, top = round((box[0] - x0) * scale_x), round((box[1] - y0) * scale_y)
    right, bottom = round((box[2] - x0) * scale_x), round((box[3] - y0) * scale_y)
    rectangle = (left, top, max(right - left, 1), max(bottom - top, 1))
    labels, found = np.zeros(crop.shape[:2], dtype=np.uint8), False
    if rectangle != (0, 0, crop.shape[1], crop.shape[0]):  # else there is no background to learn from
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)  # of this thread: its clusters begin at random
        cv2.grabCut(np.ascontiguousarray(crop), labels, rectangle, *models, GRABCUT_ITERATIONS, cv2.GC_INIT_WITH_RECT)
        object_ = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        if crop.shape[:2] != full_hw:
            object_ = cv2.resize(object_.astype(np.float32), full_hw[::-1], interpolation=cv2.INTER_LINEAR) > 0.5
        # The object lies in its box, so that its share of the box is their IoU.
        object_ &= _filled(box, (x0, y0), full_hw)
        found = bool(object_.sum() >= LEAST_IOU * (box[2] - box[0]) * (box[3] - box[1]))
    inside[:] = object_ if found else _filled(box, (x0, y0), full_hw)
    return found


def _filled(box: tuple[int, int, int, int], origin_xy: tuple[int, int], size_hw: tuple[int, ...]) -> NDArray[np.bool_]:
    filled = np.zeros(size_hw, dtype=bool)
    filled[box[1] - origin_xy[1] : box[3] - origin_xy[1], box[0] - origin_xy[0] : box[2] - origin_xy[0]] = True
    return filled


def crf(image: Tensor, boxes_xyxy: Tensor, probabilities: Tensor | None) -> Tensor:
    """BBTP's dense CRF of two labels, each instance by itself, from its probabilities.

    An image of up to `CRF_SIDE` pixels is looked at whole, and all instances share its kernel. In a larger one each
    has a crop around its box, of at most so many cells; outside of it the mask is what the probabilities say.
    """
    if probabilities is None:
        raise ValueError("the CRF begins with probabilities, a box alone has none")
    masks = probabilities > MASK_THRESHOLD
    height, width = image.shape[1:]
    image, probabilities = image.to(boxes_xyxy.device), probabilities.float()
    if max(height, width) <= CRF_SIDE:
        return _settled(image, probabilities, 1.0) > MASK_THRESHOLD if len(masks) else masks
    crops = [crop_around(box, (height, width)) for box in pixel_boxes(boxes_xyxy, (height, width))]
    sizes = [_at_most((y1 - y0, x1 - x0), CRF_SIDE) for x0, y0, x1, y1 in crops]
    # One memory for all kernels: a fresh one of 64 MB takes longer to get than to fill.
    room = image.new_empty(max((rows * columns for rows, columns in sizes), default=0) ** 2, dtype=torch.float32)
    for number, ((x0, y0, x1, y1), cells_hw) in enumerate(zip(crops, sizes, strict=True)):
        own = probabilities[number : number + 1, y0:y1, x0:x1]
        colours = _resized(image[:, y0:y1, x0:x1].float(), cells_hw)
        settled = _settled(colours, _resized(own, cells_hw), max(y1 - y0, x1 - x0) / max(cells_hw), room)
        masks[number, y0:y1, x0:x1] = _resized(settled, (y1 - y0, x1 - x0))[0] > MASK_THRESHOLD
    return masks


def _at_most(size_hw: tuple[int, int], longest: int) -> tuple[int, int]:
    """The size, made smaller in proportion where its longer side has more."""
    scale = min(longest / max(size_hw), 1.0)
    return max(round(size_hw[0] * scale), 1), max(round(size_hw[1] * scale), 1)


def _resized(maps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Maps (N, h, w), bilinear, each cell the mean of what it covers."""
    if maps.shape[1:] == size_hw:
        return maps
    return F.interpolate(maps[None], size=size_hw, mode="bilinear", antialias=True)[0]


def _settled(image: Tensor, probabilities: Tensor, stride: float, room: Tensor | None = None) -> Tensor:
    """Probabilities (N, h, w) after the mean field, on cells that are so many pixels apart."""
    kernel = crf_kernel(image.to(probabilities.dtype), stride=stride, room=room)
    return mean_field(probabilities.flatten(1), kernel).view_as(probabilities)


def crf_kernel(image: Tensor, *, stride: float = 1.0, room: Tensor | None = None) -> Tensor:
    """How strongly each two cells of an image (3, h, w) are bound: (h w, h w), symmetric, its diagonal 0.

    A cell stands for `stride` x `stride` pixels, so that both weights grow with its area. `room`: (at least (h w)^2,)
    numbers that are overwritten by the result.
    """
    height, width = image.shape[1:]
    x = stride * (torch.arange(width, dtype=image.dtype, device=image.device) - (width - 1) / 2)
    y = stride * (torch.arange(height, dtype=image.dtype, device=image.device) - (height - 1) / 2)
    places = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)
    colours = image.flatten(1).T - image.flatten(1).mean(1)  # a difference of great numbers would lose digits
    features = torch.cat([places / BILATERAL_PIXELS, colours / BILATERAL_COLOURS], dim=1)
    # -|a - b|^2 / 2 = a b - |a|^2 / 2 - |b|^2 / 2 as one product of matrices
    # and the logarithm of the weight
    half, ones = features.square().sum(1, keepdim=True) / -2, torch.ones_like(features[:, :1])
    left = torch.cat([features, half + math.log(BILATERAL_WEIGHT * stride**2), ones], dim=1)
    cells = height * width
    kernel = image.new_empty(cells, cells) if room is None else room[: cells**2].view(cells, cells)
    # Clamped where the result would be a denormal number, with which everything takes ten times as long.
    torch.mm(left, torch.cat([features, ones, half], dim=1).T, out=kernel).clamp_(min=2 * LEAST_EXPONENT).exp_()
    near_x, near_y = (
        (side[:, None] - side).square().div(-2 * GAUSSIAN_PIXELS**2).clamp(min=LEAST_EXPONENT).exp() for side in (x, y)
    )
    # The Gaussian of a place is that of its row times that of its column.
    kernel.view(height, width, height, width).addcmul_(
        near_y[:, None, :, None], near_x[None, :, None, :], value=GAUSSIAN_WEIGHT * stride**2
    )
    return kernel.fill_diagonal_(0)


def mean_field(probabilities: Tensor, kernel: Tensor, *, iterations: int = CRF_ITERATIONS) -> Tensor:
    """The mean field of two labels with a Potts cost: (N, n) probabilities of n cells, after so many updates at once.

    With p the probability of the one label, the other's being 1 - p, the sums over both labels are 2 K p - K 1.
    """
    clipped = probabilities.clamp(CRF_CLIP, 1 - CRF_CLIP)
    unary, total = torch.logit(clipped), kernel.sum(1)
    for _ in range(iterations):
        clipped = torch.sigmoid(unary + 2 * clipped @ kernel - total)  # the kernel is symmetric
    return clipped
