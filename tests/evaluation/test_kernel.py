"""The kernel distance against torchmetrics' and by its own promise: no bias, a true interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_kernel, poly_mmd

from synthcube.evaluation.fidelity.kernel import kernel_distances

RNG = np.random.default_rng(0)


def table(rows: int, length: int = 8, shift: float = 0.0) -> np.ndarray:
    return (RNG.standard_normal((rows, length)) + shift).astype(np.float32)


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
def test_it_is_that_of_torchmetrics(monkeypatch, pieces):
    monkeypatch.setattr("synthcube.evaluation.fidelity.kernel._ROWS", pieces[0])
    monkeypatch.setattr("synthcube.evaluation.fidelity.kernel._COLUMNS", pieces[1])
    made, real = table(50, shift=0.5), table(70)
    value, floor = two(made, real, 30)
    x, y, other = (torch.from_numpy(each) for each in (made[:30], real[:30], real[30:60]))
    assert value.value == pytest.approx(float(poly_mmd(y, x)), rel=1e-4)
    assert floor.value == pytest.approx(float(poly_mmd(y, other)), rel=1e-3, abs=1e-5)


def test_many_splits_at_once_are_those_one_by_one():
    made, real = table(40, shift=0.3), table(60)
    owners = (np.arange(40), 100 + np.arange(60))
    orders = [RNG.permutation(60) for _ in range(3)]
    parts = [(RNG.permutation(40)[:20], order[:20], order[20:40]) for order in orders]
    samples = [tuple(column(n, split[i]) for i, n in enumerate((40, 60, 60))) for split in parts]
    together = kernel_distances(
        made, real, owners, tuple(np.hstack([each[i] for each in samples]) for i in range(3))
    )
    for r, alone in enumerate(samples):
        values, floors = kernel_distances(made, real, owners, alone)
        assert together[0][r].value == pytest.approx(values[0].value, rel=1e-9)
        assert together[1][r].value == pytest.approx(floors[0].value, rel=1e-9)
        assert together[0][r].variance == pytest.approx(values[0].variance, rel=1e-9)


def test_it_has_no_bias_and_its_variance_is_that_of_many_trials():
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


def test_images_of_one_subject_add_no_bias():
    """Ten noisy copies of each of 12 images: pairs of copies are left out."""

    def copies() -> np.ndarray:
        return np.repeat(table(12), 10, axis=0) + 0.05 * table(120)

    owners = (np.repeat(np.arange(12), 10), 12 + np.repeat(np.arange(24), 10))
    floors = []
    for _ in range(60):
        value, _ = two(copies(), np.r_[copies(), copies()].astype(np.float32), 120, owners)
        floors.append(value.value)
    assert abs(np.mean(floors)) < 4 * np.std(floors) / 60**0.5
