"""The Frechet distance against its closed form and against MONAI's and torchmetrics' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.fid import get_fid_score
from torchmetrics.image.fid import _compute_fid

from synthcube.evaluation.fidelity.frechet import Normal, frechet_distance, normal

RNG = np.random.default_rng(0)


def table(rows: int, length: int, spread: float = 1.0, shift: float = 0.0) -> np.ndarray:
    mixing = RNG.standard_normal((length, length)) / length**0.5
    return (RNG.standard_normal((rows, length)) @ mixing * spread + shift).astype(np.float32)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    both = (normal(each, np.arange(len(each))) for each in (one, other))
    return frechet_distance(*both)


# MONAI 1.6 calls scipy's square root in its old way
@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
@pytest.mark.parametrize("rows", [(300, 200), (40, 31), (10, 300), (10, 12), (33, 32)])
def test_it_is_that_of_monai_and_torchmetrics(rows):
    """Above, below and at as many rows as features."""
    one, other = table(rows[0], 32, 1.5, 0.3), table(rows[1], 32)
    x, y = (torch.from_numpy(each).double() for each in (one, other))
    of_torchmetrics = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert distance(one, other) == pytest.approx(float(of_torchmetrics), rel=1e-5)
    if min(rows) > 32:  # scipy's square root of a singular matrix is a rough one
        assert distance(one, other) == pytest.approx(float(get_fid_score(x, y)), rel=1e-6)


def test_it_is_the_closed_form_of_two_normal_distributions():
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 1.0]).double()
    shift = torch.tensor([1.0, 0.0, -2.0]).double()
    one, other = Normal(torch.zeros(3).double(), a.diag()), Normal(shift, b.diag())
    assert frechet_distance(one, other) == pytest.approx(5 + 1 + 0 + 4)


def test_many_samples_come_near_to_the_closed_form():
    one = RNG.standard_normal((20_000, 4)).astype(np.float32)
    other = (RNG.standard_normal((20_000, 4)) * 2 + 1).astype(np.float32)
    assert distance(one, other) == pytest.approx(4 * (1 + 1), rel=0.05)


def test_a_set_is_at_distance_zero_from_itself():
    for one in (table(50, 8), table(5, 8)):
        assert distance(one, one[::-1].copy()) == pytest.approx(0, abs=1e-6)


def test_a_constant_feature_changes_nothing():
    one, other = table(60, 8), table(60, 8, 2)
    padded = [np.c_[each, np.full(60, 7, np.float32)] for each in (one, other)]
    assert distance(*padded) == pytest.approx(distance(one, other), rel=1e-6)


def test_a_large_mean_swallows_no_variance():
    one, other = table(500, 4), table(500, 4, 3)
    far = [(each + 4096).astype(np.float32) for each in (one, other)]
    assert distance(*far) == pytest.approx(distance(one, other), rel=1e-3)


def test_pieces_are_put_together(monkeypatch):
    one, other = table(100, 6), table(90, 6, 2)
    whole = distance(one, other)
    monkeypatch.setattr("synthcube.evaluation.fidelity.frechet._ROWS", 7)
    assert distance(one, other) == pytest.approx(whole, rel=1e-10)
