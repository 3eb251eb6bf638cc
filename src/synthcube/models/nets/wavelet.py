"""Haar wavelets: an image as smaller images of its frequency bands, and back, without loss.

The orthonormal transform of Haar (Mathematische Annalen 69, 1910), of every band at each level
(wavelet packets). White noise stays white and squared errors stay the same, so a diffusion or flow
of images and one of their bands are the same process: only the network changes, which then works
at half the resolution. Guth et al., "Wavelet Score-Based Generative Modeling" (NeurIPS 2022);
Friedrich et al., "WDM: 3D Wavelet Diffusion Models" (MICCAI workshop 2024).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

FEATURES = 4
"""Channels that a network on bands gives a :class:`Refinement` beside its bands."""
_SCALE = math.sqrt(0.5)


def bands_of(x: Tensor, levels: int) -> Tensor:
    """(B, C, *spatial) to its bands, (B, C * 2^(rank * levels), *spatial / 2^levels).

    Every side must be a multiple of 2^levels. The first C channels are the coarsest band, the mean
    of each block times the root of its number of voxels.
    """
    for _ in range(levels):
        for axis in range(2, x.ndim):
            even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.cat([even + odd, even - odd], dim=1) * _SCALE
    return x


def image_of(bands: Tensor, levels: int) -> Tensor:
    """What :func:`bands_of` was given."""
    x = bands
    for _ in range(levels):
        for axis in reversed(range(2, x.ndim)):
            low, high = x.chunk(2, dim=1)
            pairs = torch.stack([low + high, low - high], dim=axis + 1)
            x = pairs.flatten(axis, axis + 1) * _SCALE
    return x


class Refinement(nn.Module):
    """Three convolutions at full resolution that correct what comes out of :func:`image_of`.

    The transform makes each block of an image on its own. What a network has not learnt of the fine
    bands, most of all to pass the noise on, shows as a grid of such blocks. These layers see the
    noisy image itself, and over the edges of blocks. The last begins at zero: no correction.

    Args:
        rank: axes of an image, 2 or 3.
        in_channels: of the noisy images, with their sources.
        out_channels: of what is predicted.
        channels: of the layers between.
        embedding_size: length of an embedding of the time.
    """

    def __init__(
        self, rank: int, in_channels: int, out_channels: int, channels: int, embedding_size: int
    ) -> None:
        super().__init__()
        convolution = Conv[Conv.CONV, rank]
        self.stem = convolution(in_channels, channels, 3, padding=1)
        self.mix = convolution(channels + out_channels + FEATURES, channels, 3, padding=1)
        self.last = convolution(channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_size, 4 * channels)  # Perez et al., "FiLM" (2018)
        for weight in (*self.last.parameters(), *self.modulation.parameters()):
            nn.init.zeros_(weight)
        if rank == 3:  # up to a fifth less time for a step on a CPU
            layers: Any = self  # PyTorch's types lack this argument
            layers.to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor, predicted: Tensor, features: Tensor, embedding: Tensor) -> Tensor:
        """The correction, (B, out_channels, *spatial).

        Args:
            x: noisy images and sources, (B, in_channels, *spatial).
            predicted: (B, out_channels, *spatial).
            features: of the network on bands, (B, FEATURES, *spatial / 2^levels).
            embedding: of the time, (B, embedding_size).
        """
        modulation = self.modulation(nn.functional.silu(embedding))
        first, second = modulation.unflatten(1, (2, -1)).unbind(1)
        hidden = _modulated(self.stem(x), first)
        wide = nn.functional.interpolate(features, size=x.shape[2:])  # each voxel of a block alike
        hidden = _modulated(self.mix(torch.cat([hidden, predicted, wide], dim=1)), second)
        correction: Tensor = self.last(hidden)
        return correction


def _modulated(x: Tensor, modulation: Tensor) -> Tensor:
    """(B, C, *spatial), scaled and shifted by (B, 2 C), and through an activation."""
    scale, shift = modulation.view(*modulation.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
    return nn.functional.silu(x * (1 + scale) + shift)
