"""Intervals against closed forms, and how often they hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, sem

from synthcube.evaluation.intervals import auc, auc_interval, mean_interval, mean_measure


def test_auc_is_that_of_mann_and_whitney() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 50) + 1.0, rng.integers(0, 9, 70) * 1.0
    expected = mannwhitneyu(positive, negative).statistic / (50 * 70)
    assert auc(positive, negative) == pytest.approx(expected)


def test_the_interval_of_an_auc_holds_19_times_in_20() -> None:
    rng = np.random.default_rng(1)
    owners = np.arange(60), np.arange(60)
    held = 0
    for _ in range(400):
        low, high = auc_interval(rng.normal(0.5, 1, 60), rng.normal(0, 1, 60), owners)
        held += low <= 0.638163 <= high  # of normals half a spread apart
    assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_many_images_of_few_subjects_make_a_wider_interval() -> None:
    rng = np.random.default_rng(2)
    subjects = np.repeat(np.arange(10), 20)
    scores = [(rng.normal(0, 1, 10)[subjects] + rng.normal(0, 0.1, 200)) for _ in range(2)]
    alone = auc_interval(*scores, (np.arange(200), np.arange(200)))
    together = auc_interval(*scores, (subjects, subjects))
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])


def test_perfect_separation_of_few_images_is_not_certain() -> None:
    low, high = auc_interval(np.arange(8) + 10.0, np.arange(8.0), (np.arange(8), np.arange(8)))
    assert high == 1
    assert low == pytest.approx(0.025 ** (1 / 8), abs=1e-3)


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(3).normal(5, 1, 400)
    low, high = mean_interval(values, np.arange(400), 0)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert (high - low) / 2 == pytest.approx(1.96 * sem(values), rel=0.15)
    assert mean_interval(values, np.arange(400), 0) == (low, high)
    grouped = mean_interval(values, np.repeat(np.arange(4), 100), 0)
    assert grouped is not None
    assert mean_interval(values, np.zeros(400, int), 0) is None
    assert "one subject" in mean_measure(values, np.zeros(400, int), 0).reason
