"""Denoising diffusion in any space: Ho et al., "Denoising Diffusion Probabilistic Models" (2020).

v-prediction: Salimans and Ho, "Progressive Distillation" (ICLR 2022). Sampling: Song et al.,
"DDIM" (ICLR 2021); Lu et al., "DPM-Solver++" (2022), through diffusers. Learned variance: Nichol
and Dhariwal, "Improved DDPM" (ICML 2021). Weights by signal-to-noise ratio: Hang et al.,
"Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.losses import LossConfig, Losses, WeightedLosses, wide
from synthcube.models.samplers import Predict, integrate
from synthcube.schema import Schema

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x_0": "sample"}
_VARIANCES = {
    "fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned": "learned_range",
}  # fmt: skip
_SAMPLING_STEPS = {"dpm-solver++": 20, "ddim": 50}
# Improved DDPM's weight of the variational bound, which is to guide the variance alone.
_BOUND_WEIGHT = 0.001


class DiffusionFields(Schema):
    """The diffusion's part of a family's config."""

    num_train_steps: int = Field(
        default=1000, ge=2, le=100_000, description="Steps of the noise schedule."
    )
    schedule: Literal["linear", "scaled_linear", "cosine"] = Field(
        default="cosine", description="Noise schedule."
    )
    beta_start: float = Field(
        default=0.0001, gt=0, lt=1, description="First beta of a linear or scaled_linear schedule."
    )
    beta_end: float = Field(default=0.02, gt=0, lt=1, description="Last beta of such a schedule.")
    prediction: Literal["epsilon", "v", "x_0"] = Field(
        default="v", description="What the network predicts: noise, velocity or image."
    )
    losses: Losses = Field(
        default=(LossConfig(name="mse"),),
        description="Losses between prediction and truth, added up with their weights.",
    )
    min_snr_gamma: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Steps whose signal-to-noise ratio is above this (5 is usual) count less in "
        "the loss; null: all steps of `prediction` count alike.",
    )
    sampler: Literal["dpm-solver++", "ddim", "ddpm"] = Field(
        default="dpm-solver++", description="How images are drawn."
    )
    num_sampling_steps: int | None = Field(
        default=None,
        ge=2,
        le=100_000,
        description="Network calls for an image; null: 20 (dpm-solver++), 50 (ddim), "
        "all training steps (ddpm).",
    )
    variance: Literal["fixed_small", "fixed_large", "learned"] = Field(
        default="fixed_small",
        description="Noise that sampler ddpm adds at a step: the least or the most that fits the "
        "schedule, or as much between them as the network says.",
    )

    @model_validator(mode="after")
    def _sampler_fits(self) -> Self:
        # With fewer steps ancestral sampling never reaches clean images: the spread of exact
        # Gaussian data comes out as 0.21 instead of 0.25 at 50 of 1000 steps.
        if self.sampler == "ddpm" and self.sampling_steps < self.num_train_steps:
            raise ValueError(
                f"sampler ddpm needs all {self.num_train_steps} steps, num_sampling_steps is "
                f"{self.num_sampling_steps}: leave it out, or use dpm-solver++ or ddim"
            )
        if self.sampler != "ddpm" and self.variance != "fixed_small":
            raise ValueError(
                f"variance {self.variance} is for sampler ddpm alone: {self.sampler} adds no "
                "noise, leave variance out"
            )
        return self

    @property
    def sampling_steps(self) -> int:
        """Network calls for an image."""
        default = _SAMPLING_STEPS.get(self.sampler, self.num_train_steps)
        return self.num_sampling_steps or default

    def out_channels(self, channels: int) -> int:
        """What a network must give for data of so many channels."""
        return 2 * channels if self.variance == "learned" else channels

    def process(self, spatial_dims: int, *, bounded: bool) -> Diffusion:
        """The diffusion of data; `bounded` where they all lie in [-1, 1]."""
        return Diffusion(self, spatial_dims, bounded=bounded)

    def noise_schedule(self, *, bounded: bool = True) -> Any:
        """The scheduler of diffusers that noises training images and samples ancestrally."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            **self._shared(),
            timestep_spacing="trailing",
            variance_type=_VARIANCES[self.variance],
            clip_sample=bounded,
        )

    def solver(self, *, bounded: bool = True) -> Any:
        """A fresh scheduler of diffusers for sampling."""
        from diffusers import DPMSolverMultistepScheduler

        if self.sampler == "ddpm":
            return self.noise_schedule(bounded=bounded)
        # DDIM is the first-order solver of this class. Steps even in log signal-to-noise ratio
        # (Lu et al.) keep the spread of the data; even in time, 20 steps lose a fifth of it.
        return DPMSolverMultistepScheduler(
            **self._shared(),
            solver_order=1 if self.sampler == "ddim" else 2,
            use_lu_lambdas=True,
        )

    def _shared(self) -> dict[str, Any]:
        return {
            "num_train_timesteps": self.num_train_steps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": _SCHEDULES[self.schedule],
            "prediction_type": _PREDICTIONS[self.prediction],
        }


class Diffusion:
    """The network predicts what was added to data at a random step of the noise schedule."""

    def __init__(self, fields: DiffusionFields, spatial_dims: int, *, bounded: bool) -> None:
        self.fields = fields
        self.criterion = WeightedLosses(fields.losses, spatial_dims)
        self.bounded = bounded
        self.noise_schedule = fields.noise_schedule(bounded=bounded)

    def loss(self, predict: Predict, x_0: torch.Tensor) -> dict[str, torch.Tensor]:
        """The scalar ``loss``, and its parts where the variance is learned.

        Args:
            predict: (x_t (B, C, *spatial), step (B,)) to what is predicted, of x_t's shape; twice
                the channels where the variance is learned.
            x_0: data, (B, C, *spatial).
        """
        epsilon = torch.randn_like(x_0)
        step = torch.randint(self.fields.num_train_steps, (len(x_0),), device=x_0.device)
        x_t = self.noise_schedule.add_noise(x_0, epsilon, step)
        target = epsilon
        if self.fields.prediction == "v":
            target = self.noise_schedule.get_velocity(x_0, epsilon, step)
        elif self.fields.prediction == "x_0":
            target = x_0
        output = wide(predict(x_t, step.float()))
        prediction, variance = output[:, : x_0.shape[1]], output[:, x_0.shape[1] :]
        error = self._error(prediction, target, step)
        if self.fields.variance != "learned":
            return {"loss": error}
        bound = self.bound(x_0, x_t, step, prediction.detach(), variance)
        return {"loss": error + _BOUND_WEIGHT * bound, "error": error, "bound": bound}

    def sample(
        self,
        predict: Predict,
        start: torch.Tensor,
        generators: Sequence[torch.Generator],
    ) -> torch.Tensor:
        """Data out of standard normal noise of the same shape, not clipped."""
        solver = self.fields.solver(bounded=self.bounded)
        return integrate(solver, predict, start, generators, self.fields.sampling_steps)

    def weights(self, step: torch.Tensor) -> torch.Tensor:
        """(B,) of steps to (B,): what the loss of each is multiplied with, by Hang et al."""
        gamma = self.fields.min_snr_gamma
        if gamma is None:
            return torch.ones_like(step, dtype=torch.float32)
        kept: torch.Tensor = self.noise_schedule.alphas_cumprod.to(step.device)[step]
        snr = kept / (1 - kept)
        # Their weight is of the error in x_0, which is that in epsilon by the signal-to-noise
        # ratio, and that in v by the ratio plus one.
        per_unit = {"x_0": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}
        return snr.clamp(max=gamma) / per_unit[self.fields.prediction]

    def bound(
        self,
        x_0: torch.Tensor,
        x_t: torch.Tensor,
        step: torch.Tensor,
        prediction: torch.Tensor,
        variance: torch.Tensor,
    ) -> torch.Tensor:
        """The variational bound in bits for each voxel: Nichol and Dhariwal, equations 4 to 6.

        Step 0 is left out, because no noise is drawn there.

        Args:
            x_0, x_t: data, and what became of them at `step` (B,).
            prediction: of the network, the half that predicts.
            variance: the other half: -1 is the least variance, 1 the most, and logarithms between.
        """
        least, most, pull = self._posterior(step, x_0.ndim)
        log_true, log_said = least, least + (variance + 1) / 2 * (most - least)
        mean_error = pull * (x_0 - self._x_0(x_t, step, prediction))
        nats = 0.5 * (
            log_said - log_true + torch.expm1(log_true - log_said)
            + mean_error**2 * torch.exp(-log_said)
        )  # fmt: skip
        noisy = (step > 0).view(-1, *[1] * (x_0.ndim - 1))
        bits = torch.where(noisy, nats, 0.0).mean() / math.log(2)
        return bits * self.fields.num_train_steps

    def _error(
        self, prediction: torch.Tensor, target: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        if self.fields.min_snr_gamma is None:
            return self.criterion(prediction, target)
        # Image by image, because losses do not take weights of images.
        each = zip(prediction.split(1), target.split(1), strict=True)
        errors = torch.stack([self.criterion(one, other) for one, other in each])
        return (self.weights(step) * errors).mean()

    def _posterior(self, step: torch.Tensor, ndim: int) -> tuple[torch.Tensor, ...]:
        """Log of the least and of the most variance of x_{t-1} given x_t; how x_0 moves its mean.

        Each (B, 1, ...).
        """
        kept = self.noise_schedule.alphas_cumprod.double()
        before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
        beta = 1 - kept / before
        least = (beta * (1 - before) / (1 - kept)).clamp(min=1e-20).log()
        pull = beta * before.sqrt() / (1 - kept)
        shape = (-1, *[1] * (ndim - 1))
        return tuple(
            each.float().to(step.device)[step].view(shape) for each in (least, beta.log(), pull)
        )

    def _x_0(self, x_t: torch.Tensor, step: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """The data that a prediction stands for, as the sampler takes them."""
        kept = self.noise_schedule.alphas_cumprod.to(step.device)[step]
        kept = kept.view(-1, *[1] * (x_t.ndim - 1))
        signal, noise = kept.sqrt(), (1 - kept).sqrt()
        x_0 = prediction
        if self.fields.prediction == "epsilon":
            x_0 = (x_t - noise * prediction) / signal
        elif self.fields.prediction == "v":
            x_0 = signal * x_t - noise * prediction
        return x_0.clamp(-1, 1) if self.bounded else x_0
