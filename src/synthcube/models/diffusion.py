"""Denoising diffusion in any space: Ho et al., "Denoising Diffusion Probabilistic Models" (2020).

v-prediction: Salimans and Ho, "Progressive Distillation" (ICLR 2022). Sampling: Song et al.,
"DDIM" (ICLR 2021); Lu et al., "DPM-Solver++" (2022), through diffusers. Learned variance: Nichol
and Dhariwal, "Improved DDPM" (ICML 2021). Weights by signal-to-noise ratio: Hang et al.,
"Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from synthcube.models import samplers
from synthcube.models.losses import LossConfig, Losses, WeightedLosses, at_least_float32
from synthcube.models.samplers import SAMPLERS, DiffusionSampler, NumSteps, Predict
from synthcube.schema import Schema

# What diffusers calls these.
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x_0": "sample"}
# Improved DDPM's weight of the variational bound, which is to guide the variance alone.
_BOUND_WEIGHT = 0.001


class DiffusionFields(Schema):
    """The diffusion's part of a family's config."""

    num_train_steps: NumSteps = Field(default=1000, description="Steps of the noise schedule.")
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
    min_snr_gamma: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None,
        description="Steps whose signal-to-noise ratio is above this (5 is usual) count less in "
        "the loss; null: all steps of `prediction` count alike.",
    )
    sampler: DiffusionSampler = Field(
        default="dpm-solver++",
        description=f"How images are drawn: {samplers.described('diffusion')}.",
    )
    num_sampling_steps: NumSteps | None = Field(
        default=None,
        description="Steps of the sampler; null: 20, with ddim 50, with ddpm all of the training.",
    )
    variance: Literal["fixed_small", "fixed_large", "learned"] = Field(
        default="fixed_small",
        description="Variance of the noise that sampler ddpm adds: the least or the most that fits "
        "the schedule, or what the network predicts between them.",
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
        """Steps of the sampler for an image."""
        default = SAMPLERS[self.sampler].num_steps or self.num_train_steps
        return self.num_sampling_steps or default

    def out_channels(self, channels: int) -> int:
        """Channels of the network's output, for data of `channels`."""
        return 2 * channels if self.variance == "learned" else channels

    def process(self, spatial_dims: int, *, bounded: bool) -> Diffusion:
        """The diffusion of data; `bounded` where they all lie in [-1, 1]."""
        return Diffusion(self, spatial_dims, bounded=bounded)

    def noise_schedule(self, *, bounded: bool = True) -> Any:
        """The scheduler of diffusers that noises training images and samples ancestrally."""
        variance = "learned_range" if self.variance == "learned" else self.variance
        settings = {"clip_sample": bounded, "variance_type": variance}
        return samplers.build("ddpm", "diffusion", **self._schedule_settings(), **settings)

    def solver(self, *, bounded: bool = True) -> Any:
        """A fresh scheduler of diffusers for sampling."""
        if self.sampler == "ddpm":
            return self.noise_schedule(bounded=bounded)
        return samplers.build(self.sampler, "diffusion", **self._schedule_settings())

    def draw(
        self, predict: Predict, start: Tensor, generators: Sequence[torch.Generator], *,
        bounded: bool,
    ) -> Tensor:  # fmt: skip
        """Data out of standard normal noise of the same shape, not clipped.

        Args:
            bounded: the data lie in [-1, 1].
        """
        solver = self.solver(bounded=bounded)
        return samplers.integrate(solver, predict, start, generators, self.sampling_steps)

    def _schedule_settings(self) -> dict[str, Any]:
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

    def loss(self, predict: Predict, x_0: Tensor) -> dict[str, Tensor]:
        """The scalar ``loss``, and its parts where the variance is learned.

        Args:
            predict: (x_t (B, C, *spatial), step (B,)) to what is predicted, of x_t's shape; twice
                the channels where the variance is learned.
            x_0: data, (B, C, *spatial).
        """
        epsilon = torch.randn_like(x_0)
        step = torch.randint(self.fields.num_train_steps, (len(x_0),), device=x_0.device)
        # Not by diffusers' own methods, which move the schedule to the device and keep it: in the
        # gradient of a single image, that would be a tensor of this computation.
        share = self._signal_share(step).to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1))
        signal, noise = share**0.5, (1 - share) ** 0.5
        x_t = signal * x_0 + noise * epsilon
        target = {"epsilon": epsilon, "x_0": x_0}.get(self.fields.prediction)
        if target is None:
            target = signal * epsilon - noise * x_0
        output = at_least_float32(predict(x_t, step.float()))
        prediction, variance = output[:, : x_0.shape[1]], output[:, x_0.shape[1] :]
        error = self.error(prediction, target, step)
        if self.fields.variance != "learned":
            return {"loss": error}
        bound = self.variational_bound(x_0, x_t, step, prediction.detach(), variance)
        return {"loss": error + _BOUND_WEIGHT * bound, "error": error, "bound": bound}

    def error(self, prediction: Tensor, target: Tensor, step: Tensor) -> Tensor:
        """The losses between two (B, C, *spatial), weighted by the step (B,) of each image."""
        if self.fields.min_snr_gamma is None:
            return self.criterion(prediction, target)
        # Image by image, because losses take no weights of images.
        pairs = zip(prediction.split(1), target.split(1), strict=True)
        errors = torch.stack([self.criterion(*pair) for pair in pairs])
        return (self.loss_weights(step) * errors).mean()

    def loss_weights(self, step: Tensor) -> Tensor:
        """Weight of the loss at each step, (B,) to (B,): Hang et al., with `min_snr_gamma`."""
        snr = self._signal_share(step)
        snr = snr / (1 - snr)
        # Their weight is of the error in x_0, which is that in epsilon by the signal-to-noise
        # ratio, and that in v by the ratio plus one.
        per_unit = {"x_0": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}
        return snr.clamp(max=self.fields.min_snr_gamma) / per_unit[self.fields.prediction]

    def variational_bound(
        self, x_0: Tensor, x_t: Tensor, step: Tensor, prediction: Tensor, variance: Tensor
    ) -> Tensor:
        """The variational bound in bits for each voxel: Nichol and Dhariwal, equations 4 to 6.

        Step 0 is left out, because no noise is drawn there.

        Args:
            x_0: data, (B, C, *spatial).
            x_t: the same, noised at `step` (B,).
            prediction: the half of the network's output that predicts.
            variance: the other half: -1 is the least variance, 1 the most, and logarithms between.
        """
        log_true, log_most, x_0_weight = self._posterior(step, x_0.ndim)
        log_predicted = log_true + (variance + 1) / 2 * (log_most - log_true)
        mean_error = x_0_weight * (x_0 - self._x_0(x_t, step, prediction))
        nats = 0.5 * (
            log_predicted - log_true + torch.expm1(log_true - log_predicted)
            + mean_error**2 * torch.exp(-log_predicted)
        )  # fmt: skip
        noisy = (step > 0).view(-1, *[1] * (x_0.ndim - 1))
        bits = torch.where(noisy, nats, 0.0).mean() / math.log(2)
        return bits * self.fields.num_train_steps

    def _signal_share(self, step: Tensor) -> Tensor:
        """Share of the data in the variance of x_t: alpha-bar of Ho et al., (B,)."""
        share: Tensor = self.noise_schedule.alphas_cumprod.to(step.device)[step]
        return share

    def _posterior(self, step: Tensor, ndim: int) -> tuple[Tensor, ...]:
        """Of x_{t-1} given x_t: log of its least and most variance, weight of x_0 in its mean;
        (B, 1, ...) each."""
        signal = self.noise_schedule.alphas_cumprod.double()
        before = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
        beta = 1 - signal / before
        least = (beta * (1 - before) / (1 - signal)).clamp(min=1e-20).log()
        x_0_weight = beta * before.sqrt() / (1 - signal)
        shape = (-1, *[1] * (ndim - 1))
        tables = (least, beta.log(), x_0_weight)
        return tuple(table.float().to(step.device)[step].view(shape) for table in tables)

    def _x_0(self, x_t: Tensor, step: Tensor, prediction: Tensor) -> Tensor:
        """The data that a prediction stands for, as the sampler takes them."""
        share = self._signal_share(step).view(-1, *[1] * (x_t.ndim - 1))
        signal, noise = share.sqrt(), (1 - share).sqrt()
        x_0 = prediction
        if self.fields.prediction == "epsilon":
            x_0 = (x_t - noise * prediction) / signal
        elif self.fields.prediction == "v":
            x_0 = signal * x_t - noise * prediction
        return x_0.clamp(-1, 1) if self.bounded else x_0
