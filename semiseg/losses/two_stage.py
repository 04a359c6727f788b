"""The losses of a region detector, the same for every kind of supervision: both stages classify and move boxes.

Source: Faster R-CNN (Ren et al. 2015), section 3.1.2; torchvision's smooth L1 and its divisors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOSSES = ("objectness", "anchor_box", "classification", "box")
COUNTS = ("anchors", "images")  # what their denominators are made of: anchors drawn, images of the step
BETA = 1 / 9  # from where on a difference of deltas counts linearly


def anchor_losses(logits: Tensor, deltas: Tensor, wanted_deltas: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """Sums over S drawn anchors: `objectness`, and `anchor_box` of the positive ones.

    Args:
        logits: (S,); deltas, wanted_deltas: (S, 4), of which those of the background are without meaning.
        positive: (S,) bool.
    """
    logits, deltas = logits.float(), deltas.float()
    wanted = torch.where(positive[:, None], wanted_deltas, deltas.detach())
    return {
        "objectness": F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="sum"),
        "anchor_box": F.smooth_l1_loss(deltas, wanted, beta=BETA, reduction="sum"),
    }


def region_losses(
    logits: Tensor, deltas: Tensor, wanted_deltas: Tensor, label: Tensor, image: Tensor, num_images: int
) -> dict[str, Tensor]:
    """Sums over the images of the means over each one's regions: `classification`, and `box` of the positive regions.

    Args:
        logits: (K, C + 1), the background first.
        deltas: (K, C + 1, 4) for each class; wanted_deltas: (K, 4), those of the background without meaning.
        label: (K,) int64 in 0..C, 0 = background.
        image: (K,) int64, ascending.
    """
    number = torch.bincount(image, minlength=num_images).clamp(min=1).to(logits.dtype)
    share = (1 / number)[image]
    own = deltas[torch.arange(len(label), device=label.device), label]
    wanted = torch.where((label > 0)[:, None], wanted_deltas, own.detach())
    box = F.smooth_l1_loss(own, wanted, beta=BETA, reduction="none").sum(1)
    return {
        "classification": (F.cross_entropy(logits, label, reduction="none") * share).sum(),
        "box": (box * share).sum(),
    }
