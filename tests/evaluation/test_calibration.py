"""The threshold lets through as many false alarms as it says."""

from __future__ import annotations

import numpy as np
import pytest

from synthcube.evaluation.copies.calibration import FEWEST, calibrated, share_measures


def test_no_more_false_alarms_than_allowed_on_average() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        found = calibrated(rng.normal(size=299), np.arange(299), 0.01, 0)
        assert found is not None
        shares.append(found.flagged(rng.normal(size=2000)).mean())
    assert np.mean(shares) == pytest.approx(0.01, abs=0.002)


def test_false_alarms_are_counted_between_subjects() -> None:
    """A subject whose images are all near is flagged by the others' threshold."""
    rng = np.random.default_rng(1)
    subjects = np.repeat(np.arange(20), 20)
    distances = rng.uniform(1, 2, 400)
    distances[:20] = rng.uniform(0.1, 0.2, 20)
    found = calibrated(distances, subjects, 0.01, 0)
    assert found is not None
    assert found.false_alarms >= 0.05
    assert "20 subjects" in found.reason


def test_few_images_or_one_subject_set_no_threshold() -> None:
    assert calibrated(np.arange(FEWEST - 1.0), np.arange(FEWEST - 1), 0.01, 0) is None
    assert calibrated(np.arange(50.0), np.zeros(50, int), 0.01, 0) is None
    few = calibrated(np.arange(50.0), np.arange(50), 0.01, 0)
    assert few is not None
    assert "99 are needed" in few.reason
    assert few.threshold == 0


def test_the_share_beyond_chance_leaves_the_false_alarms_out() -> None:
    found = calibrated(np.arange(1000.0), np.arange(1000), 0.05, 0)
    assert found is not None
    share, beyond = share_measures(np.arange(1000) < 240, found)
    assert share.value == 0.24
    chance = found.false_alarms
    assert beyond.value == pytest.approx((0.24 - chance) / (1 - chance))
    assert beyond.low < beyond.value < beyond.high
