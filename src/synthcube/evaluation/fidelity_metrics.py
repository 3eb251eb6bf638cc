"""Metrics of two sets of features: Frechet distance, kernel distance, precision and recall.

- Frechet distance, as if both were normally distributed: Heusel et al., "GANs Trained by a Two
  Time-Scale Update Rule" (NeurIPS 2017); Dowson and Landau, "The Frechet distance between
  multivariate normal distributions" (1982).
- Kernel distance, the unbiased squared maximum mean discrepancy: Binkowski et al., "Demystifying
  MMD GANs" (ICLR 2018), with its cubic polynomial kernel k(x, y) = (x.y / D + 1)^3. Unbiased only
  if the two images of a pair are independent: pairs of one subject, such as two slices of a volume,
  are left out.
- Precision and recall: Kynkaanniemi et al., "Improved Precision and Recall Metric" (NeurIPS 2019);
  density and coverage: Naeem et al., "Reliable Fidelity and Diversity Metrics" (ICML 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from synthcube.evaluation.arrays import Array, Floats, Ints, Mask
from synthcube.evaluation.neighbours import nearest

PRECISION_RECALL = ("precision", "recall", "density", "coverage")

_FRECHET_ROWS = 2048
_KERNEL_ROWS, _KERNEL_COLUMNS = 512, 4096
_BALL_ROWS = 1024
_SLACK = 1e-5  # a copy of a neighbour lies on the sphere through it, and counts as inside


@dataclass(frozen=True, slots=True)
class NormalFit:
    """Mean and covariance of features."""

    mean: torch.Tensor  # (D,), float64
    root: torch.Tensor  # (D, r), float64: root @ root.T is the unbiased covariance


def fit_normal(table: Array, rows: Ints) -> NormalFit:
    """Mean and covariance of these rows of (N, D), read in blocks; two passes in float64, so that
    a large mean does not swallow a variance."""
    mean = torch.zeros(table.shape[1], dtype=torch.float64)
    for block in _blocks(table, rows):
        mean += block.sum(dim=0)
    mean /= len(rows)
    freedom = max(1, len(rows) - 1)
    if len(rows) <= table.shape[1]:  # singular: its root is the data
        centred = torch.cat([block - mean for block in _blocks(table, rows)])
        return NormalFit(mean, centred.T / freedom**0.5)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in _blocks(table, rows):
        centred = block - mean
        covariance.addmm_(centred.T, centred)
    covariance /= freedom
    root, failed = torch.linalg.cholesky_ex(covariance)
    if failed:  # a feature is constant
        values, vectors = torch.linalg.eigh(covariance)
        root = torch.mul(vectors, values.clamp_min(0).sqrt())
    return NormalFit(mean, root)


def _blocks(table: Array, rows: Ints) -> Iterator[torch.Tensor]:
    for start in range(0, len(rows), _FRECHET_ROWS):
        block = table[rows[start : start + _FRECHET_ROWS]]
        yield torch.from_numpy(block.astype(np.float64))


def frechet_distance(a: NormalFit, b: NormalFit) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0.

    The eigenvalues of S1 S2 are the squares of the singular values of root1.T root2, which is
    exact for singular covariances too and needs no square root of a matrix.
    """
    product = a.root.T @ b.root
    square = product @ product.T if len(product) < product.shape[1] else product.T @ product
    overlap = torch.linalg.eigvalsh(square).clamp_min(0).sqrt().sum()
    spread = a.root.square().sum() + b.root.square().sum() - 2 * overlap
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """An estimate and the variance of its error."""

    value: float
    variance: float


def kernel_distances(
    predictions: Array, labels: Array, subjects: tuple[Ints, Ints],
    samples: tuple[Mask, Mask, Mask],
) -> tuple[list[KernelDistance], list[KernelDistance]]:  # fmt: skip
    """Two distances for each of R splits: of a sample of `predictions` from a half of `labels`, and
    of the other half from that half. Each kernel is computed once, whatever the number of splits.

    Args:
        predictions: (N, D), float32; may be a memory map.
        labels: (M, D), the same.
        subjects: of each row of both, (N,) and (M,); no subject is in two samples of a split.
        samples: (N, R), (M, R) and (M, R): the rows of the sample, the half and the other half.
    """
    chosen, half, other = samples
    splits = half.shape[1]
    of_p, of_l = subjects
    p_to_p, _ = _kernel_sums(predictions, predictions, of_p, of_p, chosen, None)
    l_to_l, _ = _kernel_sums(labels, labels, of_l, of_l, np.hstack([half, other]), None)
    p_to_half, l_to_p = _kernel_sums(predictions, labels, of_p, of_l, half, chosen)
    values, baselines = [], []
    for r in range(splits):
        a, b, p = half[:, r], other[:, r], chosen[:, r]
        half_sample = _KernelSample(l_to_l[a, r], of_l[a])
        other_sample = _KernelSample(l_to_l[b, splits + r], of_l[b])
        prediction_sample = _KernelSample(p_to_p[p, r], of_p[p])
        values.append(_distance(prediction_sample, p_to_half[p, r], half_sample, l_to_p[a, r]))
        baselines.append(_distance(other_sample, l_to_l[b, r], half_sample, l_to_l[a, splits + r]))
    return values, baselines


@dataclass(frozen=True, slots=True)
class _KernelSample:
    sums: Floats  # (n,): of each row's kernels with those of other subjects in the same sample
    subjects: Ints  # (n,)


def _kernel_sums(
    x: Array, y: Array, of_x: Ints, of_y: Ints, in_y: Mask, in_x: Mask | None
) -> tuple[Floats, Floats]:
    """(N, R), (M, S): for each row of `x` the sum of its kernels with each sample of `y`, and the
    reverse; without pairs of one subject. `of_x`, `of_y`: subjects."""
    rows_x = np.zeros((len(x), in_y.shape[1]))
    rows_y = np.zeros((len(y), 0 if in_x is None else in_x.shape[1]))
    members = torch.from_numpy(in_y.astype(np.float64))
    for start in range(0, len(x), _KERNEL_ROWS):
        rows = slice(start, start + _KERNEL_ROWS)
        block = torch.from_numpy(np.array(x[rows]))
        for first in range(0, len(y), _KERNEL_COLUMNS):
            columns = slice(first, first + _KERNEL_COLUMNS)
            other = torch.from_numpy(np.array(y[columns]))
            kernel = torch.addmm(torch.ones(()), block, other.T, alpha=1 / block.shape[1]) ** 3
            kernel[torch.from_numpy(of_x[rows, None] == of_y[None, columns])] = 0
            # float32 for the products, float64 for their sums, of which distances are differences
            exact = kernel.double()
            rows_x[rows] += (exact @ members[columns]).numpy()
            if in_x is not None:
                rows_y[columns] += (exact.T @ torch.from_numpy(in_x[rows].astype(float))).numpy()
    return rows_x, rows_y


def _distance(x: _KernelSample, x_to_y: Floats, y: _KernelSample, y_to_x: Floats) -> KernelDistance:
    """The distance from sums over rows, with its variance by a jackknife over subjects (Efron and
    Stein, "The jackknife estimate of variance", 1981) of either side."""
    (all_x, without_x), (all_y, without_y) = _within(x), _within(y)
    between = x_to_y.sum() / (len(x_to_y) * len(y_to_x))
    without_x = without_x + all_y - 2 * _between_without(x_to_y, x.subjects, len(y_to_x))
    without_y = without_y + all_x - 2 * _between_without(y_to_x, y.subjects, len(x_to_y))
    variance = sum(
        float((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum())
        for values in (without_x, without_y)
    )
    return KernelDistance(float(all_x + all_y - 2 * between), variance)


def _within(sample: _KernelSample) -> tuple[float, Floats]:
    """Mean kernel over pairs of different subjects; the same without each subject, (G,)."""
    _, group = np.unique(sample.subjects, return_inverse=True)
    sizes, sums = np.bincount(group), np.bincount(group, sample.sums)
    number, total = len(sample.sums), sample.sums.sum()
    pairs = number**2 - (sizes**2).sum()
    without: Floats = (total - 2 * sums) / (pairs - 2 * sizes * (number - sizes))
    return float(total / pairs), without


def _between_without(sums: Floats, subjects: Ints, others: int) -> Floats:
    _, group = np.unique(subjects, return_inverse=True)
    pairs = (len(sums) - np.bincount(group)) * others
    without: Floats = (sums.sum() - np.bincount(group, sums)) / pairs
    return without


def radii(features: Array, subjects: Ints, k: int) -> Array:
    """(N,): the distance from each of (N, D) to the k-th nearest of other subjects; inf where
    there are fewer."""
    distances, _ = nearest(features, features, k, exclude_self=True, owners=(subjects, subjects))
    return distances[:, -1]


def precision_recall_density_coverage(
    labels: Array, predictions: Array, radii_labels: Array, radii_predictions: Array, k: int
) -> tuple[float, float, float, float]:
    """The numbers of PRECISION_RECALL. Each point has a ball of its radius, by :func:`radii` of k.

    precision: share of `predictions` inside a ball of `labels`, 0 to 1. recall: share of `labels`
    inside a ball of `predictions`, 0 to 1. density: balls of `labels` that a prediction lies in,
    over k; about 1 for the same distribution, unbounded. coverage: share of the balls of `labels`
    that hold a prediction, 0 to 1.
    """
    centre = labels.mean(axis=0, dtype=np.float64)
    y = torch.from_numpy(predictions - centre)
    limit_labels, limit_predictions = (
        torch.from_numpy(limits.astype(np.float64)) * (1 + _SLACK)
        for limits in (radii_labels, radii_predictions)
    )
    tiny = 1e-7 * float(y.square().sum(dim=1).mean().sqrt())
    inside = torch.zeros(len(predictions), dtype=torch.int64)
    recalled = covered = 0
    for start in range(0, len(labels), _BALL_ROWS):
        rows = slice(start, start + _BALL_ROWS)
        x = torch.from_numpy(labels[rows] - centre)
        d = torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist") - tiny
        holds = d <= limit_labels[rows, None]  # (rows, predictions)
        inside += holds.sum(dim=0)
        covered += int(holds.any(dim=1).sum())
        recalled += int((d <= limit_predictions).any(dim=1).sum())
    precision = float((inside > 0).double().mean())
    density = float(inside.sum()) / (k * len(predictions))
    return precision, recalled / len(labels), density, covered / len(labels)
