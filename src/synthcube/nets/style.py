"""The generator of StyleGAN2: mapping network, modulated convolutions, sum of images.

Karras et al., "A Style-Based Generator Architecture" (CVPR 2019) and "Analyzing and Improving the
Image Quality of StyleGAN" (CVPR 2020). Fading new sizes in: Karras et al., "Progressive Growing
of GANs" (ICLR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from synthcube.losses import wide
from synthcube.nets.conditioning import ConditionEmbedding
from synthcube.nets.equalized import (
    Blur,
    EqualizedLinear,
    activate,
    convolution,
    doubled,
    normalized,
)
from synthcube.nets.growth import Growth
from synthcube.schema import ConditionSpec, ImageSpec


class MappingNetwork(nn.Module):
    """From z and conditions to w, (B, dim) each; its layers learn a hundredth as fast."""

    def __init__(self, conditions: Sequence[ConditionSpec], dim: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = ConditionEmbedding(conditions, dim) if conditions else None
        sides = [2 * dim if conditions else dim] + [dim] * num_layers
        self.layers = nn.ModuleList(
            EqualizedLinear(num_in, dim, rate=0.01) for num_in in sides[:-1]
        )

    def forward(self, z: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """z (B, dim) and condition values (B, K), NaN where not known, to w, never in 16 bits."""
        with torch.autocast(z.device.type, enabled=False):
            x = normalized(z)
            if self.embedding is not None:
                # Embeddings start small: they are brought to about the length of z, and that of
                # what is not known, which may be zero, stays finite in its gradient.
                x = torch.cat([x, normalized(self.embedding(values), eps=1e-2)], dim=1)
            for layer in self.layers:
                x = activate(layer(x))
        return wide(x)


class ModulatedConv(nn.Module):
    """A convolution whose weights are scaled for each image by its style.

    Scaling input and output of one convolution is the same as one with weights of its own for
    each image. With `demodulate` the weights of each output channel have length 1, so that unit
    variance stays unit variance.

    Args:
        rank: spatial axes.
        num_in: channels of the input.
        num_out: channels of the output.
        dim: length of a style.
        double: whether every side becomes twice as long.
    """

    def __init__(
        self, rank: int, num_in: int, num_out: int, dim: int, *, kernel: int = 3,
        demodulate: bool = True, double: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.style = EqualizedLinear(dim, num_in, bias=1.0)
        self.weight = nn.Parameter(torch.randn(num_out, num_in, *(kernel,) * rank))
        self.scale = 1 / math.sqrt(num_in * kernel**rank)
        self.demodulate = demodulate
        # The transposed convolution makes sides of 2 n + 1, between zeros: the blur makes it 2 n,
        # and the gain makes up for the zeros.
        self.blur = Blur(rank, padding=1, gain=2) if double else None

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x (B, num_in, *spatial), w (B, dim) to (B, num_out, *spatial)."""
        axes = (1,) * (x.ndim - 2)
        weight = self.weight * self.scale
        with torch.autocast(x.device.type, enabled=False):
            style = self.style(w)  # (B, num_in)
            length = style.square() @ weight.square().flatten(2).sum(dim=2).T  # (B, num_out)
            factor = torch.rsqrt(length + 1e-8)
        x = self._convolved(x * style.to(x.dtype).view(*style.shape, *axes), weight)
        return x * factor.to(x.dtype).view(*factor.shape, *axes) if self.demodulate else x

    def _convolved(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.blur is None:
            return convolution(x)(x, weight, padding=weight.shape[-1] // 2)
        spread = convolution(x, transposed=True)(x, weight.transpose(0, 1), stride=2)
        blurred: torch.Tensor = self.blur(spread)
        return blurred


class StyledLayer(nn.Module):
    """Modulated convolution, noise of learned strength, bias, activation."""

    def __init__(
        self, rank: int, num_in: int, num_out: int, dim: int, *, double: bool = False
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv(rank, num_in, num_out, dim, double=double)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(num_out, *(1,) * rank))

    def forward(self, x: torch.Tensor, w: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x (B, C, *spatial), w (B, dim), noise (B, 1, *spatial of the result)."""
        x = self.conv(x, w)
        return activate(x + (self.noise_strength * noise + self.bias).to(x.dtype))


class ToImage(nn.Module):
    """What one size adds to the image."""

    def __init__(self, rank: int, num_in: int, num_out: int, dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(rank, num_in, num_out, dim, kernel=1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(num_out, *(1,) * rank))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x (B, C, *spatial), w (B, dim) to (B, image channels, *spatial) in w's precision."""
        made: torch.Tensor = self.conv(x, w).to(w.dtype) + self.bias
        return made


class StyleGenerator(nn.Module):
    """From styles and noise to images; every size adds to the doubled image of the one before.

    Args:
        image: its size is that of the last stage; each stage before has half the sides.
        channels: of the features at each stage, the smallest size first.
        dim: length of w.
    """

    def __init__(self, image: ImageSpec, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        rank, steps = image.rank, len(channels) - 1
        self.start = nn.Parameter(
            torch.randn(channels[0], *(side // 2**steps for side in image.size))
        )
        self.layers = nn.ModuleList([StyledLayer(rank, channels[0], channels[0], dim)])
        for num_in, num_out in pairwise(channels):
            self.layers.append(StyledLayer(rank, num_in, num_out, dim, double=True))
            self.layers.append(StyledLayer(rank, num_out, num_out, dim))
        self.to_image = nn.ModuleList(
            ToImage(rank, number, image.channels, dim) for number in channels
        )

    @property
    def num_styles(self) -> int:
        """One for each layer, and one more for the last image."""
        return len(self.layers) + 1

    def noise_shapes(self, stage: int) -> list[tuple[int, ...]]:
        """(1, *spatial) of the noise of each layer up to that stage."""
        sides = self.start.shape[1:]
        return [
            (1, *(side * 2 ** ((number + 1) // 2) for side in sides))
            for number in range(2 * stage + 1)
        ]

    def forward(
        self, w: torch.Tensor, noises: Sequence[torch.Tensor], growth: Growth
    ) -> torch.Tensor:
        """w (B, num_styles, dim), noises as in noise_shapes, to (B, C, *size of the stage).

        The range is [-1, 1] by training, not by force. At alpha 0 the image is the doubled one
        of the stage before.
        """
        styles = w.unbind(dim=1)
        x = self.layers[0](self.start.expand(w.shape[0], *self.start.shape), styles[0], noises[0])
        image: torch.Tensor = self.to_image[0](x, styles[1])
        for stage in range(1, growth.stage + 1):
            for number in (2 * stage - 1, 2 * stage):
                x = self.layers[number](x, styles[number], noises[number])
            added = self.to_image[stage](x, styles[2 * stage + 1])
            weight = growth.alpha if stage == growth.stage else 1.0
            image = doubled(image) + weight * added
        return image
