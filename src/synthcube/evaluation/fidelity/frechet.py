"""Frechet distance of two sets of features, as if both were normally distributed.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (NeurIPS 2017); Dowson and Landau,
"The Frechet distance between multivariate normal distributions" (1982).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Normal:
    """Mean and covariance of features."""

    mean: torch.Tensor
    """(D,), float64."""
    root: torch.Tensor
    """(D, r), float64: root @ root.T is the unbiased covariance."""


def normal(table: Array, rows: Ints) -> Normal:
    """Of these rows of (N, D), read in pieces; two passes in float64, so that no large mean
    swallows a variance."""
    mean = torch.zeros(table.shape[1], dtype=torch.float64)
    for piece in _pieces(table, rows):
        mean += piece.sum(dim=0)
    mean /= len(rows)
    freedom = max(1, len(rows) - 1)
    if len(rows) <= table.shape[1]:  # singular: its root is the data
        centred = torch.cat([piece - mean for piece in _pieces(table, rows)])
        return Normal(mean, centred.T / freedom**0.5)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for piece in _pieces(table, rows):
        centred = piece - mean
        covariance.addmm_(centred.T, centred)
    return Normal(mean, _root(covariance / freedom))


def frechet_distance(one: Normal, other: Normal) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0.

    The eigenvalues of S1 S2 are the squares of the singular values of root1.T root2, which is
    exact for singular covariances too and needs no square root of a matrix.
    """
    between = one.root.T @ other.root
    square = between @ between.T if len(between) < between.shape[1] else between.T @ between
    overlap = torch.linalg.eigvalsh(square).clamp_min(0).sqrt().sum()
    spread = one.root.square().sum() + other.root.square().sum() - 2 * overlap
    return max(0.0, float((one.mean - other.mean).square().sum() + spread))


def _pieces(table: Array, rows: Ints) -> Iterator[torch.Tensor]:
    for start in range(0, len(rows), _ROWS):
        yield torch.from_numpy(table[rows[start : start + _ROWS]].astype(np.float64))


def _root(covariance: torch.Tensor) -> torch.Tensor:
    root: torch.Tensor
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return root
    values, vectors = torch.linalg.eigh(covariance)  # a feature is constant
    return torch.mul(vectors, values.clamp_min(0).sqrt())
