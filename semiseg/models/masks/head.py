"""What a mask head is: the only place that knows how a mask is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from semiseg.models.detectors.fcos import neighbourhoods
from semiseg.models.norms import group_norm
from semiseg.structures.grids import MaskGrid
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs


class MaskHead(nn.Module, ABC):
    """From the levels of the pyramid and the features of the detector to the masks of the queries."""

    edge_channels: int | None = None  # of `edge_features`; None = this head has none
    edge_stride: int = 1  # input pixels per cell of theirs
    most_per_instance: int = 2**31  # queries of one in training, where more of them would ask for the same mask

    @abstractmethod
    def forward(self, levels: Mapping[int, Tensor], box_towers: Sequence[Tensor]) -> Any:
        """What masks are made from, which becomes `Outputs.mask_inputs`; the same in training and evaluation.

        Args:
            levels: (B, channels, h, w) of the pyramid, by stride.
            box_towers: (B, F', h, w) of each level at which the detector predicts, behind its box tower.
        """

    @abstractmethod
    def grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> MaskGrid:
        """Where the cells of the masks of N instances with these boxes (N, 4) stand; it follows from no prediction."""

    @abstractmethod
    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        """One mask per query, in their order, on `grid(queries.boxes_xyxy)`.

        Without queries the result is (0, h, w) and still on the graph of every parameter of this head, so that no
        process of several waits for a gradient that never comes.
        """

    def edge_features(self, outputs: Outputs) -> Tensor:
        """(B, `edge_channels`, h, w) of the whole images, of a forward in training, for learned affinity."""
        raise NotImplementedError(f"{type(self).__name__} has no features of the whole image")

    def distances(self, outputs: Outputs, queries: MaskQueries) -> Tensor:
        """(Q, rays) input pixels, how far the masks reach from the queried locations, of a head that predicts that.

        Without queries still on the graph of every parameter of this head.
        """
        raise NotImplementedError(f"{type(self).__name__} predicts no rays")

    @abstractmethod
    def freeze(self) -> None:
        """For a training that has no mask loss: nothing here is trained, nor computed in it where that is dear."""

    def compiled_parts(self) -> Sequence[nn.Module]:
        """The parts whose work follows from the size of the images alone."""
        return ()


def convolve_at(
    conv: nn.Conv2d, features: Tensor, outputs: Outputs, queries: MaskQueries, padded_hw: tuple[int, int]
) -> Tensor:
    """A 3x3 convolution at the queried locations alone: (Q, out).

    A few hundred of the many thousand locations: a product with the 3x3 features around each.

    Args:
        features: (B, R, channels), of all locations.
        padded_hw: height and width of the padded images in input pixels.
    """
    around, exists = neighbourhoods(outputs.locations, queries.location_index, padded_hw)
    patches = features[queries.image_index[:, None], around] * exists[:, :, None]  # (Q, 9, channels)
    return F.linear(patches.flatten(1), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def conv_layers(widths: Sequence[int], *, norm: str) -> nn.Sequential:
    """3x3 convolutions from each width to the next, with a norm ("none" or "gn") and ReLU behind each."""
    make_norm = group_norm if norm == "gn" else None
    return nn.Sequential(*(Conv2dNormActivation(*ends, norm_layer=make_norm) for ends in pairwise(widths)))
