"""The networks of StyleGAN2: equalised layers, generator, discriminator.

Karras et al., "A Style-Based Generator Architecture" (CVPR 2019) and "Analyzing and Improving the
Image Quality of StyleGAN" (CVPR 2020). Equalised learning rate, statistics of the minibatch, and
growing: Karras et al., "Progressive Growing of GANs" (ICLR 2018). Conditions of the discriminator:
Miyato and Koyama, "cGANs with Projection Discriminator" (ICLR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from synthcube.models.losses import at_least_float32
from synthcube.models.nets.conditioning import ConditionEmbedding
from synthcube.schema import ConditionSpec, ImageSpec

_TAPS = (0.125, 0.375, 0.375, 0.125)


class Growth(NamedTuple):
    """How far a network has grown: sizes up to `stage`, of which the last counts `alpha`."""

    stage: int
    alpha: float


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are standard normal and scaled when used.

    `bias` is the initial value; `rate` the learning rate relative to that of other layers.
    """

    def __init__(self, num_in: int, num_out: int, *, bias: float = 0.0, rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) / rate)
        self.bias = nn.Parameter(torch.full((num_out,), bias / rate))
        self.scale = rate / math.sqrt(num_in)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in) to (B, num_out)."""
        return functional.linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualizedConv(nn.Module):
    """An equalised convolution that keeps the size or, after a blur, halves it."""

    def __init__(
        self, rank: int, num_in: int, num_out: int, *, kernel: int = 3, halve: bool = False,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in, *(kernel,) * rank))
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None
        self.scale = 1 / math.sqrt(num_in * kernel**rank)
        self.blur = Blur(rank, padding=(kernel + 1) // 2) if halve else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, *spatial) to (B, num_out, *spatial), or to half of each side."""
        weight = self.weight * self.scale
        if self.blur is None:
            return convolution(x)(x, weight, self.bias, padding=weight.shape[-1] // 2)
        return convolution(x)(self.blur(x), weight, self.bias, stride=2)


class Blur(nn.Module):
    """[1, 3, 3, 1] along each axis, zero outside: every side becomes 2 * padding - 3 longer.

    `padding` are zeros before the first voxel and after the last; `gain` is a factor of each axis.
    """

    def __init__(self, rank: int, padding: int, gain: float = 1.0) -> None:
        super().__init__()
        self.rank, self.padding = rank, padding
        self.register_buffer("taps", torch.tensor(_TAPS) * gain, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to (B, C, *longer)."""
        channels, taps = x.shape[1], self.get_buffer("taps").to(x)
        # Axis by axis and channel by channel: on a CPU ten times faster than pooling three times.
        for axis in range(self.rank):
            shape, padding = [1] * self.rank, [0] * self.rank
            shape[axis], padding[axis] = len(taps), self.padding
            weight = taps.view(1, 1, *shape).expand(channels, 1, *shape).contiguous()
            x = convolution(x)(x, weight, padding=padding, groups=channels)
        return x


def convolution(x: Tensor, *, transposed: bool = False) -> Callable[..., Tensor]:
    """torch's convolution for as many axes as `x` has, (B, C, *spatial)."""
    name = "conv_transpose" if transposed else "conv"
    function: Callable[..., Tensor] = getattr(functional, f"{name}{x.ndim - 2}d")
    return function


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, scaled so that it about keeps the variance."""
    return functional.leaky_relu(x, 0.2) * math.sqrt(2)


def normalized(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Rows of (B, dim), each scaled to a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)


def doubled(x: Tensor) -> Tensor:
    """Images (B, C, *spatial) with every side twice as long, by linear interpolation.

    On the grid of twice the size, its weights are [1, 3, 3, 1] / 4.
    """
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return functional.interpolate(x, scale_factor=2, mode=mode, align_corners=False)


def halved(x: Tensor) -> Tensor:
    """Images (B, C, *spatial) with every side half as long: the mean of 2 along each axis."""
    pool: Callable[..., Tensor] = getattr(functional, f"avg_pool{x.ndim - 2}d")
    return pool(x, 2)


class ResidualDiscriminator(nn.Module):
    """The residual discriminator: images to logits, with every side halved at each stage.

    `image` is of the size of the last stage; if it `grows`, it takes those of earlier stages too.
    `channels` are those of the features at each stage, the smallest size first. The standard
    deviation of `group_size` images is one more feature; 1 for none.
    """

    def __init__(
        self, image: ImageSpec, channels: Sequence[int], *, group_size: int, grows: bool
    ) -> None:
        super().__init__()
        rank, last = image.rank, len(channels) - 1
        self.group_size = group_size
        self.from_image = nn.ModuleDict({
            str(stage): EqualizedConv(rank, image.channels, channels[stage], kernel=1)
            for stage in range(0 if grows else last, last + 1)
        })  # fmt: skip
        # blocks[i] leads from stage i + 1 to stage i
        self.blocks = nn.ModuleList(
            ResidualBlock(rank, channels[stage + 1], channels[stage]) for stage in range(last)
        )
        dim = channels[0]
        voxels = math.prod(side // 2**last for side in image.size)
        self.conv = EqualizedConv(rank, dim + (group_size > 1), dim)
        self.features = EqualizedLinear(dim * voxels, dim)
        self.logit = EqualizedLinear(dim, 1)
        self.embedding = ConditionEmbedding(image.conditions, dim) if image.conditions else None

    def forward(self, image: Tensor, values: Tensor, growth: Growth) -> Tensor:
        """(B, C, *size of the stage) and condition values (B, K) to (B,)."""
        stage, alpha = growth
        x: Tensor = activate(self.from_image[str(stage)](image))
        if stage:
            x = self.blocks[stage - 1](x)
            if alpha < 1:
                smaller = activate(self.from_image[str(stage - 1)](halved(image)))
                x = torch.lerp(smaller, x, alpha)
        for number in reversed(range(stage - 1)):
            x = self.blocks[number](x)
        if self.group_size > 1:
            x = torch.cat([x, minibatch_std(x, self.group_size)], dim=1)
        x = activate(self.features(activate(self.conv(x)).flatten(1)))
        logit: Tensor = self.logit(x)[:, 0]
        if self.embedding is not None:
            logit = logit + (self.embedding(values) * x).sum(dim=1) / math.sqrt(x.shape[1])
        return logit


class ResidualBlock(nn.Module):
    """Two convolutions beside a shorter way, at half of each side."""

    def __init__(self, rank: int, num_in: int, num_out: int) -> None:
        super().__init__()
        self.first = EqualizedConv(rank, num_in, num_in)
        self.second = EqualizedConv(rank, num_in, num_out, halve=True)
        self.skip = EqualizedConv(rank, num_in, num_out, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.skip(halved(x))
        return (activate(self.second(activate(self.first(x)))) + shortcut) * math.sqrt(0.5)


def minibatch_std(x: Tensor, group_size: int) -> Tensor:
    """Mean standard deviation over an image's group: (B, C, *spatial) to (B, 1, *spatial).

    The size of a group is the divisor of the batch that is nearest to `group_size`, and at least 2
    where there are as many images. Each process compares its own images only.
    """
    number = len(x)
    divisors = [size for size in range(2, number + 1) if number % size == 0] or [1]
    size = min(divisors, key=lambda divisor: abs(divisor - group_size))
    groups = at_least_float32(x).view(size, number // size, *x.shape[1:])
    deviation = (groups.var(dim=0, correction=0) + 1e-8).sqrt().flatten(1).mean(dim=1)
    of_image = deviation.to(x.dtype).repeat(size).view(number, *(1,) * (x.ndim - 1))
    return of_image.expand(number, 1, *x.shape[2:])


class MappingNetwork(nn.Module):
    """From z and conditions to w, (B, dim) each; its layers learn a hundredth as fast."""

    def __init__(self, conditions: Sequence[ConditionSpec], dim: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = ConditionEmbedding(conditions, dim) if conditions else None
        sides = [2 * dim if conditions else dim] + [dim] * num_layers
        layers = (EqualizedLinear(num_in, dim, rate=0.01) for num_in in sides[:-1])
        self.layers = nn.ModuleList(layers)

    def forward(self, z: Tensor, values: Tensor) -> Tensor:
        """z (B, dim) and condition values (B, K), NaN where not known, to w, never in 16 bits."""
        with torch.autocast(z.device.type, enabled=False):
            x = normalized(z)
            if self.embedding is not None:
                # Embeddings start small: they are brought to about the length of z. That of an
                # unknown value may be zero, and its gradient stays finite.
                x = torch.cat([x, normalized(self.embedding(values), eps=1e-2)], dim=1)
            for layer in self.layers:
                x = activate(layer(x))
        return at_least_float32(x)


class ModulatedConv(nn.Module):
    """A convolution whose weights are scaled for each image by its style.

    Scaling input and output of one convolution is the same as one with weights of its own for
    each image. With `demodulate` the weights of each output channel have length 1, so that unit
    variance stays unit variance. With `double` every side becomes twice as long. Styles are of
    length `dim`.
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

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, num_in, *spatial), w (B, dim) to (B, num_out, *spatial)."""
        axes = (1,) * (x.ndim - 2)
        weight = self.weight * self.scale
        with torch.autocast(x.device.type, enabled=False):
            style = self.style(w)  # (B, num_in)
            length = style.square() @ weight.square().flatten(2).sum(dim=2).T  # (B, num_out)
            factor = torch.rsqrt(length + 1e-8)
        x = x * style.to(x.dtype).view(*style.shape, *axes)
        if self.blur is None:
            x = convolution(x)(x, weight, padding=weight.shape[-1] // 2)
        else:
            x = self.blur(convolution(x, transposed=True)(x, weight.transpose(0, 1), stride=2))
        return x * factor.to(x.dtype).view(*factor.shape, *axes) if self.demodulate else x


class StyledLayer(nn.Module):
    """Modulated convolution, noise of learned strength, bias, activation."""

    def __init__(
        self, rank: int, num_in: int, num_out: int, dim: int, double: bool = False
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv(rank, num_in, num_out, dim, double=double)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(num_out, *(1,) * rank))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """x (B, C, *spatial), w (B, dim), noise (B, 1, *spatial of the result)."""
        x = self.conv(x, w)
        return activate(x + (self.noise_strength * noise + self.bias).to(x.dtype))


class ToImage(nn.Module):
    """From the features of one stage to what it adds to the image."""

    def __init__(self, rank: int, num_in: int, num_out: int, dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(rank, num_in, num_out, dim, kernel=1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(num_out, *(1,) * rank))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, C, *spatial), w (B, dim) to (B, image channels, *spatial) in w's precision."""
        added: Tensor = self.conv(x, w).to(w.dtype) + self.bias
        return added


class StyleGenerator(nn.Module):
    """From styles and noise to images; every size adds to the doubled image of the one before.

    `image` is of the size of the last stage; each stage before has half the sides. `channels` are
    those of the features at each stage, the smallest size first; `dim` is the length of w.
    """

    def __init__(self, image: ImageSpec, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        rank, steps = image.rank, len(channels) - 1
        start = [side // 2**steps for side in image.size]
        self.start = nn.Parameter(torch.randn(channels[0], *start))
        self.layers = nn.ModuleList([StyledLayer(rank, channels[0], channels[0], dim)])
        for num_in, num_out in pairwise(channels):
            self.layers.append(StyledLayer(rank, num_in, num_out, dim, double=True))
            self.layers.append(StyledLayer(rank, num_out, num_out, dim))
        to_image = (ToImage(rank, width, image.channels, dim) for width in channels)
        self.to_image = nn.ModuleList(to_image)

    @property
    def num_styles(self) -> int:
        """Styles of an image: one for each layer, and one more for the last ToImage."""
        return len(self.layers) + 1

    def noise_shapes(self, stage: int) -> list[tuple[int, ...]]:
        """Shape of the noise of each layer up to that stage, (1, *spatial)."""
        factors = [2 ** ((number + 1) // 2) for number in range(2 * stage + 1)]
        return [(1, *(side * factor for side in self.start.shape[1:])) for factor in factors]

    def forward(self, w: Tensor, noises: Sequence[Tensor], growth: Growth) -> Tensor:
        """w (B, num_styles, dim), noises as in noise_shapes, to (B, C, *size of the stage).

        The range is [-1, 1] by training, not by force. At alpha 0 the image is the doubled one
        of the stage before.
        """
        styles = w.unbind(dim=1)
        x = self.layers[0](self.start.expand(w.shape[0], *self.start.shape), styles[0], noises[0])
        image: Tensor = self.to_image[0](x, styles[1])
        for stage in range(1, growth.stage + 1):
            for number in (2 * stage - 1, 2 * stage):
                x = self.layers[number](x, styles[number], noises[number])
            added = self.to_image[stage](x, styles[2 * stage + 1])
            weight = growth.alpha if stage == growth.stage else 1.0
            image = doubled(image) + weight * added
        return image
