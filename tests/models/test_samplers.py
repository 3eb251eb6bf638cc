"""Samplers against the exact denoiser of Gaussian data: no network, so no network's error.

For data N(mean, std) per voxel, what an ideal network would predict is known in closed form;
whatever a sampler then gets wrong is the sampler's.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from synthcube.models.families.ddpm import DDPMConfig
from synthcube.models.families.rectified_flow import RectifiedFlowConfig
from synthcube.models.flow import TIME_SCALE
from synthcube.models.samplers import SAMPLERS, integrate, of_process

MEAN, STD, NUMBER = 0.3, 0.25, 20_000
# How far off the spread may be, relative to the true one, for each process that a sampler can
# sample. Euler is first order: its 20 steps lose a tenth of the spread whatever the network.
TOLERANCES: dict[str, dict[str, float]] = {
    "dpm-solver++": {"flow": 0.03, "diffusion": 0.04},
    "ddim": {"diffusion": 0.08},
    "euler": {"flow": 0.12},
    "heun": {"flow": 0.03},
    "ddpm": {"diffusion": 0.04},
}


def test_every_sampler_has_its_row() -> None:
    assert set(TOLERANCES) == set(SAMPLERS)
    for process in ("flow", "diffusion"):
        assert of_process(process) == tuple(
            name for name in SAMPLERS if process in TOLERANCES[name]
        )


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="Input should be 'dpm-solver"):
        RectifiedFlowConfig(sampler="ddpm")


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


@pytest.mark.parametrize("sampler", of_process("flow"))
def test_rectified_flow_keeps_mean_and_spread(sampler: Any) -> None:
    config = RectifiedFlowConfig(sampler=sampler)
    mean, std = sampled(config.solver(), exact_flow, config.num_sampling_steps)
    assert config.num_sampling_steps == 20
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, rel=TOLERANCES[sampler]["flow"])


def test_euler_is_the_textbook_euler() -> None:
    """Its bias is that of the method: the product of its linear steps, in closed form."""
    times = torch.linspace(1, 1 / TIME_SCALE, 20, dtype=torch.float64)
    spread = 1.0
    for t, following in zip(times, [*times[1:], torch.tensor(0.0)], strict=True):
        variance = ((1 - t) * STD) ** 2 + t**2
        spread *= 1 + float((following - t) * (t - (1 - t) * STD**2) / variance)
    _, std = sampled(RectifiedFlowConfig(sampler="euler").solver(), exact_flow, 20)
    assert std == pytest.approx(spread, rel=0.02)


@pytest.mark.parametrize(
    ("config", "size", "shift"),
    [
        (RectifiedFlowConfig(), (64, 64), 1),
        (RectifiedFlowConfig(), (32, 32), 1),
        (RectifiedFlowConfig(), (128, 128), 2**0.5),
        (RectifiedFlowConfig(), (64, 64, 64), 8**0.5),
        (RectifiedFlowConfig(time_shift=3.0), (64, 64, 64), 3),
        (RectifiedFlowConfig(start="source"), (64, 64, 64), 1),
        (RectifiedFlowConfig(start="source", time_shift=3.0), (64, 64, 64), 3),
    ],
)
def test_times_are_shifted_by_the_number_of_voxels(
    config: RectifiedFlowConfig, size: tuple[int, ...], shift: float
) -> None:
    assert config.shift_of(size) == pytest.approx(shift)


def test_training_times_are_shifted_and_wider() -> None:
    """logit(t) has the mean log(s), so half of the times lie above s / (1 + s)."""
    seen = []

    def predict(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append(time.double() / TIME_SCALE)
        return x_t

    torch.manual_seed(0)
    config = RectifiedFlowConfig(time_shift=4.0)
    config.process(2, bounded=True).loss(predict, torch.zeros(4000, 1, 2, 2))
    assert seen[0].median().item() == pytest.approx(4 / 5, abs=0.01)
    assert torch.logit(seen[0]).std().item() == pytest.approx(1 + math.log(4) / 2, rel=0.05)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x_0"])
@pytest.mark.parametrize("sampler", of_process("diffusion"))
def test_ddpm_keeps_mean_and_spread(
    schedule: Literal["linear", "scaled_linear", "cosine"],
    prediction: Literal["epsilon", "v", "x_0"],
    sampler: Any,
) -> None:
    config = DDPMConfig(schedule=schedule, prediction=prediction, sampler=sampler)
    alpha_bar = config.noise_schedule().alphas_cumprod

    def exact(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        product = alpha_bar[time.long()].view(-1, 1, 1, 1)
        signal, noise = product.sqrt(), (1 - product).sqrt()
        x_0, epsilon = expectations(x_t, signal, noise)
        v = signal.double() * epsilon - noise.double() * x_0
        return {"epsilon": epsilon, "v": v, "x_0": x_0}[prediction].float()

    mean, std = sampled(config.solver(), exact, config.sampling_steps)
    assert mean == pytest.approx(MEAN, abs=0.015)
    assert std == pytest.approx(STD, rel=TOLERANCES[sampler]["diffusion"])


def test_cosine_schedule_is_that_of_the_paper() -> None:
    """Nichol and Dhariwal (2021), equation 17, with s = 0.008."""
    alpha_bar = DDPMConfig(schedule="cosine").noise_schedule().alphas_cumprod

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (0, 250, 500, 900):
        assert alpha_bar[step].item() == pytest.approx(f((step + 1) / 1000) / f(0), rel=1e-3)


def test_ancestral_sampling_is_refused_below_the_training_steps() -> None:
    with pytest.raises(ValueError, match=r"ddpm needs all 1000 steps, num_sampling_steps is 250"):
        DDPMConfig(sampler="ddpm", num_sampling_steps=250)


@pytest.mark.parametrize(
    ("sampler", "variance"),
    [("dpm-solver++", "learned"), ("ddim", "learned"), ("dpm-solver++", "fixed_large")],
)
def test_variance_is_refused_where_no_noise_is_drawn(sampler: Any, variance: Any) -> None:
    with pytest.raises(ValueError, match=rf"variance {variance} is for sampler ddpm alone"):
        DDPMConfig(sampler=sampler, variance=variance)


def exact_variance(config: DDPMConfig, x_t: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """What the variance's half of a network tends to: the spread of x_{t-1} given x_t alone.

    That of the posterior given x_0 too, plus what x_0 itself is uncertain by, times its pull.
    """
    alpha_bar = config.noise_schedule().alphas_cumprod.double()
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    alpha_bar, before = (share[step].view(-1, 1, 1, 1) for share in (alpha_bar, before))
    beta = 1 - alpha_bar / before
    least = (beta * (1 - before) / (1 - alpha_bar)).clamp(min=1e-20)
    unknown = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    spread = least + beta**2 * before / (1 - alpha_bar) ** 2 * unknown
    position = (spread.log() - least.log()) / (beta.log() - least.log())
    return (2 * position - 1).float().expand_as(x_t)


def exact_x_0(config: DDPMConfig, x_t: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    alpha_bar = config.noise_schedule().alphas_cumprod[step].view(-1, 1, 1, 1)
    return expectations(x_t, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())[0].float()


@pytest.mark.parametrize("num_steps", [50, 1000])
def test_the_exact_learned_variance_keeps_mean_and_spread(num_steps: int) -> None:
    """Of few steps it keeps what both fixed variances lose: the reason to learn it."""

    def spread(variance: Any) -> tuple[float, float]:
        config = DDPMConfig(
            sampler="ddpm", variance=variance, prediction="x_0", num_train_steps=num_steps
        )

        def exact(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            step = time.long()
            halves = [exact_x_0(config, x_t, step)]
            if variance == "learned":
                halves.append(exact_variance(config, x_t, step))
            return torch.cat(halves, dim=1)

        return sampled(config.solver(bounded=False), exact, num_steps)

    mean, std = spread("learned")
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, rel=0.02)
    if num_steps == 50:
        assert spread("fixed_small")[1] < 0.97 * STD
        assert spread("fixed_large")[1] > 1.03 * STD


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x_0"])
def test_the_bound_is_least_at_the_exact_variance(prediction: Any) -> None:
    config = DDPMConfig(sampler="ddpm", variance="learned", prediction=prediction)
    process = config.process(2, bounded=False)
    generator = torch.Generator().manual_seed(0)
    step = torch.full((2000,), 300)
    x_0 = MEAN + STD * torch.randn(2000, 1, 8, 8, generator=generator)
    alpha_bar = process.noise_schedule.alphas_cumprod[step].view(-1, 1, 1, 1)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = signal * x_0 + noise * torch.randn(x_0.shape, generator=generator)
    clean = exact_x_0(config, x_t, step)
    epsilon = (x_t - signal * clean) / noise
    output = {"x_0": clean, "epsilon": epsilon, "v": signal * epsilon - noise * clean}[prediction]
    variance = exact_variance(config, x_t, step)
    least = process.variational_bound(x_0, x_t, step, output, variance)
    assert least > 0
    for other in (-0.2, 0.2):
        assert process.variational_bound(x_0, x_t, step, output, variance + other) > least * 1.0001


def test_the_bound_is_the_divergence_of_two_normal_distributions() -> None:
    """Against torch.distributions, posterior and model in the paper's own formulas."""
    config = DDPMConfig(sampler="ddpm", variance="learned", prediction="x_0", schedule="linear")
    process = config.process(2, bounded=False)
    x_0, x_t, output, variance = torch.randn(4, 3, 1, 4, 4).double()
    step = torch.tensor([0, 17, 999])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    total = 0.0
    for i in (1, 2):
        t = int(step[i])
        least = betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])

        def mean(clean: torch.Tensor, t: int = t, i: int = i) -> torch.Tensor:
            scaled = alpha_bar[t - 1].sqrt() * betas[t] * clean
            scaled = scaled + (1 - betas[t]).sqrt() * (1 - alpha_bar[t - 1]) * x_t[i]
            return scaled / (1 - alpha_bar[t])

        between = (variance[i] + 1) / 2
        model_variance = (between * betas[t].log() + (1 - between) * least.log()).exp()
        true = torch.distributions.Normal(mean(x_0[i]), least.sqrt())
        model = torch.distributions.Normal(mean(output[i]), model_variance.sqrt())
        total += torch.distributions.kl_divergence(true, model).mean().item() / 3
    bound = process.variational_bound(x_0, x_t, step, output, variance)
    assert bound.item() == pytest.approx(1000 * total / math.log(2), rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_min_snr_weighs_the_error_in_x_0_alike_whatever_is_predicted(schedule: Any) -> None:
    """Hang et al.: min(SNR, gamma) times the squared error in x_0."""
    step = torch.arange(1, 1000, 100)
    x_0, output = torch.randn(2, len(step), 1, 4, 4).double()
    epsilon = torch.randn(len(step), 1, 4, 4).double()
    losses = []
    for prediction in ("epsilon", "v", "x_0"):
        config = DDPMConfig(schedule=schedule, prediction=prediction, min_snr_gamma=5)
        process = config.process(2, bounded=True)
        alpha_bar = process.noise_schedule.alphas_cumprod[step].double().view(-1, 1, 1, 1)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x_t = signal * x_0 + noise * epsilon
        predicted_noise = (x_t - signal * output) / noise
        pairs = {
            "x_0": (output, x_0),
            "epsilon": (predicted_noise, epsilon),
            "v": (signal * predicted_noise - noise * output, signal * epsilon - noise * x_0),
        }
        losses.append(process.error(*pairs[prediction], step).item())
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    expected = (snr.clamp(max=5) * (output - x_0).square().flatten(1).mean(1)).mean().item()
    assert losses == pytest.approx([expected] * 3, rel=1e-3)


def test_what_a_variance_is_is_not_exaggerated_by_guidance() -> None:
    from synthcube.models.nets.conditioning import guided
    from synthcube.schema import Condition

    condition = Condition(values=torch.tensor([[1.0]]), source=torch.zeros(1, 0, 2, 2))

    def predict(x_t: torch.Tensor, time: torch.Tensor, condition_of_x: Condition) -> torch.Tensor:
        known = torch.nan_to_num(condition_of_x["values"]).view(-1, 1, 1, 1)
        return known.expand(-1, 2, 2, 2)

    guided_output = guided(predict, condition, 3.0, 1)(torch.zeros(1, 1, 2, 2), torch.zeros(1))
    assert guided_output[0, :, 0, 0].tolist() == [3.0, 1.0]


def test_betas_are_those_that_were_asked_for() -> None:
    config = DDPMConfig(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    betas = config.noise_schedule().betas
    expected = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    torch.testing.assert_close(betas, expected)
