"""Normalisation by name, over all processes where there are several, and under conditions.

Conditional normalisation: Dumoulin et al., "A Learned Representation for Artistic Style"
(ICLR 2017); de Vries et al., "Modulating Early Visual Processing by Language" (NeurIPS 2017).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synthcube.models.losses import at_least_float32

NormName = Literal["batch", "group", "instance"]
_OF_ONE_PROCESS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MOST_GROUPS, _FEWEST_IN_A_GROUP = 32, 4


def build_norm(
    name: NormName, channels: int, *, affine: bool = True, running: bool = True
) -> nn.Module:
    """A normalisation layer for (B, channels, *spatial), whatever the rank.

    `affine`: learn a scale and a shift for each channel, initialised as N(1, 0.02) and 0.
    `running`: keep the statistics without which a batch norm cannot be evaluated image by image.
    """
    norm: BatchNorm | nn.GroupNorm
    if name == "batch":
        norm = BatchNorm(channels, affine=affine, track_running_stats=running)
    else:
        groups = channels  # an instance norm is a group norm with a group for each channel
        if name == "group":
            groups = math.gcd(_MOST_GROUPS, max(channels // _FEWEST_IN_A_GROUP, 1), channels)
        norm = nn.GroupNorm(groups, channels, affine=affine)
    if affine:
        nn.init.normal_(norm.weight, 1.0, 0.02)
    return norm


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of any rank, over the batches of all processes as if they were one.

    torch.nn.SyncBatchNorm does the same, on GPUs only.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        """Any rank will do."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to the same."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed and torch.distributed.get_world_size() > 1):
            normalised: Tensor = super().forward(x)
            return normalised
        axes, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        wide = at_least_float32(x)
        count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        sums = _summed(torch.cat([wide.sum(axes), count]))
        number = sums[-1].detach()
        mean = sums[:-1] / number
        centred = wide - mean.view(shape)
        # Squares of what is centred: a difference of large squares would lose digits.
        variance = _summed(centred.square().sum(axes)) / number
        self._update(mean.detach(), variance.detach() * number / (number - 1).clamp(min=1))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.type_as(x)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None and self.num_batches_tracked is not None:
            share = 1 / self.num_batches_tracked  # of all batches alike
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def share_statistics(network: nn.Module) -> nn.Module:
    """Turn torch's batch norms in `network` into :class:`BatchNorm`, in place; returns it."""
    for module in network.modules():
        if type(module) in _OF_ONE_PROCESS:
            module.__class__ = BatchNorm
    return network


class ConditionalNorm(nn.Module):
    """A norm whose scale and shift are linear in an embedding of the conditions of length `dim`."""

    def __init__(self, name: NormName, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = build_norm(name, channels, affine=False)
        self.affine = nn.Linear(dim, 2 * channels)
        nn.init.normal_(self.affine.weight, 0.0, 0.02)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, C, *spatial) under (B, dim) to (B, C, *spatial)."""
        scale_and_shift = self.affine(embedded).view(x.shape[0], -1, *[1] * (x.ndim - 2))
        scale, shift = scale_and_shift.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class _Sum(torch.autograd.Function):
    """Sum over all processes; its gradient is summed too."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(None, gradient)


def _summed(value: Tensor) -> Tensor:
    apply: Any = _Sum.apply  # torch leaves it without types
    total: Tensor = apply(value)
    return total
