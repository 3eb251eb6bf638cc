"""The accountant: epsilon of steps, the noise for an epsilon, and what a resumed run may spend."""

from __future__ import annotations

import math
import sys

import pytest

from synthcube.errors import ConfigError
from synthcube.training import accountant
from synthcube.training.accountant import Budget, epsilon_spent, planned, sigma_for
from synthcube.training.config import PrivacyConfig


@pytest.mark.parametrize(
    ("subjects", "batch_size", "steps", "sigma"),
    [(1500, 64, 2343, 2.0), (300, 64, 468, 2.0), (1500, 1500, 200, 20.0), (9, 4, 6, 0.6)],
)
def test_epsilon_is_within_one_percent_of_another_accountant(
    subjects: int, batch_size: int, steps: int, sigma: float
) -> None:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    delta, rate = 1 / (10 * subjects), batch_size / subjects
    mechanism = PoissonSubsampledGaussianMechanism(
        noise_multiplier=sigma, sampling_probability=rate
    )
    reference = PRVAccountant(
        prvs=[mechanism], eps_error=0.01, delta_error=delta / 1000, max_self_compositions=[steps]
    )
    _, estimate, _ = reference.compute_epsilon(delta=delta, num_self_compositions=[steps])
    assert epsilon_spent(sigma, rate, steps, delta) == pytest.approx(estimate, rel=0.01)


def test_one_step_of_everybody_is_the_gaussian_mechanism() -> None:
    """Balle and Wang, "Improving the Gaussian Mechanism" (ICML 2018), theorem 8."""
    sigma, delta = 2.0, 1e-3
    epsilon = epsilon_spent(sigma, 1.0, 1, delta)

    def phi(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    def delta_of(epsilon: float) -> float:
        low, high = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
        return phi(low) - math.exp(epsilon) * phi(high)

    assert delta_of(epsilon) <= delta  # it is an upper bound,
    assert delta_of(epsilon - 0.03) > delta  # and not far above


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 10.0])
def test_the_noise_spends_the_epsilon_and_no_more(epsilon: float) -> None:
    sigma = sigma_for(epsilon, 0.1, 50, 1e-3)
    assert epsilon * 0.98 < epsilon_spent(sigma, 0.1, 50, 1e-3) <= epsilon
    assert epsilon_spent(sigma * 0.97, 0.1, 50, 1e-3) > epsilon


def test_no_step_spends_nothing_and_hardly_any_noise_promises_nothing() -> None:
    assert epsilon_spent(1.0, 0.5, 0, 1e-3) == 0
    assert epsilon_spent(0.005, 1.0, 1, 1e-3) > 1000


@pytest.mark.slow
def test_delta_is_a_tenth_of_one_over_the_subjects() -> None:
    budget = planned(PrivacyConfig(epsilon=8), batch_size=4, subjects=20, steps=10)
    assert (budget.delta, budget.sample_rate, budget.steps) == (1 / 200, 0.2, 0)
    assert budget.epsilon == 0
    assert 7.8 < budget.after(10) <= 8
    assert planned(PrivacyConfig(delta=1e-4), 4, 20, 10).delta == 1e-4
    assert budget.noise_over_signal(100) == pytest.approx(budget.sigma * 10 / 4)


def test_the_numbers_of_the_warning() -> None:
    # 1,500 images and 2.3 million weights, and 20,000 of them after a public start
    everything = Budget(1500, 1500, 1 / 15000, 1.0, sigma=8.4)
    assert "8.5 times the largest possible signal" in accountant.noise_warning(everything, 2328449)
    assert accountant.noise_warning(everything, 20_000) == ""


def test_a_batch_cannot_have_more_subjects_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"batch_size 16 is more than the 9 training subjects"):
        planned(PrivacyConfig(), batch_size=16, subjects=9, steps=3)


BEFORE = Budget(9, 4, 1 / 90, 1.0, sigma=2.0, steps=4)


def test_a_resumed_run_keeps_its_noise_and_counts_on() -> None:
    privacy = PrivacyConfig(epsilon=8)
    now = planned(privacy, 4, 9, 6, BEFORE)
    assert now == BEFORE
    straight = Budget(9, 4, 1 / 90, 1.0, sigma=2.0)
    assert now.after(6) == straight.after(6)


def test_more_than_epsilon_is_refused_before_it_is_spent() -> None:
    spent = BEFORE.after(40)
    with pytest.raises(
        ConfigError, match=r"4 steps have spent epsilon .* 40 in all would"
    ) as error:
        planned(PrivacyConfig(epsilon=spent - 0.1), 4, 9, 40, BEFORE)
    assert f"set training.privacy.epsilon to {math.ceil(100 * spent) / 100:g}" in str(error.value)
    assert planned(PrivacyConfig(epsilon=spent + 0.01), 4, 9, 40, BEFORE) == BEFORE


def test_less_than_what_is_spent_already_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 steps have spent"):
        planned(PrivacyConfig(epsilon=0.1), 4, 9, 2, BEFORE)


@pytest.mark.parametrize(
    ("privacy", "batch_size", "subjects", "fault"),
    [
        (PrivacyConfig(epsilon=20), 2, 9, "batch_size: was 4, is 2"),
        (PrivacyConfig(epsilon=20), 4, 10, "subjects: was 9, is 10"),
        (PrivacyConfig(epsilon=20, clip_norm=2.0), 4, 9, "clip_norm: was 1, is 2"),
    ],
)
def test_other_steps_cannot_be_counted_together(
    privacy: PrivacyConfig, batch_size: int, subjects: int, fault: str
) -> None:
    with pytest.raises(ConfigError, match="same subjects, batch size and privacy") as error:
        planned(privacy, batch_size, subjects, 6, BEFORE)
    assert fault in str(error.value)


def test_without_the_accountant_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants.prv", None)
    epsilon_spent.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'synthcube\[privacy\]'"):
        sigma_for(8.0, 0.5, 3, 1e-2)
