"""95% confidence intervals in which images of one subject count as one piece of evidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from synthcube.evaluation.arrays import Floats, Ints
from synthcube.evaluation.results import Measure

NORMAL_97_5 = 1.959964
"""97.5th percentile of the standard normal distribution."""
_RESAMPLES = 500
_AT_ONCE = 50


def mean_interval(values: Floats, subjects: Ints, seed: int) -> tuple[float, float] | None:
    """Interval of the mean of `values` (N,): percentile bootstrap over subjects.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993).

    Returns:
        None where there is only one subject.
    """
    _, owner = np.unique(subjects, return_inverse=True)
    num_subjects = int(owner.max()) + 1
    if num_subjects < 2:
        return None
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        drawn = rng.multinomial(num_subjects, np.full(num_subjects, 1 / num_subjects), _AT_ONCE)
        means.append((drawn @ sums) / (drawn @ counts))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def mean_measure(
    values: Floats, subjects: Ints, seed: int, *, real_baseline: float | None = None,
    reason: str = "",
) -> Measure:  # fmt: skip
    """The mean with its interval; with a reason where there is no value, or only one subject."""
    if not len(values):
        return Measure(None, real_baseline, count=0, reason=reason or "no case has a value")
    interval = mean_interval(values, subjects, seed)
    low, high = interval or (None, None)
    reason = reason or ("" if interval else "one subject: no interval")
    mean = float(values.mean())
    return Measure(mean, real_baseline, low, high, count=len(values), reason=reason or None)


def share_interval(hits: int, total: int) -> tuple[float, float]:
    """Exact interval of a share (Clopper and Pearson, Biometrika 1934), of independent images."""
    from scipy.stats import binomtest

    interval: Any = binomtest(hits, total).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)


def auc(positive: Floats, negative: Floats) -> float:
    """Probability that a positive scores above a negative one, ties counting half."""
    return float(_placements(positive, negative).mean())


def auc_interval(
    positive: Floats, negative: Floats, subjects: tuple[Ints, Ints]
) -> tuple[float, float]:
    """Interval of :func:`auc`: DeLong et al. (Biometrics 1988), with the images of one subject
    taken together as in Obuchowski (Biometrics 1997); clipped to [0, 1].

    Args:
        subjects: of each positive and of each negative score; no subject is in both.
    """
    above, below = _placements(positive, negative), 1 - _placements(negative, positive)
    area = float(above.mean())
    variance = _mean_variance(above - area, subjects[0]) + _mean_variance(below - area, subjects[1])
    if not variance:  # perfectly separated: as of as many draws that all agree
        num_subjects = min(len(np.unique(numbers)) for numbers in subjects)
        return share_interval(round(area * num_subjects), num_subjects)
    half = NORMAL_97_5 * math.sqrt(variance)
    return max(0.0, area - half), min(1.0, area + half)


def _placements(scores: Floats, others: Floats) -> Floats:
    """(N,): share of `others` below each score."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, side="left")
    level = np.searchsorted(ordered, scores, side="right") - below
    shares: Floats = (below + 0.5 * level) / len(others)
    return shares


def _mean_variance(residuals: Floats, subjects: Ints) -> float:
    """Variance of the mean, from the sums over subjects."""
    _, group = np.unique(subjects, return_inverse=True)
    sums = np.bincount(group, residuals)
    num_subjects = len(sums)
    return float((sums**2).sum() / len(residuals) ** 2 * num_subjects / max(1, num_subjects - 1))
