"""Frechet and kernel distance, precision and recall against b implementations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.fid import get_fid_score
from scipy.spatial.distance import cdist
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_kernel, poly_mmd

from synthcube.evaluation.fidelity_metrics import (
    NormalFit,
    fit_normal,
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


def distance(a: np.ndarray, b: np.ndarray) -> float:
    fits = (fit_normal(features, np.arange(len(features))) for features in (a, b))
    return frechet_distance(*fits)


# MONAI 1.6 calls scipy's square root in its old way
@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
@pytest.mark.parametrize("rows", [(300, 200), (40, 31), (10, 300), (10, 12), (33, 32)])
def test_frechet_it_is_that_of_monai_and_torchmetrics(rows):
    """Above, below and at as many rows as features."""
    a, b = correlated(rows[0], 32, 1.5, 0.3), correlated(rows[1], 32)
    x, y = (torch.from_numpy(features).double() for features in (a, b))
    of_torchmetrics = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert distance(a, b) == pytest.approx(float(of_torchmetrics), rel=1e-5)
    if min(rows) > 32:  # scipy's square root of a singular matrix is a rough a
        assert distance(a, b) == pytest.approx(float(get_fid_score(x, y)), rel=1e-6)


def test_frechet_it_is_the_closed_form_of_two_normal_distributions():
    first, second = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 1.0]).double()
    shift = torch.tensor([1.0, 0.0, -2.0]).double()
    a, b = NormalFit(torch.zeros(3).double(), first.diag()), NormalFit(shift, second.diag())
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4)


def test_frechet_many_samples_come_near_to_the_closed_form():
    a = FRECHET_RNG.standard_normal((20_000, 4)).astype(np.float32)
    b = (FRECHET_RNG.standard_normal((20_000, 4)) * 2 + 1).astype(np.float32)
    assert distance(a, b) == pytest.approx(4 * (1 + 1), rel=0.05)


def test_frechet_a_set_is_at_distance_zero_from_itself():
    for a in (correlated(50, 8), correlated(5, 8)):
        assert distance(a, a[::-1].copy()) == pytest.approx(0, abs=1e-6)


def test_frechet_a_constant_feature_changes_nothing():
    a, b = correlated(60, 8), correlated(60, 8, 2)
    padded = [np.c_[features, np.full(60, 7, np.float32)] for features in (a, b)]
    assert distance(*padded) == pytest.approx(distance(a, b), rel=1e-6)


def test_frechet_a_large_mean_swallows_no_variance():
    a, b = correlated(500, 4), correlated(500, 4, 3)
    far = [(features + 4096).astype(np.float32) for features in (a, b)]
    assert distance(*far) == pytest.approx(distance(a, b), rel=1e-3)


def test_frechet_pieces_are_put_together(monkeypatch):
    a, b = correlated(100, 6), correlated(90, 6, 2)
    whole = distance(a, b)
    monkeypatch.setattr("synthcube.evaluation.fidelity_metrics._FRECHET_ROWS", 7)
    assert distance(a, b) == pytest.approx(whole, rel=1e-10)


KERNEL_RNG = np.random.default_rng(0)


def table(rows: int, length: int = 8, shift: float = 0.0) -> np.ndarray:
    return (KERNEL_RNG.standard_normal((rows, length)) + shift).astype(np.float32)


def column(rows: int, chosen: np.ndarray) -> np.ndarray:
    members = np.zeros((rows, 1), bool)
    members[chosen] = True
    return members


def two(predictions: np.ndarray, labels: np.ndarray, m: int, subjects=None):
    """Distances of the first m of `predictions` and of the next m of `labels` from its first m."""
    parts = (np.arange(m), np.arange(m), np.arange(m, 2 * m))
    samples = tuple(
        column(len(rows), part)
        for rows, part in zip((predictions, labels, labels), parts, strict=True)
    )
    owners = subjects or (np.arange(len(predictions)), len(predictions) + np.arange(len(labels)))
    values, baselines = kernel_distances(predictions, labels, owners, samples)
    return values[0], baselines[0]


@pytest.mark.parametrize("pieces", [(512, 4096), (7, 11)])
def test_kernel_it_is_that_of_torchmetrics(monkeypatch, pieces):
    monkeypatch.setattr("synthcube.evaluation.fidelity_metrics._KERNEL_ROWS", pieces[0])
    monkeypatch.setattr("synthcube.evaluation.fidelity_metrics._KERNEL_COLUMNS", pieces[1])
    predictions, labels = table(50, shift=0.5), table(70)
    value, baseline = two(predictions, labels, 30)
    x, y, other = (
        torch.from_numpy(rows) for rows in (predictions[:30], labels[:30], labels[30:60])
    )
    assert value.value == pytest.approx(float(poly_mmd(y, x)), rel=1e-4)
    assert baseline.value == pytest.approx(float(poly_mmd(y, other)), rel=1e-3, abs=1e-5)


def test_kernel_many_splits_at_once_are_those_one_by_one():
    predictions, labels = table(40, shift=0.3), table(60)
    owners = (np.arange(40), 100 + np.arange(60))
    orders = [KERNEL_RNG.permutation(60) for _ in range(3)]
    parts = [(KERNEL_RNG.permutation(40)[:20], order[:20], order[20:40]) for order in orders]
    samples = [tuple(column(n, split[i]) for i, n in enumerate((40, 60, 60))) for split in parts]
    together = kernel_distances(
        predictions,
        labels,
        owners,
        tuple(np.hstack([members[i] for members in samples]) for i in range(3)),
    )
    for r, alone in enumerate(samples):
        values, baselines = kernel_distances(predictions, labels, owners, alone)
        assert together[0][r].value == pytest.approx(values[0].value, rel=1e-9)
        assert together[1][r].value == pytest.approx(baselines[0].value, rel=1e-9)
        assert together[0][r].variance == pytest.approx(values[0].variance, rel=1e-9)


def test_kernel_it_has_no_bias_and_its_variance_is_that_of_many_trials():
    trials = [two(table(20, shift=0.5), table(40), 20) for _ in range(400)]
    values = np.array([value.value for value, _ in trials])
    baselines = np.array([baseline.value for _, baseline in trials])
    # E k(x, y) of the cubic kernel for these normal distributions, from many samples
    x, y = (torch.from_numpy(table(3000, shift=shift)) for shift in (0.5, 0.0))
    x_2, y_2 = (torch.from_numpy(table(3000, shift=shift)) for shift in (0.5, 0.0))
    truth = poly_kernel(x, x_2).mean() + poly_kernel(y, y_2).mean() - 2 * poly_kernel(x, y).mean()
    error = values.std() / 20
    assert values.mean() == pytest.approx(float(truth), abs=4 * error)
    assert abs(baselines.mean()) < 4 * baselines.std() / 20
    estimated = np.mean([value.variance for value, _ in trials])
    assert estimated == pytest.approx(values.var(), rel=0.35)


def test_kernel_images_of_one_subject_add_no_bias():
    """Ten noisy copies of each of 12 images: pairs of copies are left out."""

    def copies() -> np.ndarray:
        return np.repeat(table(12), 10, axis=0) + 0.05 * table(120)

    owners = (np.repeat(np.arange(12), 10), 12 + np.repeat(np.arange(24), 10))
    baselines = []
    for _ in range(60):
        value, _ = two(copies(), np.r_[copies(), copies()].astype(np.float32), 120, owners)
        baselines.append(value.value)
    assert abs(np.mean(baselines)) < 4 * np.std(baselines) / 60**0.5


BALL_RNG = np.random.default_rng(0)
K = 3


def measured(labels: np.ndarray, predictions: np.ndarray, k: int = K) -> tuple[float, ...]:
    labels, predictions = labels.astype(np.float32), predictions.astype(np.float32)
    limits = [radii(points, np.arange(len(points)), k) for points in (labels, predictions)]
    return precision_recall_density_coverage(labels, predictions, *limits, k)


def by_definition(labels: np.ndarray, predictions: np.ndarray, k: int = K) -> tuple[float, ...]:
    def radius(points: np.ndarray) -> np.ndarray:
        return np.sort(cdist(points, points), axis=1)[:, k]  # the first is the point itself

    d = cdist(labels, predictions)
    in_real, in_made = d <= radius(labels)[:, None], d <= radius(predictions)[None]
    return (
        in_real.any(0).mean(), in_made.any(1).mean(),
        in_real.sum() / (k * len(predictions)), in_real.any(1).mean(),
    )  # fmt: skip


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_precision_recall_they_are_their_definitions(shift, monkeypatch):
    monkeypatch.setattr("synthcube.evaluation.fidelity_metrics._BALL_ROWS", 16)
    labels, predictions = (
        BALL_RNG.standard_normal((60, 5)),
        BALL_RNG.standard_normal((45, 5)) + shift,
    )
    assert measured(labels, predictions) == pytest.approx(by_definition(labels, predictions))


def test_precision_recall_the_same_images_are_everywhere():
    labels = BALL_RNG.standard_normal((50, 6))
    precision, recall, density, coverage = measured(labels, labels)
    assert (precision, recall, coverage) == (1, 1, 1)
    # each lies in its own ball and in those of k others on average
    assert density == pytest.approx((K + 1) / K)


def test_precision_recall_images_elsewhere_are_nowhere():
    labels = BALL_RNG.standard_normal((50, 6))
    assert measured(labels, labels + 100) == (0, 0, 0, 0)


def test_precision_recall_one_mode_of_two_is_precise_but_half_covered():
    left, right = BALL_RNG.standard_normal((40, 4)), BALL_RNG.standard_normal((40, 4)) + 50
    more = BALL_RNG.standard_normal((80, 4)) * 0.8
    precision, recall, _, coverage = measured(np.r_[left, right], more)
    assert precision > 0.8
    assert recall <= 0.5
    assert 0.4 < coverage <= 0.5


def test_precision_recall_density_of_the_same_distribution_is_about_one():
    labels, predictions = BALL_RNG.standard_normal((2, 600, 3))
    assert measured(labels, predictions)[2] == pytest.approx(1, abs=0.12)


def test_precision_recall_copies_lie_on_the_spheres_and_count_as_inside():
    """A prediction that is a labels image is as far from its neighbour as that image is."""
    labels = BALL_RNG.standard_normal((40, 64)).astype(np.float32) + 30
    assert measured(labels, labels[::2]) == pytest.approx(
        by_definition_inclusive(labels, labels[::2])
    )


def by_definition_inclusive(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, ...]:
    labels, predictions = labels.astype(np.float64), predictions.astype(np.float64)
    radius_real = np.sort(cdist(labels, labels), axis=1)[:, K] * (1 + 1e-9)
    radius_made = np.sort(cdist(predictions, predictions), axis=1)[:, K] * (1 + 1e-9)
    d = cdist(labels, predictions)
    in_real = d <= radius_real[:, None]
    return (
        in_real.any(0).mean(), (d <= radius_made[None]).any(1).mean(),
        in_real.sum() / (K * len(predictions)), in_real.any(1).mean(),
    )  # fmt: skip


def test_precision_recall_slices_of_one_volume_are_no_neighbours():
    points = np.repeat(BALL_RNG.standard_normal((10, 4)), 5, axis=0).astype(np.float32)
    volumes = np.repeat(np.arange(10), 5)
    assert radii(points, np.arange(50), 4).max() == 0
    assert radii(points, volumes, 4).min() > 0
