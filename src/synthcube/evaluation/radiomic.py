"""Classical features: statistics of intensities, gradients and co-occurring grey levels.

In the spirit of the radiomics that the Frechet Radiomic Distance uses (Konz et al., "Frechet
Radiomic Distance", Medical Image Analysis 2026), not the same features: none of its filters, and
no package beside torch. Every feature is brought to about [0, 1], so that none outweighs the
others.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

DIMENSION = 30
_PERCENTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_LEVELS = 16
# (rows, columns) to the second pixel of a pair: four directions at two distances
_OFFSETS = {step: ((0, step), (step, 0), (step, step), (step, -step)) for step in (1, 3)}


def radiomic_features(images: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) in [0, 1] to (N, DIMENSION); sides below 4 pixels are enlarged to 4."""
    if min(images.shape[2:]) < 4:
        images = functional.interpolate(images, size=[max(4, s) for s in images.shape[2:]])
    x = images[:, 0].float()
    co_occurrence = [_co_occurrence(x, offsets) for offsets in _OFFSETS.values()]
    return torch.cat([_intensity(x), _gradients(x), *co_occurrence], dim=1)


def _intensity(x: torch.Tensor) -> torch.Tensor:
    """(N, 12): moments, percentiles and entropy."""
    flat = x.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1).sqrt()
    scaled = centred / deviation.clamp_min(1e-6)[:, None]
    skewness, kurtosis = scaled.pow(3).mean(dim=1), scaled.pow(4).mean(dim=1)
    share = _histogram((flat * 32).long().clamp(0, 31), 32)
    entropy = -torch.special.xlogy(share, share).sum(dim=1) / math.log(32)
    points = torch.tensor(_PERCENTILES, device=x.device)
    percentiles = torch.quantile(flat, points, dim=1).T
    moments = [flat.mean(dim=1), deviation, torch.tanh(skewness / 4), torch.log1p(kurtosis) / 4]
    return torch.cat([torch.stack([*moments, entropy], dim=1), percentiles], dim=1)


def _gradients(x: torch.Tensor) -> torch.Tensor:
    """(N, 6): magnitude of the gradient and of the Laplacian."""
    rows, columns = torch.gradient(x, dim=(1, 2))
    magnitude = (rows.square() + columns.square()).sqrt().flatten(1)
    laplacian = (
        x[:, 1:-1, :-2] + x[:, 1:-1, 2:] + x[:, :-2, 1:-1] + x[:, 2:, 1:-1] - 4 * x[:, 1:-1, 1:-1]
    )
    points = torch.tensor([0.5, 0.9, 0.99], device=x.device)
    spread = magnitude.std(dim=1, unbiased=False)
    moments = [magnitude.mean(dim=1), spread, laplacian.abs().mean(dim=(1, 2))]
    quantiles = torch.quantile(magnitude, points, dim=1).T
    return torch.cat([torch.stack(moments, dim=1), quantiles], dim=1)


def _co_occurrence(x: torch.Tensor, offsets: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """(N, 6): the symmetric matrix over all offsets (Haralick et al., IEEE SMC 1973)."""
    levels = (x * _LEVELS).long().clamp(0, _LEVELS - 1)
    height, width = levels.shape[1:]
    pairs = []
    for down, right in offsets:
        left = max(0, -right)
        one = levels[:, : height - down, left : width - max(0, right)]
        other = levels[:, down:, left + right : width + min(0, right)]
        pairs.append((one * _LEVELS + other).flatten(1))
    p = _histogram(torch.cat(pairs, dim=1), _LEVELS**2).view(-1, _LEVELS, _LEVELS)
    p = (p + p.transpose(1, 2)) / 2
    i = torch.arange(_LEVELS, device=x.device, dtype=p.dtype)
    gap = (i[:, None] - i[None, :]).abs()
    mean = (p.sum(dim=2) * i).sum(dim=1)
    spread = (p.sum(dim=2) * i.square()).sum(dim=1) - mean.square()
    covariance = (p * (i[:, None] * i[None, :])).sum(dim=(1, 2)) - mean.square()
    # a constant image correlates with itself fully
    correlation = torch.where(spread > 1e-6, covariance / spread.clamp_min(1e-6), 1.0)
    features = [
        (p * gap.square()).sum(dim=(1, 2)) / (_LEVELS - 1) ** 2,
        (p * gap).sum(dim=(1, 2)) / (_LEVELS - 1),
        (p / (1 + gap.square())).sum(dim=(1, 2)),
        p.square().sum(dim=(1, 2)).sqrt(),
        correlation,
        -torch.special.xlogy(p, p).sum(dim=(1, 2)) / (2 * math.log(_LEVELS)),
    ]
    return torch.stack(features, dim=1)


def _histogram(values: torch.Tensor, bins: int) -> torch.Tensor:
    """(N, K) integers in [0, bins) to (N, bins) shares."""
    rows = torch.arange(len(values), device=values.device)[:, None] * bins
    counts = torch.bincount((values + rows).flatten(), minlength=len(values) * bins)
    return counts.view(-1, bins).float() / values.shape[1]
