"""Augmentations of a training image and what is known of its objects: colours, expansion, crops, quarter turns.

All are drawn from the sample's seed, the image's size and its boxes; no mask has a say in them. They make another image
of the same kind, a `View`, which is then resized and flipped like a stored one.

Frames: original = the stored image; window = a rectangle of its pixels, which may reach beyond it; view = the window
after its turn. Pixels beyond the image have the mean colour.
Source: SSD (Liu et al. 2016), section 2.2, for expansion, crops and colours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pycocotools import mask as rle_codec
from torch import Tensor
from torchvision.transforms.v2 import functional

from semiseg.structures.inputs import Supervision
from semiseg.structures.rasterise import outlines_to_rle

if TYPE_CHECKING:  # it takes what is defined here
    from semiseg.data.dataset import Instances, Mask

Crop = Literal["none", "random", "ssd"]
Window = tuple[int, int, int, int]  # x0, y0, x1, y1

SEEDS = 1 << 63  # beyond those of samples: what else is drawn for a sample stays the same
LEAST_IOU = (None, 0.1, 0.3, 0.7, 0.9, 0.0)  # SSD's: no crop, or one that has it with the box of an object
TRIALS, ROUNDS = 50, 20  # crops for each of these, and how many of these are drawn before the image stays whole
# torchvision's ranges of photometric distortion: of factors, and of the shift of the hue in turns
BRIGHTNESS, CONTRAST, SATURATION, HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)


@dataclass(frozen=True)
class View:
    """One choice of an augmentation for an image of a known size."""

    original_hw: tuple[int, int]
    window: Window
    _: KW_ONLY
    turns: int = 0  # quarter turns to the left
    colours: tuple[tuple[str, float], ...] = ()  # names in `_COLOURS` and how much, in their order
    fill: tuple[int, int, int] = (0, 0, 0)  # RGB, beyond the image
    least_box: float = 0.0  # objects of a smaller share of the view's width or height are dropped

    @property
    def size_hw(self) -> tuple[int, int]:
        x0, y0, x1, y1 = self.window
        return (y1 - y0, x1 - x0) if self.turns % 2 == 0 else (x1 - x0, y1 - y0)

    def image(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 of the original -> of the view."""
        rows, columns, there = self._overlap()
        part = image[:, rows, columns]
        if part.numel():
            for name, amount in self.colours:
                part = _COLOURS[name](part, amount)
        x0, y0, x1, y1 = self.window
        canvas = torch.tensor(self.fill, dtype=torch.uint8).expand(y1 - y0, x1 - x0, 3).contiguous().permute(2, 0, 1)
        canvas[:, there[0], there[1]] = part
        return torch.rot90(canvas, self.turns, (1, 2)) if self.turns else canvas  # no turn would be a copy

    def instances(self, found: Instances) -> Instances:
        """What is left of an image's objects, in pixels of the view.

        An object stays if its centre is in the window, its box cut at the border: to what is visible of an annotated
        mask, or as it is where there is none. (Where it is cut, nobody knows then how far the object reaches along the
        border: instances with a box alone become `Supervision.CUT`.) What is visible of others is a region in
        which nothing is learnt, as a crowd.
        """
        boxes, cut = self._visible(found.boxes_xyxy)
        centre_in = self._centre_in(found.boxes_xyxy)
        masks = [self._mask(mask) for mask in found.masks]
        for index, mask in zip(found.mask_instance, masks, strict=True):
            if cut[index] and found.supervision[index] == Supervision.MASK:
                boxes[index] = self._narrowed(boxes[index], mask)
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = centre_in & (sides >= self.least_box * np.array(self.size_hw[::-1])).all(1)
        kept &= ~cut | (sides > 0).all(1)
        crowds, _ = self._visible(found.crowd_boxes_xyxy)
        ignored = np.concatenate([crowds, boxes[~kept]])
        number, of_masks = np.cumsum(kept) - 1, [k for k, index in enumerate(found.mask_instance) if kept[index]]
        kinds = [
            Supervision.CUT if kind == Supervision.BOX and is_cut else kind
            for kind, is_cut in zip(found.supervision, cut, strict=True)
        ]
        given = [found.mask_known[k] for k in of_masks]
        return replace(
            found,
            boxes_xyxy=boxes[kept],
            labels=[label for label, keep in zip(found.labels, kept, strict=True) if keep],
            supervision=[int(kind) for kind, keep in zip(kinds, kept, strict=True) if keep],
            masks=[masks[k] for k in of_masks],
            mask_instance=[int(number[found.mask_instance[k]]) for k in of_masks],
            crowd_boxes_xyxy=ignored[(ignored[:, 2:] > ignored[:, :2]).all(1)],
            mask_weight=[found.mask_weight[k] for k in of_masks],
            mask_known=[None if each is None else self._raster(each) for each in given],
        )

    def bottom_rows(self, count: int) -> int:
        """How many of the view's rows at its bottom lie in the original's last `count` rows or below them."""
        assert count == 0 or self.turns == 0, "the configuration allows no turns of such images"
        below = self.window[3] - (self.original_hw[0] - count)
        return min(max(below, 0), self.size_hw[0]) if count else 0

    def _overlap(self) -> tuple[slice, slice, tuple[slice, slice]]:
        """The original's rows and columns in the window, and where they are in it."""
        (height, width), (x0, y0, x1, y1) = self.original_hw, self.window
        top, left = (min(max(start, 0), side) for start, side in ((y0, height), (x0, width)))
        bottom, right = max(min(y1, height), top), max(min(x1, width), left)
        there = (slice(top - y0, bottom - y0), slice(left - x0, right - x0))
        return slice(top, bottom), slice(left, right), there

    def _visible(self, boxes_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) of the original cut to the window, in pixels of the view, and which were (N,) bool.

        One that was not is as it was, be it beyond the image.
        """
        height, width = self.original_hw
        in_image = np.clip(boxes_xyxy, 0, np.array([width, height] * 2))
        x0, y0, x1, y1 = self.window
        visible = np.clip(in_image, np.array([x0, y0] * 2), np.array([x1, y1] * 2))
        cut = (visible != in_image).any(1)
        corners = self._points(np.where(cut[:, None], visible, boxes_xyxy).reshape(-1, 2, 2))
        return np.concatenate([corners.min(1), corners.max(1)], axis=1), cut

    def _centre_in(self, boxes_xyxy: np.ndarray) -> np.ndarray:
        """(N,) bool; any centre where the window is the whole image or more of it."""
        centres, (x0, y0, x1, y1) = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2, self.window
        height, width = self.original_hw
        if x0 <= 0 and y0 <= 0 and x1 >= width and y1 >= height:
            return np.ones(len(centres), dtype=np.bool_)
        inside: np.ndarray = ((centres > (x0, y0)) & (centres < (x1, y1))).all(1)
        return inside

    def _narrowed(self, box_xyxy: np.ndarray, mask: Mask) -> np.ndarray:
        """A box in pixels of the view as far as its mask reaches in it; without area where nothing is visible."""
        rle = mask if isinstance(mask, bytes) else outlines_to_rle([np.array(part) for part in mask], self.size_hw)
        x, y, width, height = rle_codec.toBbox({"size": list(self.size_hw), "counts": rle})
        narrowed: np.ndarray = np.clip(
            [x, y, x + width, y + height], np.tile(box_xyxy[:2], 2), np.tile(box_xyxy[2:], 2)
        )
        return narrowed

    def _mask(self, mask: Mask) -> Mask:
        if isinstance(mask, bytes):
            return self._raster(mask)
        return [self._points(np.reshape(part, (-1, 2))).reshape(-1).tolist() for part in mask]

    def _raster(self, rle: bytes) -> bytes:
        """The counts of an RLE on the view's raster; nothing is beyond the image."""
        x0, y0, x1, y1 = self.window
        if (y0, x0, y1, x1) == (0, 0, *self.original_hw) and not self.turns:
            return rle
        rows, columns, there = self._overlap()
        canvas = np.zeros((y1 - y0, x1 - x0), dtype=np.uint8)
        canvas[there] = rle_codec.decode({"size": list(self.original_hw), "counts": rle})[rows, columns]
        counts: bytes = rle_codec.encode(np.asfortranarray(np.rot90(canvas, self.turns)))["counts"]
        return counts

    def _points(self, points_xy: np.ndarray) -> np.ndarray:
        """(..., 2) of the original -> of the view."""
        x0, y0, x1, y1 = self.window
        x, y = points_xy[..., 0] - x0, points_xy[..., 1] - y0
        for side in (x1 - x0, y1 - y0, x1 - x0)[: self.turns]:  # the width before each quarter turn
            x, y = y, side - x
        return np.stack([x, y], axis=-1)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may be drawn for a training image; see `config.run.AugmentConfig`."""

    photometric: float = 0.0
    expand: float = 1.0
    crop: Crop = "none"
    crop_least: float = 0.3
    rotations: Sequence[int] = (0,)
    least_box: float = 0.0
    fill: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, size_hw: tuple[int, int], boxes_xyxy: np.ndarray, seed: int) -> View:
        """The view of an image with these boxes (N, 4) of objects, in its pixels."""
        generator = random.Random(seed + SEEDS)
        colours = self._colours(generator)
        canvas = self._expanded(size_hw, generator)
        if self.crop == "random":
            window = self._window(canvas, generator)
        else:
            window = self._ssd_window(canvas, boxes_xyxy, generator) if self.crop == "ssd" else canvas
        turns = self.rotations[int(generator.random() * len(self.rotations))] // 90
        return View(size_hw, window, turns=turns, colours=colours, fill=self.fill, least_box=self.least_box)

    def _colours(self, generator: random.Random) -> tuple[tuple[str, float], ...]:
        """Each with its probability; the contrast before or after saturation and hue."""
        drawn = {
            name: _between(generator, *limits)
            for name, limits in (
                ("brightness", BRIGHTNESS),
                ("contrast", CONTRAST),
                ("saturation", SATURATION),
                ("hue", HUE),
            )
            if generator.random() < self.photometric
        }
        if generator.random() < 0.5 and "contrast" in drawn:
            drawn["contrast"] = drawn.pop("contrast")  # to the end
        return tuple(drawn.items())

    def _expanded(self, size_hw: tuple[int, int], generator: random.Random) -> Window:
        """The image, or with probability 1/2 a canvas of up to `expand` times its sides around it."""
        height, width = size_hw
        if self.expand == 1 or generator.random() < 0.5:
            return (0, 0, width, height)
        ratio = _between(generator, 1, self.expand)
        more_x, more_y = int(width * ratio) - width, int(height * ratio) - height
        left, top = (int(generator.random() * (more + 1)) for more in (more_x, more_y))
        return (-left, -top, width + more_x - left, height + more_y - top)

    def _window(self, canvas: Window, generator: random.Random) -> Window:
        """Of each side at least `crop_least`, anywhere in the canvas."""
        ends = []
        for low, high in (canvas[::2], canvas[1::2]):
            length = max(1, int((high - low) * _between(generator, self.crop_least, 1)))
            start = low + int(generator.random() * (high - low - length + 1))
            ends.append((start, start + length))
        (x0, x1), (y0, y1) = ends
        return (x0, y0, x1, y1)

    def _ssd_window(self, canvas: Window, boxes_xyxy: np.ndarray, generator: random.Random) -> Window:
        """A window with the centre of an object, of height by width 1/2 to 2, and of the drawn IoU with an object."""
        centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
        for _ in range(ROUNDS if len(boxes_xyxy) else 0):
            least = LEAST_IOU[int(generator.random() * len(LEAST_IOU))]
            if least is None:
                return canvas
            for _ in range(TRIALS):
                window = self._window(canvas, generator)
                x0, y0, x1, y1 = window
                if not 0.5 <= (y1 - y0) / (x1 - x0) <= 2 or _ious(window, boxes_xyxy).max() < least:
                    continue
                if ((centres > (x0, y0)) & (centres < (x1, y1))).all(1).any():
                    return window
        return canvas


def _between(generator: random.Random, low: float, high: float) -> float:
    # random.random() is the one draw whose values Python promises to keep between versions.
    return low + (high - low) * generator.random()


def _ious(window: Window, boxes_xyxy: np.ndarray) -> np.ndarray:
    low, high = np.maximum(boxes_xyxy[:, :2], window[:2]), np.minimum(boxes_xyxy[:, 2:], window[2:])
    common = np.clip(high - low, 0, None).prod(1)
    own = (window[2] - window[0]) * (window[3] - window[1])
    areas = np.clip(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0, None).prod(1)
    ious: np.ndarray = common / (own + areas - common)
    return ious


def _contrast(image: Tensor, factor: float) -> Tensor:
    """As torchvision's, about the mean grey; that one's last bits depend on the number of threads."""
    mean = functional.rgb_to_grayscale(image).double().mean()  # a sum of whole numbers, exact
    changed: Tensor = image.double() * factor + mean * (1 - factor)
    return changed.clamp_(0, 255).to(torch.uint8)


_COLOURS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": functional.adjust_brightness,
    "contrast": _contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
}
