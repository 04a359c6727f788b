"""The branch that predicts whether an edge separates instances, and the gate that says how far to believe it.

A part of the training alone: neither evaluated nor written with the model. Source: docs/METHOD.md, learned affinity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semiseg.models.norms import GroupNorm
from semiseg.models.upsample import aligned_upsample

CHANNELS = 16
GROUPS = 4
LAB_SCALE = 25.0  # brings Lab colours and their distances to the size of features
DISTANCE_SCALE, LARGEST_DISTANCE = 20.0, 3.0
RARE = -2.0  # first bias: most edges do not separate instances

WINDOW = 50  # steps over which the gate compares
FULL_GAIN = 0.3  # share of the colour rule's cross entropy that the branch has to save to replace it wholly


class AffinityBranch(nn.Module):
    """Features of the mask branch and colours of the cells -> for every edge the logit of "different".

    Class-agnostic. One logit for each pair of cells, see `losses.learned`.

    Attributes:
        sums: (5,) float64, decayed sums over the last steps: the branch's cross entropy before the update, and how
            often the colour rule gave which answer (`losses.learned.COLOUR_COUNTS`).

    Args:
        in_channels: of the features.
        factor: how many mask cells lie side by side in a cell of the features.
        edges: K / 2.
    """

    sums: Tensor

    def __init__(self, in_channels: int, *, factor: int, edges: int) -> None:
        super().__init__()
        self.factor = factor
        self.reduce = nn.Conv2d(in_channels, CHANNELS, kernel_size=1)
        self.colours = nn.Conv2d(3, CHANNELS, kernel_size=3, padding=1)
        self.tower = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(2 * CHANNELS, CHANNELS, kernel_size=3, padding=1),
            GroupNorm(GROUPS, CHANNELS),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, kernel_size=3, padding=1),
            GroupNorm(GROUPS, CHANNELS),
            nn.ReLU(),
        )
        self.logits = nn.Conv2d(CHANNELS + edges, edges, kernel_size=1)
        assert self.logits.bias is not None
        nn.init.constant_(self.logits.bias, RARE)
        self.register_buffer("sums", torch.zeros(5, dtype=torch.float64))

    def forward(self, features: Tensor, lab: Tensor, distances: Tensor) -> Tensor:
        """Logits (B, K / 2, h, w) of features (B, F, h / factor, w / factor) and of the mask grid's colours."""
        height, width = lab.shape[-2:]
        features = aligned_upsample(self.reduce(features), self.factor)[..., :height, :width]
        # In the features' layout: of two layouts every convolution would copy one
        channels_last = features.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        colours = self.colours((lab / LAB_SCALE).contiguous(memory_format=layout))
        x = self.tower(torch.cat([features, colours.to(features.dtype)], dim=1))
        near = (distances / DISTANCE_SCALE).clamp(max=LARGEST_DISTANCE).to(x.dtype)
        logits: Tensor = self.logits(torch.cat([x, near.contiguous(memory_format=layout)], dim=1))
        return logits

    @torch.no_grad()
    def observe(self, cross_entropy: Tensor, counts: Tensor) -> None:
        """Takes a step's sum of cross entropies, before its update, and its `COLOUR_COUNTS` (4,), of all processes."""
        self.sums.mul_(1 - 1 / WINDOW).add_(torch.cat([cross_entropy.double().view(1), counts.double()]))

    @torch.no_grad()
    def trust(self) -> Tensor:
        """How far the branch's labels replace colour's, in [0, 1]: a scalar on the device.

        1 - (the branch's cross entropy) / (that of the colour rule, each of its two answers taken for as sure as it
        has been), on edges that the branch had not learned from yet, as a share of `FULL_GAIN`. Without edges 0.
        """
        own, answers = self.sums[0], self.sums[1:].view(2, 2)  # alike or not, same or different
        sure = answers / answers.sum(1, keepdim=True).clamp(min=1e-9)
        colour = -(answers * sure.clamp(min=1e-9).log()).sum()
        gain = torch.where(colour > 0, 1 - own / colour.clamp(min=1e-9), 0.0)
        return (gain / FULL_GAIN).clamp(0, 1).float()
