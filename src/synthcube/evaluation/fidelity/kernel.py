"""Kernel distance: the unbiased squared maximum mean discrepancy of two sets of features.

Binkowski et al., "Demystifying MMD GANs" (ICLR 2018), with its cubic polynomial kernel
k(x, y) = (x.y / D + 1)^3. Without bias only if the two images of a pair are independent: pairs of
one subject, such as two slices of a volume, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Members = npt.NDArray[np.bool_]

_ROWS, _COLUMNS = 512, 4096


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """An estimate and the variance of its error."""

    value: float
    variance: float


def kernel_distances(
    made: Array, real: Array, subjects: tuple[Ints, Ints],
    samples: tuple[Members, Members, Members],
) -> tuple[list[KernelDistance], list[KernelDistance]]:  # fmt: skip
    """For each of R splits: of a sample of `made` from a half of `real`, and of the other half
    from that half. Every kernel is taken once, whatever the number of splits.

    Args:
        made: (N, D), float32; may be a memory map.
        real: (M, D), the same.
        subjects: of each row of both, (N,) and (M,); no subject is in two samples of a split.
        samples: (N, R), (M, R) and (M, R): the rows of the sample, the half and the other half.
    """
    chosen, half, other = samples
    splits = half.shape[1]
    of_made, _ = _sums(made, made, subjects[0], subjects[0], chosen, None)
    of_real, _ = _sums(real, real, subjects[1], subjects[1], np.hstack([half, other]), None)
    to_half, to_made = _sums(made, real, subjects[0], subjects[1], half, chosen)
    values, floors = [], []
    for r in range(splits):
        a, b, p = half[:, r], other[:, r], chosen[:, r]
        whole = _Side(of_real[a, r], subjects[1][a])
        rest = _Side(of_real[b, splits + r], subjects[1][b])
        picked = _Side(of_made[p, r], subjects[0][p])
        values.append(_distance(picked, to_half[p, r], whole, to_made[a, r]))
        floors.append(_distance(rest, of_real[b, r], whole, of_real[a, splits + r]))
    return values, floors


@dataclass(frozen=True, slots=True)
class _Side:
    sums: Floats  # (n,): of each row's kernels with those of other subjects in its own sample
    subjects: Ints  # (n,)


def _sums(
    x: Array, y: Array, of_x: Ints, of_y: Ints, in_y: Members, in_x: Members | None
) -> tuple[Floats, Floats]:
    """(N, R), (M, S): for each row of `x` its kernels with each sample of `y` added up, and the
    reverse; but for pairs of one subject. `of_x`, `of_y`: subjects."""
    rows_x = np.zeros((len(x), in_y.shape[1]))
    rows_y = np.zeros((len(y), 0 if in_x is None else in_x.shape[1]))
    members = torch.from_numpy(in_y.astype(np.float64))
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        block = torch.from_numpy(np.array(x[rows]))
        for first in range(0, len(y), _COLUMNS):
            columns = slice(first, first + _COLUMNS)
            other = torch.from_numpy(np.array(y[columns]))
            kernel = torch.addmm(torch.ones(()), block, other.T, alpha=1 / block.shape[1]) ** 3
            kernel[torch.from_numpy(of_x[rows, None] == of_y[None, columns])] = 0
            # float32 for the products, float64 for their sums, of which distances are differences
            exact = kernel.double()
            rows_x[rows] += (exact @ members[columns]).numpy()
            if in_x is not None:
                rows_y[columns] += (exact.T @ torch.from_numpy(in_x[rows].astype(float))).numpy()
    return rows_x, rows_y


def _distance(x: _Side, x_to_y: Floats, y: _Side, y_to_x: Floats) -> KernelDistance:
    """From sums over rows, with the variance of a jackknife over subjects of either side."""
    (whole_x, without_x), (whole_y, without_y) = _within(x), _within(y)
    between = x_to_y.sum() / (len(x_to_y) * len(y_to_x))
    without_x = without_x + whole_y - 2 * _between_without(x_to_y, x.subjects, len(y_to_x))
    without_y = without_y + whole_x - 2 * _between_without(y_to_x, y.subjects, len(x_to_y))
    variance = _jackknife(without_x) + _jackknife(without_y)
    return KernelDistance(float(whole_x + whole_y - 2 * between), variance)


def _within(side: _Side) -> tuple[float, Floats]:
    """Mean kernel over pairs of different subjects; the same without each subject, (G,)."""
    _, group = np.unique(side.subjects, return_inverse=True)
    sizes, sums = np.bincount(group), np.bincount(group, side.sums)
    number, total = len(side.sums), side.sums.sum()
    pairs = number**2 - (sizes**2).sum()
    without: Floats = (total - 2 * sums) / (pairs - 2 * sizes * (number - sizes))
    return float(total / pairs), without


def _between_without(sums: Floats, subjects: Ints, others: int) -> Floats:
    _, group = np.unique(subjects, return_inverse=True)
    left = (len(sums) - np.bincount(group)) * others
    without: Floats = (sums.sum() - np.bincount(group, sums)) / left
    return without


def _jackknife(without: Floats) -> float:
    """Efron and Stein, "The jackknife estimate of variance" (1981)."""
    number = len(without)
    return float((number - 1) / number * ((without - without.mean()) ** 2).sum())
