"""The residual discriminator of StyleGAN2 with projected conditions.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020). Statistics of
the minibatch: Karras et al., "Progressive Growing of GANs" (ICLR 2018). Conditions: Miyato and
Koyama, "cGANs with Projection Discriminator" (ICLR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from synthcube.losses import wide
from synthcube.nets.conditioning import ConditionEmbedding
from synthcube.nets.equalized import EqualizedConv, EqualizedLinear, activate, halved
from synthcube.nets.growth import Growth
from synthcube.schema import ImageSpec


class ResidualDiscriminator(nn.Module):
    """Images to logits; each block halves every side down to the smallest size.

    Args:
        image: its size is that of the last stage.
        channels: of the features at each stage, the smallest size first.
        group_size: images whose spread is one more feature; 1 for none.
        grows: whether it also takes the images of earlier stages.
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
            _Block(rank, channels[stage + 1], channels[stage]) for stage in range(last)
        )
        dim = channels[0]
        voxels = math.prod(side // 2**last for side in image.size)
        self.conv = EqualizedConv(rank, dim + (group_size > 1), dim)
        self.features = EqualizedLinear(dim * voxels, dim)
        self.logit = EqualizedLinear(dim, 1)
        self.embedding = ConditionEmbedding(image.conditions, dim) if image.conditions else None

    def forward(self, image: torch.Tensor, values: torch.Tensor, growth: Growth) -> torch.Tensor:
        """(B, C, *size of the stage) and condition values (B, K) to (B,)."""
        stage, alpha = growth
        x: torch.Tensor = activate(self.from_image[str(stage)](image))
        if stage:
            x = self.blocks[stage - 1](x)
            if alpha < 1:
                smaller = activate(self.from_image[str(stage - 1)](halved(image)))
                x = torch.lerp(smaller, x, alpha)
        for number in reversed(range(stage - 1)):
            x = self.blocks[number](x)
        if self.group_size > 1:
            x = torch.cat([x, spread(x, self.group_size)], dim=1)
        x = activate(self.features(activate(self.conv(x)).flatten(1)))
        logit: torch.Tensor = self.logit(x)[:, 0]
        if self.embedding is not None:
            logit = logit + (self.embedding(values) * x).sum(dim=1) / math.sqrt(x.shape[1])
        return logit


class _Block(nn.Module):
    def __init__(self, rank: int, num_in: int, num_out: int) -> None:
        super().__init__()
        self.first = EqualizedConv(rank, num_in, num_in)
        self.second = EqualizedConv(rank, num_in, num_out, halve=True)
        self.skip = EqualizedConv(rank, num_in, num_out, kernel=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = activate(self.second(activate(self.first(x))))
        kept: torch.Tensor = self.skip(halved(x))
        return (changed + kept) * math.sqrt(0.5)


def spread(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """(B, C, *spatial) to (B, 1, *spatial): the mean standard deviation over an image's group.

    A group is the share of the batch nearest to `group_size`, and more than one image where there
    are more. Processes that share a batch compare their own images, and need not speak.
    """
    number = len(x)
    sizes = [size for size in range(2, number + 1) if number % size == 0] or [1]
    size = min(sizes, key=lambda each: abs(each - group_size))
    groups = wide(x).view(size, number // size, *x.shape[1:])
    deviation = (groups.var(dim=0, correction=0) + 1e-8).sqrt().flatten(1).mean(dim=1)
    shape = (number // size, 1, *(1,) * (x.ndim - 2))
    return deviation.to(x.dtype).view(shape).repeat(size, *(1,) * (x.ndim - 1)).expand(
        number, 1, *x.shape[2:]
    )  # fmt: skip
