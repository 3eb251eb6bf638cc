"""Haar wavelets: an image as smaller images of its frequency bands, and back, without loss.

The orthonormal transform of Haar (Mathematische Annalen 69, 1910), of every band at each level
(wavelet packets). White noise stays white and squared errors stay the same, so a diffusion or flow
of images and one of their bands are the same process: only the network changes, which then works
at half the resolution. Guth et al., "Wavelet Score-Based Generative Modeling" (NeurIPS 2022);
Friedrich et al., "WDM: 3D Wavelet Diffusion Models" (MICCAI workshop 2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
