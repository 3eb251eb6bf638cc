"""Samplers against the exact denoiser of Gaussian data: no network, so no network's error.

For data N(mean, std) per voxel, what an ideal network would predict is known in closed form;
whatever a sampler then gets wrong is the sampler's.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from synthcube.families.ddpm import DDPMConfig
from synthcube.families.rectified_flow import RectifiedFlowConfig
from synthcube.nets.flow import TIME_SCALE
from synthcube.nets.solver import integrate

MEAN, STD, NUMBER = 0.3, 0.25, 20_000


def sampled(scheduler: Any, predict: Any, num_steps: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, NUMBER, 1, generator=generator)
    images = integrate(scheduler, predict, noise, [generator], num_steps)
    return images.mean().item(), images.std().item()


def expectations(
    x_t: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x_0 | x_t] and E[noise | x_t] for x_t = signal * x_0 + noise * N(0, 1)."""
    x_t, signal, noise = x_t.double(), signal.double(), noise.double()
    variance = (signal * STD) ** 2 + noise**2
    residual = (x_t - signal * MEAN) / variance
    return MEAN + signal * STD**2 * residual, noise * residual


def exact_flow(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    t = time.view(-1, 1, 1, 1) / TIME_SCALE
    x_0, noise = expectations(x_t, 1 - t, t)
    return (noise - x_0).float()


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    # Euler is first order: its 20 steps lose a tenth of the spread whatever the network.
    [("dpm-solver++", 0.03), ("heun", 0.03), ("euler", 0.12)],
)
def test_rectified_flow_keeps_mean_and_spread(sampler: Any, tolerance: float) -> None:
    config = RectifiedFlowConfig(sampler=sampler)
    mean, std = sampled(config.solver(), exact_flow, config.num_sampling_steps)
    assert config.num_sampling_steps == 20
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, rel=tolerance)


def test_euler_is_the_textbook_euler() -> None:
    """Its bias is that of the method: the product of its linear steps, in closed form."""
    times = torch.linspace(1, 1 / TIME_SCALE, 20, dtype=torch.float64)
    spread = 1.0
    for t, following in zip(times, [*times[1:], torch.tensor(0.0)], strict=True):
        variance = ((1 - t) * STD) ** 2 + t**2
        spread *= 1 + float((following - t) * (t - (1 - t) * STD**2) / variance)
    _, std = sampled(RectifiedFlowConfig(sampler="euler").solver(), exact_flow, 20)
    assert std == pytest.approx(spread, rel=0.02)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x_0"])
@pytest.mark.parametrize(
    ("sampler", "tolerance"), [("dpm-solver++", 0.04), ("ddim", 0.08), ("ddpm", 0.04)]
)
def test_ddpm_keeps_mean_and_spread(
    schedule: Literal["linear", "scaled_linear", "cosine"],
    prediction: Literal["epsilon", "v", "x_0"],
    sampler: Any,
    tolerance: float,
) -> None:
    config = DDPMConfig(schedule=schedule, prediction=prediction, sampler=sampler)
    kept = config.noise_schedule().alphas_cumprod

    def exact(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        product = kept[time.long()].view(-1, 1, 1, 1)
        signal, noise = product.sqrt(), (1 - product).sqrt()
        x_0, epsilon = expectations(x_t, signal, noise)
        v = signal.double() * epsilon - noise.double() * x_0
        return {"epsilon": epsilon, "v": v, "x_0": x_0}[prediction].float()

    mean, std = sampled(config.solver(), exact, config.sampling_steps)
    assert mean == pytest.approx(MEAN, abs=0.015)
    assert std == pytest.approx(STD, rel=tolerance)


def test_cosine_schedule_is_that_of_the_paper() -> None:
    """Nichol and Dhariwal (2021), equation 17, with s = 0.008."""
    kept = DDPMConfig(schedule="cosine").noise_schedule().alphas_cumprod

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (0, 250, 500, 900):
        assert kept[step].item() == pytest.approx(f((step + 1) / 1000) / f(0), rel=1e-3)


def test_ancestral_sampling_is_refused_below_the_training_steps() -> None:
    with pytest.raises(ValueError, match=r"ddpm needs all 1000 steps, num_sampling_steps is 250"):
        DDPMConfig(sampler="ddpm", num_sampling_steps=250)
