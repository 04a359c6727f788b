"""How well learned affinity and the colour rule tell the edges of validation objects, which nobody has trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from semiseg.data.loader import BatchLoader
from semiseg.engine.step import TrainStep
from semiseg.losses.learned import AffinityTargets
from semiseg.structures.inputs import Supervision

BINS = 400
LARGEST_LOGIT = 10.0
LARGEST_DISTANCE = 100.0  # of Lab colours; black and white are so far apart
CALIBRATION_BINS = 20  # of probabilities


def edge_quality(
    module: TrainStep, loader: BatchLoader, accelerator: Accelerator, *, groups: Mapping[str, Sequence[bool]]
) -> dict[str, dict[str, float]]:
    """AUC of both and the calibration of the branch, on edges at objects of each group of classes.

    An edge is an object's where it has an end in the object's box and none in that of a class outside the group.

    Args:
        module: with its branch; trained.
        loader: this process's share of the images, with the masks of all objects.
        groups: name -> of each class, whether it belongs to the group.

    Returns:
        Of each group that has edges of both kinds: `edges`, their number; `different`, the share in percent that
        separate; `learned_auc` and `colour_auc` in percent: how often a separating edge has the higher score, or the
        greater distance of colours, than another; `calibration_error` in percentage points: how far the branch's
        probabilities lie from what is true, as a mean over edges, by twentieths.
    """
    assert module.affinity is not None
    counts = torch.zeros(len(groups), 2, 2, BINS, dtype=torch.float64, device=accelerator.device)
    membership = torch.tensor([list(flags) for flags in groups.values()], device=accelerator.device)
    was_training = module.training
    module.eval()
    with torch.inference_mode(), accelerator.autocast():
        for on_host in loader:
            batch = on_host.to(accelerator.device)
            assert batch.targets is not None
            outputs = module.model(batch.images, batch.image_sizes_hw)
            own = torch.where(membership[:, batch.targets.labels], int(Supervision.MASK), int(Supervision.BOX))
            of_groups = [module.affinity_targets(batch, replace(batch.targets, supervision=kinds)) for kinds in own]
            colours = of_groups[0]  # the same for all
            features = module.model.mask_head.edge_features(outputs)
            logits = module.affinity(features, colours.lab, colours.distances).float()
            counts += torch.stack([_histograms(logits, edges) for edges in of_groups])
    module.train(was_training)
    counts = accelerator.reduce(counts, reduction="sum").cpu()
    return {name: _quality(*counts[number]) for number, name in enumerate(groups) if counts[number, 0].sum(1).all()}


def _histograms(logits: Tensor, edges: AffinityTargets) -> Tensor:
    """(2, 2, BINS): of the branch's logits and of colours' distances, of edges that do not separate and that do."""
    kind = edges.different[edges.known].long() * BINS
    learned = (logits[edges.known] / LARGEST_LOGIT + 1) / 2
    colour = edges.distances[edges.known] / LARGEST_DISTANCE
    bins = [(score * BINS).long().clamp(0, BINS - 1) + kind for score in (learned, colour)]
    return torch.stack([torch.bincount(each, minlength=2 * BINS).view(2, BINS) for each in bins])


def _quality(learned: Tensor, colour: Tensor) -> dict[str, float]:
    edges = learned.sum()
    logits = ((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * 2 - 1) * LARGEST_LOGIT
    expected = learned.sum(0) * logits.sigmoid()
    twentieth = (logits.sigmoid() * CALIBRATION_BINS).long()
    off = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, twentieth, expected - learned[1])
    values = {
        "edges": edges,
        "different": 100 * learned[1].sum() / edges,
        "learned_auc": 100 * _auc(learned),
        "colour_auc": 100 * _auc(colour),
        "calibration_error": 100 * off.abs().sum() / edges,
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def _auc(counts: Tensor) -> Tensor:
    """How often a score of the second row (2, BINS) is in a higher bin than one of the first; in the same one half."""
    lower = counts[0].cumsum(0) - counts[0] / 2
    return (counts[1] * lower).sum() / counts.sum(1).prod()
