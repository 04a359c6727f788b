"""The normalisation layers that a configuration can name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from semiseg.config.model import Norm

MAX_GROUPS = 32


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's frozen batch norm (eps 1e-5), computed in one pass and in the type of its input.

    torchvision's forward multiplies by float32 buffers, which under autocast turns every activation of the backbone
    back into float32; it also makes two passes over the map instead of one.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, which also takes a group of one value: the cell of a small image, a channel for each group.

    torch refuses it, in evaluation too; the norm of one value is its bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn.enabled
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, cudnn)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or the largest power of two below that divides `channels`."""
    return GroupNorm(math.gcd(MAX_GROUPS, channels), channels)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Constructor, number of channels -> layer, of the norm that the configuration names.

    `bn` is local to a process, `sync_bn` shares its statistics over processes (GPU only), `gn` and `frozen_bn` do not
    depend on the batch, so that accumulation and data parallelism give the same numbers.
    """
    layers: dict[Norm, Callable[[int], nn.Module]] = {
        "bn": nn.BatchNorm2d,
        "sync_bn": nn.SyncBatchNorm,
        "gn": group_norm,
        "frozen_bn": FrozenNorm,
    }
    return layers[norm]


def freeze(module: nn.Module) -> nn.Module:
    """Stops the training of a module for good: no gradients, and batch norms become `FrozenNorm`.

    `requires_grad = False` alone would let batch norm go on updating its running statistics in training mode.

    Returns:
        The module itself, changed in place, or the layer that replaces it if it is a batch norm.
    """
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        frozen = FrozenNorm(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in list(module.named_children()):
        setattr(module, name, freeze(child))
    for parameter in module.parameters():
        parameter.requires_grad = False
    return module
