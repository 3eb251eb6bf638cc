"""95% confidence intervals in which images of one subject count as one piece of evidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from synthcube.evaluation.results import Measure

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_RESAMPLES = 500
_AT_ONCE = 50
_NORMAL = 1.959964  # 97.5th percentile of the standard normal


def mean_interval(values: Floats, subjects: Ints, seed: int) -> tuple[float, float] | None:
    """Of the mean of `values` (N,): percentile bootstrap over subjects; None for one subject.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993).
    """
    _, owner = np.unique(subjects, return_inverse=True)
    num = int(owner.max()) + 1
    if num < 2:
        return None
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        drawn = rng.multinomial(num, np.full(num, 1 / num), size=_AT_ONCE)
        means.append((drawn @ sums) / (drawn @ counts))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def mean_measure(
    values: Floats, subjects: Ints, seed: int, *, floor: float | None = None, reason: str = ""
) -> Measure:
    """The mean with its interval; a reason where there is nothing, or only one subject."""
    if not len(values):
        return Measure(None, floor=floor, count=0, reason=reason or "no case has a value")
    interval = mean_interval(values, subjects, seed)
    low, high = interval or (None, None)
    reason = reason or ("" if interval else "one subject: no interval")
    mean = float(values.mean())
    return Measure(mean, floor, low, high, count=len(values), reason=reason or None)


def share_interval(hits: int, total: int) -> tuple[float, float]:
    """Of a share, exact (Clopper and Pearson, Biometrika 1934), for independent images."""
    from scipy.stats import binomtest

    found: Any = binomtest(hits, total).proportion_ci(method="exact")
    return float(found.low), float(found.high)


def auc(positive: Floats, negative: Floats) -> float:
    """Probability that a positive scores above a negative one, ties counting half."""
    return float(_placements(positive, negative).mean())


def auc_interval(
    positive: Floats, negative: Floats, owners: tuple[Ints, Ints]
) -> tuple[float, float]:
    """Of :func:`auc`: DeLong et al. (Biometrics 1988), with the images of one subject taken
    together as in Obuchowski (Biometrics 1997); clipped to [0, 1].

    Args:
        owners: subject of each positive and of each negative score; no subject is in both.
    """
    above, below = _placements(positive, negative), 1 - _placements(negative, positive)
    area = float(above.mean())
    variance = _variance(above - area, owners[0]) + _variance(below - area, owners[1])
    if not variance:  # separated without an exception: as of as many draws of which all agree
        num = min(len(np.unique(each)) for each in owners)
        return share_interval(round(area * num), num)
    half = _NORMAL * math.sqrt(variance)
    return max(0.0, area - half), min(1.0, area + half)


def _placements(scores: Floats, others: Floats) -> Floats:
    """(N,): share of `others` below each score."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, side="left")
    level = np.searchsorted(ordered, scores, side="right") - below
    placed: Floats = (below + 0.5 * level) / len(others)
    return placed


def _variance(residuals: Floats, owner: Ints) -> float:
    """Of the mean, from the sums over subjects."""
    _, group = np.unique(owner, return_inverse=True)
    sums = np.bincount(group, residuals)
    num = len(sums)
    return float((sums**2).sum() / len(residuals) ** 2 * num / max(1, num - 1))
