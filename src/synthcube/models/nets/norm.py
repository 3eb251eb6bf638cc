"""Normalisation by name, over all processes where there are several, and steered by conditions.

Conditional normalisation: Dumoulin et al., "A Learned Representation for Artistic Style"
(ICLR 2017); de Vries et al., "Modulating Early Visual Processing by Language" (NeurIPS 2017).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from synthcube.losses import wide

NormName = Literal["batch", "group", "instance"]
_ALONE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MOST_GROUPS, _FEWEST_IN_A_GROUP = 32, 4


def build_norm(
    name: NormName, channels: int, *, affine: bool = True, running: bool = True
) -> nn.Module:
    """The layer of that name for (B, channels, *spatial), whatever the rank.

    Args:
        affine: learn a scale and a shift for each channel, started at N(1, 0.02) and 0.
        running: keep the running statistics of a batch norm, without which it cannot be
            evaluated image by image.
    """
    norm: Any
    if name == "batch":
        norm = BatchNorm(channels, affine=affine, track_running_stats=running)
    elif name == "group":
        groups = math.gcd(_MOST_GROUPS, max(channels // _FEWEST_IN_A_GROUP, 1))
        norm = nn.GroupNorm(math.gcd(groups, channels), channels, affine=affine)
    else:
        norm = nn.GroupNorm(channels, channels, affine=affine)
    if affine:
        nn.init.normal_(norm.weight, 1.0, 0.02)
    module: nn.Module = norm
    return module


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of any rank, over the batches of all processes as if they were one.

    torch.nn.SyncBatchNorm does the same, on GPUs only.
    """

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any rank will do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *spatial) to the same."""
        if not (self.training and _processes() > 1):
            alone: torch.Tensor = super().forward(x)
            return alone
        axes = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        large = wide(x)
        count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        sums = _summed(torch.cat([large.sum(axes), count]))
        number = sums[-1].detach()
        mean = sums[:-1] / number
        centred = large - mean.view(shape)
        # Squares of what is centred: a difference of large squares would lose digits.
        variance = _summed(centred.square().sum(axes)) / number
        self._follow(mean.detach(), variance.detach() * number / (number - 1).clamp(min=1))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        normed: torch.Tensor = y.type_as(x)
        return normed

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None and self.num_batches_tracked is not None:
            share = 1 / self.num_batches_tracked  # of all batches alike
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def share_statistics(module: nn.Module) -> None:
    """Make torch's batch norms in `module` those of all processes, in place."""
    for each in module.modules():
        if type(each) in _ALONE:
            each.__class__ = BatchNorm


def with_shared_norms(network: nn.Module) -> nn.Module:
    """The same network, its batch norms replaced by those over all processes."""
    for parent in list(network.modules()):
        for name, norm in parent.named_children():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            ours = BatchNorm(norm.num_features, eps=norm.eps, momentum=norm.momentum)
            ours.load_state_dict(norm.state_dict())
            parent.add_module(name, ours)
    return network


class ConditionalNorm(nn.Module):
    """A norm whose scale and shift are linear in an embedding of the conditions.

    Args:
        name: the norm.
        channels: channels of the images' features.
        dim: length of the embedding.
    """

    def __init__(self, name: NormName, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = build_norm(name, channels, affine=False)
        self.affine = nn.Linear(dim, 2 * channels)
        nn.init.normal_(self.affine.weight, 0.0, 0.02)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """(B, C, *spatial) under (B, dim) to (B, C, *spatial)."""
        steered = self.affine(embedded).view(x.shape[0], -1, *[1] * (x.ndim - 2))
        scale, shift = steered.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class _Sum(torch.autograd.Function):
    """Sum over all processes; a gradient of it is summed alike."""

    @staticmethod
    def forward(_: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(None, gradient)


def _summed(value: torch.Tensor) -> torch.Tensor:
    apply: Any = _Sum.apply  # torch leaves it without types
    total: torch.Tensor = apply(value)
    return total


def _processes() -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()
