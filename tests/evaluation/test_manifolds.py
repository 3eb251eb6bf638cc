"""Precision, recall, density and coverage against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from synthcube.evaluation.fidelity.manifolds import precision_recall_density_coverage, radii

RNG = np.random.default_rng(0)
K = 3


def measured(real: np.ndarray, made: np.ndarray, k: int = K) -> tuple[float, ...]:
    real, made = real.astype(np.float32), made.astype(np.float32)
    limits = [radii(each, np.arange(len(each)), k) for each in (real, made)]
    return precision_recall_density_coverage(real, made, *limits, k)


def by_definition(real: np.ndarray, made: np.ndarray, k: int = K) -> tuple[float, ...]:
    def radius(points: np.ndarray) -> np.ndarray:
        return np.sort(cdist(points, points), axis=1)[:, k]  # the first is the point itself

    d = cdist(real, made)
    in_real, in_made = d <= radius(real)[:, None], d <= radius(made)[None]
    return (
        in_real.any(0).mean(), in_made.any(1).mean(),
        in_real.sum() / (k * len(made)), in_real.any(1).mean(),
    )  # fmt: skip


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_they_are_their_definitions(shift, monkeypatch):
    monkeypatch.setattr("synthcube.evaluation.fidelity.manifolds._ROWS", 16)
    real, made = RNG.standard_normal((60, 5)), RNG.standard_normal((45, 5)) + shift
    assert measured(real, made) == pytest.approx(by_definition(real, made))


def test_the_same_images_are_everywhere():
    real = RNG.standard_normal((50, 6))
    precision, recall, density, coverage = measured(real, real)
    assert (precision, recall, coverage) == (1, 1, 1)
    # each lies in its own ball and in those of k others on average
    assert density == pytest.approx((K + 1) / K)


def test_images_elsewhere_are_nowhere():
    real = RNG.standard_normal((50, 6))
    assert measured(real, real + 100) == (0, 0, 0, 0)


def test_one_mode_of_two_is_precise_but_half_covered():
    left, right = RNG.standard_normal((40, 4)), RNG.standard_normal((40, 4)) + 50
    more = RNG.standard_normal((80, 4)) * 0.8
    precision, recall, _, coverage = measured(np.r_[left, right], more)
    assert precision > 0.8
    assert recall <= 0.5
    assert 0.4 < coverage <= 0.5


def test_density_of_the_same_distribution_is_about_one():
    real, made = RNG.standard_normal((2, 600, 3))
    assert measured(real, made)[2] == pytest.approx(1, abs=0.12)


def test_copies_lie_on_the_spheres_and_count_as_inside():
    """A prediction that is a real image is as far from its neighbour as that image is."""
    real = RNG.standard_normal((40, 64)).astype(np.float32) + 30
    assert measured(real, real[::2]) == pytest.approx(by_definition_inclusive(real, real[::2]))


def by_definition_inclusive(real: np.ndarray, made: np.ndarray) -> tuple[float, ...]:
    real, made = real.astype(np.float64), made.astype(np.float64)
    radius_real = np.sort(cdist(real, real), axis=1)[:, K] * (1 + 1e-9)
    radius_made = np.sort(cdist(made, made), axis=1)[:, K] * (1 + 1e-9)
    d = cdist(real, made)
    in_real = d <= radius_real[:, None]
    return (
        in_real.any(0).mean(), (d <= radius_made[None]).any(1).mean(),
        in_real.sum() / (K * len(made)), in_real.any(1).mean(),
    )  # fmt: skip


def test_slices_of_one_volume_are_no_neighbours():
    points = np.repeat(RNG.standard_normal((10, 4)), 5, axis=0).astype(np.float32)
    volumes = np.repeat(np.arange(10), 5)
    assert radii(points, np.arange(50), 4).max() == 0
    assert radii(points, volumes, 4).min() > 0
