"""Layers with an equalised learning rate, and resampling by two: what StyleGAN is made of.

Equalised learning rate: Karras et al., "Progressive Growing of GANs" (ICLR 2018), section 4.1.
Resampling by [1, 3, 3, 1]: Karras et al., "Analyzing and Improving the Image Quality of
StyleGAN" (CVPR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

_TAPS = (0.125, 0.375, 0.375, 0.125)
_MODES = {2: "bilinear", 3: "trilinear"}


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are standard normal and scaled when used.

    Args:
        num_in: length of the input.
        num_out: length of the output.
        bias: where the bias starts.
        rate: how much slower than the others these weights learn.
    """

    def __init__(self, num_in: int, num_out: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) / rate)
        self.bias = nn.Parameter(torch.full((num_out,), bias / rate))
        self.scale = rate / math.sqrt(num_in)
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, num_in) to (B, num_out)."""
        return functional.linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualizedConv(nn.Module):
    """A convolution that keeps the size or, blurred first, halves it; equalised as above."""

    def __init__(
        self, rank: int, num_in: int, num_out: int, *, kernel: int = 3, halve: bool = False,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in, *(kernel,) * rank))
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None
        self.scale = 1 / math.sqrt(num_in * kernel**rank)
        self.blur = Blur(rank, padding=(kernel + 1) // 2) if halve else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, num_in, *spatial) to (B, num_out, *spatial), or half of each side."""
        weight = self.weight * self.scale
        kernel = weight.shape[-1]
        if self.blur is None:
            return convolution(x)(x, weight, self.bias, padding=kernel // 2)
        return convolution(x)(self.blur(x), weight, self.bias, stride=2)


class Blur(nn.Module):
    """[1, 3, 3, 1] along each axis, zero outside: every side becomes 2 * padding - 3 longer.

    Args:
        rank: spatial axes.
        padding: zeros before the first voxel and after the last.
        gain: what the result is multiplied with along each axis.
    """

    def __init__(self, rank: int, padding: int, gain: float = 1.0) -> None:
        super().__init__()
        self.rank, self.padding = rank, padding
        self.register_buffer("taps", torch.tensor(_TAPS) * gain, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *spatial) to (B, C, *longer)."""
        channels, taps = x.shape[1], self.get_buffer("taps").to(x)
        # Axis by axis and channel by channel: on a CPU ten times faster than pooling three times.
        for axis in range(self.rank):
            shape, padding = [1] * self.rank, [0] * self.rank
            shape[axis], padding[axis] = len(taps), self.padding
            weight = taps.view(1, 1, *shape).expand(channels, 1, *shape).contiguous()
            x = convolution(x)(x, weight, padding=padding, groups=channels)
        return x


def convolution(x: torch.Tensor, *, transposed: bool = False) -> Callable[..., torch.Tensor]:
    """The convolution of torch for images such as `x`, (B, C, *spatial)."""
    name = "conv_transpose" if transposed else "conv"
    found: Callable[..., torch.Tensor] = getattr(functional, f"{name}{x.ndim - 2}d")
    return found


def activate(x: torch.Tensor) -> torch.Tensor:
    """Leaky ReLU, scaled so that the variance stays about what it was."""
    return functional.leaky_relu(x, 0.2) * math.sqrt(2)


def normalized(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Each row of (B, dim) scaled to a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """(B, C, *spatial) with every side twice as long, by linear interpolation.

    Those weights are [1, 3, 3, 1] / 4 on the grid of twice the size.
    """
    return functional.interpolate(x, scale_factor=2, mode=_MODES[x.ndim - 2], align_corners=False)


def halved(x: torch.Tensor) -> torch.Tensor:
    """(B, C, *spatial) with every side half as long: the mean of 2 along each axis."""
    pool: Callable[..., torch.Tensor] = getattr(functional, f"avg_pool{x.ndim - 2}d")
    return pool(x, 2)
