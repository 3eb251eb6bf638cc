"""Frechet and kernel distance, precision and recall against other implementations and definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.fid import get_fid_score
from scipy.spatial.distance import cdist
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_kernel, poly_mmd

from synthcube.evaluation.fidelity_metrics import (
    frechet_distance,
    kernel_distances,
    precision_recall_density_coverage,
    radii,
)

FRECHET_RNG = np.random.default_rng(0)


def correlated(rows: int, length: int, spread: float = 1.0, shift: float = 0.0) -> np.ndarray:
    mixing = FRECHET_RNG.standard_normal((length, length)) / length**0.5
    return (FRECHET_RNG.standard_normal((rows, length)) @ mixing * spread + shift).astype(
        np.float32
    )


def distance(one: np.ndarray, other: np.ndarray) -> float:
    both = (normal(each, np.arange(len(each))) for each in (one, other))
    return frechet_distance(*both)


# MONAI 1.6 calls scipy's square root in its old way
@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
@pytest.mark.parametrize("rows", [(300, 200), (40, 31), (10, 300), (10, 12), (33, 32)])
def test_frechet_it_is_that_of_monai_and_torchmetrics(rows):
    """Above, below and at as many rows as features."""
    one, other = correlated(rows[0], 32, 1.5, 0.3), correlated(rows[1], 32)
    x, y = (torch.from_numpy(each).double() for each in (one, other))
    of_torchmetrics = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert distance(one, other) == pytest.approx(float(of_torchmetrics), rel=1e-5)
    if min(rows) > 32:  # scipy's square root of a singular matrix is a rough one
        assert distance(one, other) == pytest.approx(float(get_fid_score(x, y)), rel=1e-6)


def test_frechet_it_is_the_closed_form_of_two_normal_distributions():
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 1.0]).double()
    shift = torch.tensor([1.0, 0.0, -2.0]).double()
    one, other = Normal(torch.zeros(3).double(), a.diag()), Normal(shift, b.diag())
    assert frechet_distance(one, other) == pytest.approx(5 + 1 + 0 + 4)


def test_frechet_many_samples_come_near_to_the_closed_form():
    one = FRECHET_RNG.standard_normal((20_000, 4)).astype(np.float32)
    other = (FRECHET_RNG.standard_normal((20_000, 4)) * 2 + 1).astype(np.float32)
    assert distance(one, other) == pytest.approx(4 * (1 + 1), rel=0.05)


def test_frechet_a_set_is_at_distance_zero_from_itself():
    for one in (correlated(50, 8), correlated(5, 8)):
        assert distance(one, one[::-1].copy()) == pytest.approx(0, abs=1e-6)


def test_frechet_a_constant_feature_changes_nothing():
    one, other = correlated(60, 8), correlated(60, 8, 2)
    padded = [np.c_[each, np.full(60, 7, np.float32)] for each in (one, other)]
    assert distance(*padded) == pytest.approx(distance(one, other), rel=1e-6)


def test_frechet_a_large_mean_swallows_no_variance():
    one, other = correlated(500, 4), correlated(500, 4, 3)
    far = [(each + 4096).astype(np.float32) for each in (one, other)]
    assert distance(*far) == pytest.approx(distance(one, other), rel=1e-3)


def test_frechet_pieces_are_put_together(monkeypatch):
    one, other = correlated(100, 6), correlated(90, 6, 2)
    whole = distance(one, other)
    monkeypatch.setattr("synthcube.evaluation.fidelity.frechet._ROWS", 7)
    assert distance(one, other) == pytest.approx(whole, rel=1e-10)


KERNEL_RNG = np.random.default_rng(0)


def table(rows: int, length: int = 8, shift: float = 0.0) -> np.ndarray:
    return (KERNEL_RNG.standard_normal((rows, length)) + shift).astype(np.float32)


def column(rows: int, chosen: np.ndarray) -> np.ndarray:
    members = np.zeros((rows, 1), bool)
    members[chosen] = True
    return members


def two(made: np.ndarray, real: np.ndarray, m: int, subjects=None):
    """The distance of the first m of `made` from the first m of `real`, and of its next m."""
    parts = (np.arange(m), np.arange(m), np.arange(m, 2 * m))
    samples = tuple(
        column(len(rows), part) for rows, part in zip((made, real, real), parts, strict=True)
    )
    owners = subjects or (np.arange(len(made)), len(made) + np.arange(len(real)))
    values, floors = kernel_distances(made, real, owners, samples)
    return values[0], floors[0]


@pytest.mark.parametrize("pieces", [(512, 4096), (7, 11)])
def test_kernel_it_is_that_of_torchmetrics(monkeypatch, pieces):
    monkeypatch.setattr("synthcube.evaluation.fidelity.kernel._ROWS", pieces[0])
    monkeypatch.setattr("synthcube.evaluation.fidelity.kernel._COLUMNS", pieces[1])
    made, real = table(50, shift=0.5), table(70)
    value, floor = two(made, real, 30)
    x, y, other = (torch.from_numpy(each) for each in (made[:30], real[:30], real[30:60]))
    assert value.value == pytest.approx(float(poly_mmd(y, x)), rel=1e-4)
    assert floor.value == pytest.approx(float(poly_mmd(y, other)), rel=1e-3, abs=1e-5)


def test_kernel_many_splits_at_once_are_those_one_by_one():
    made, real = table(40, shift=0.3), table(60)
    owners = (np.arange(40), 100 + np.arange(60))
    orders = [KERNEL_RNG.permutation(60) for _ in range(3)]
    parts = [(KERNEL_RNG.permutation(40)[:20], order[:20], order[20:40]) for order in orders]
    samples = [tuple(column(n, split[i]) for i, n in enumerate((40, 60, 60))) for split in parts]
    together = kernel_distances(
        made, real, owners, tuple(np.hstack([each[i] for each in samples]) for i in range(3))
    )
    for r, alone in enumerate(samples):
        values, floors = kernel_distances(made, real, owners, alone)
        assert together[0][r].value == pytest.approx(values[0].value, rel=1e-9)
        assert together[1][r].value == pytest.approx(floors[0].value, rel=1e-9)
        assert together[0][r].variance == pytest.approx(values[0].variance, rel=1e-9)


def test_kernel_it_has_no_bias_and_its_variance_is_that_of_many_trials():
    trials = [two(table(20, shift=0.5), table(40), 20) for _ in range(400)]
    values = np.array([value.value for value, _ in trials])
    floors = np.array([floor.value for _, floor in trials])
    # E k(x, y) of the cubic kernel for these normal distributions, from many samples
    x, y = (torch.from_numpy(table(3000, shift=shift)) for shift in (0.5, 0.0))
    x_2, y_2 = (torch.from_numpy(table(3000, shift=shift)) for shift in (0.5, 0.0))
    truth = poly_kernel(x, x_2).mean() + poly_kernel(y, y_2).mean() - 2 * poly_kernel(x, y).mean()
    error = values.std() / 20
    assert values.mean() == pytest.approx(float(truth), abs=4 * error)
    assert abs(floors.mean()) < 4 * floors.std() / 20
    told = np.mean([value.variance for value, _ in trials])
    assert told == pytest.approx(values.var(), rel=0.35)


def test_kernel_images_of_one_subject_add_no_bias():
    """Ten noisy copies of each of 12 images: pairs of copies are left out."""

    def copies() -> np.ndarray:
        return np.repeat(table(12), 10, axis=0) + 0.05 * table(120)

    owners = (np.repeat(np.arange(12), 10), 12 + np.repeat(np.arange(24), 10))
    floors = []
    for _ in range(60):
        value, _ = two(copies(), np.r_[copies(), copies()].astype(np.float32), 120, owners)
        floors.append(value.value)
    assert abs(np.mean(floors)) < 4 * np.std(floors) / 60**0.5


BALL_RNG = np.random.default_rng(0)
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
def test_precision_recall_they_are_their_definitions(shift, monkeypatch):
    monkeypatch.setattr("synthcube.evaluation.fidelity.manifolds._ROWS", 16)
    real, made = BALL_RNG.standard_normal((60, 5)), BALL_RNG.standard_normal((45, 5)) + shift
    assert measured(real, made) == pytest.approx(by_definition(real, made))


def test_precision_recall_the_same_images_are_everywhere():
    real = BALL_RNG.standard_normal((50, 6))
    precision, recall, density, coverage = measured(real, real)
    assert (precision, recall, coverage) == (1, 1, 1)
    # each lies in its own ball and in those of k others on average
    assert density == pytest.approx((K + 1) / K)


def test_precision_recall_images_elsewhere_are_nowhere():
    real = BALL_RNG.standard_normal((50, 6))
    assert measured(real, real + 100) == (0, 0, 0, 0)


def test_precision_recall_one_mode_of_two_is_precise_but_half_covered():
    left, right = BALL_RNG.standard_normal((40, 4)), BALL_RNG.standard_normal((40, 4)) + 50
    more = BALL_RNG.standard_normal((80, 4)) * 0.8
    precision, recall, _, coverage = measured(np.r_[left, right], more)
    assert precision > 0.8
    assert recall <= 0.5
    assert 0.4 < coverage <= 0.5


def test_precision_recall_density_of_the_same_distribution_is_about_one():
    real, made = BALL_RNG.standard_normal((2, 600, 3))
    assert measured(real, made)[2] == pytest.approx(1, abs=0.12)


def test_precision_recall_copies_lie_on_the_spheres_and_count_as_inside():
    """A prediction that is a real image is as far from its neighbour as that image is."""
    real = BALL_RNG.standard_normal((40, 64)).astype(np.float32) + 30
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


def test_precision_recall_slices_of_one_volume_are_no_neighbours():
    points = np.repeat(BALL_RNG.standard_normal((10, 4)), 5, axis=0).astype(np.float32)
    volumes = np.repeat(np.arange(10), 5)
    assert radii(points, np.arange(50), 4).max() == 0
    assert radii(points, volumes, 4).min() > 0
