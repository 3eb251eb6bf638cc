"""Precision, recall, density and coverage: how far two sets of features fill the same space.

Kynkaanniemi et al., "Improved Precision and Recall Metric" (NeurIPS 2019); Naeem et al.,
"Reliable Fidelity and Diversity Metrics" (ICML 2020).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from synthcube.evaluation.neighbours import nearest

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

NAMES = ("precision", "recall", "density", "coverage")

_ROWS = 1024
_SLACK = 1e-5  # a copy of a neighbour lies on the sphere through it, and counts as inside


def radii(features: Array, subjects: Ints, k: int) -> Array:
    """(N,): the distance from each of (N, D) to the k-th nearest of other subjects; inf where
    there are fewer.

    Raises:
        ValueError: k is not between 1 and N - 1.
    """
    found, _ = nearest(features, features, k, exclude_self=True, owners=(subjects, subjects))
    return found[:, -1]


def precision_recall_density_coverage(
    real: Array, made: Array, radii_real: Array, radii_made: Array, k: int
) -> tuple[float, float, float, float]:
    """In the order of NAMES. Each point has a ball of its radius, from :func:`radii` of k.

    precision: share of `made` inside a ball of `real`, 0 to 1. recall: share of `real` inside a
    ball of `made`, 0 to 1. density: balls of `real` that a point of `made` lies in, over k; about
    1 for the same distribution, unbounded. coverage: share of the balls of `real` that hold a
    point of `made`, 0 to 1.
    """
    centre = real.mean(axis=0, dtype=np.float64)
    y = torch.from_numpy(made - centre)
    limit_real, limit_made = (
        torch.from_numpy(each.astype(np.float64)) * (1 + _SLACK)
        for each in (radii_real, radii_made)
    )
    tiny = 1e-7 * float(y.square().sum(dim=1).mean().sqrt())
    inside = torch.zeros(len(made), dtype=torch.int64)
    recalled = covered = 0
    for start in range(0, len(real), _ROWS):
        rows = slice(start, start + _ROWS)
        x = torch.from_numpy(real[rows] - centre)
        d = torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist") - tiny  # (rows, made)
        holds = d <= limit_real[rows, None]
        inside += holds.sum(dim=0)
        covered += int(holds.any(dim=1).sum())
        recalled += int((d <= limit_made).any(dim=1).sum())
    precision = float((inside > 0).double().mean())
    density = float(inside.sum()) / (k * len(made))
    return precision, recalled / len(real), density, covered / len(real)
