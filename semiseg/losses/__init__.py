"""The losses, usable on their own: plain functions of tensors, whatever network the logits come from.

docs/API.md shows them in use; each function's docstring says shapes, frames and what is summed.
"""

from semiseg.losses.affinity import affinity_edges, colour_affinity, neighbour_inside
from semiseg.losses.boxinst import (
    box_cells,
    labelled_pairwise_loss,
    mask_projection_loss,
    pairwise_loss,
    projection_loss,
)
from semiseg.losses.detection import detection_losses, generalised_iou
from semiseg.losses.dice import dice_loss
from semiseg.losses.rays import polar_centreness, polar_iou_loss

__all__ = [
    "affinity_edges",
    "box_cells",
    "colour_affinity",
    "detection_losses",
    "dice_loss",
    "generalised_iou",
    "labelled_pairwise_loss",
    "mask_projection_loss",
    "neighbour_inside",
    "pairwise_loss",
    "polar_centreness",
    "polar_iou_loss",
    "projection_loss",
]
