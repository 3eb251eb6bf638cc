"""Denoising diffusion: Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS 2020).

v-prediction: Salimans and Ho, "Progressive Distillation" (ICLR 2022). Sampling: Song et al.,
"DDIM" (ICLR 2021); Lu et al., "DPM-Solver++" (2022), through diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.family import Family, FamilyConfig, noise
from synthcube.losses import LossConfig, Losses, WeightedLosses, loss_faults
from synthcube.nets.conditioning import GuidanceFields, dropped, guided
from synthcube.nets.solver import integrate
from synthcube.nets.unet import UNetFields, outputs_of
from synthcube.schema import Batch, Condition, ImageSpec

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x_0": "sample"}
_SAMPLING_STEPS = {"dpm-solver++": 20, "ddim": 50}


class DDPMConfig(UNetFields, GuidanceFields, FamilyConfig):
    """Noise-, velocity- or image-predicting U-Net in pixel space."""

    summary: ClassVar[str] = "denoising diffusion with the classic noise schedules and samplers"

    name: Literal["ddpm"] = Field(default="ddpm", description="Family of the model.")
    num_train_steps: int = Field(default=1000, ge=2, description="Steps of the noise schedule.")
    schedule: Literal["linear", "scaled_linear", "cosine"] = Field(
        default="cosine", description="Noise schedule."
    )
    prediction: Literal["epsilon", "v", "x_0"] = Field(
        default="v", description="What the network predicts: noise, velocity or image."
    )
    losses: Losses = Field(
        default=(LossConfig(name="mse"),),
        description="Losses between prediction and truth, added up with their weights.",
    )
    sampler: Literal["dpm-solver++", "ddim", "ddpm"] = Field(
        default="dpm-solver++", description="How images are drawn."
    )
    num_sampling_steps: int | None = Field(
        default=None,
        ge=2,
        description="Network calls for an image; null: 20 (dpm-solver++), 50 (ddim), "
        "all training steps (ddpm).",
    )

    @model_validator(mode="after")
    def _ancestral_takes_every_step(self) -> Self:
        # With fewer steps ancestral sampling never reaches clean images: the spread of exact
        # Gaussian data comes out as 0.21 instead of 0.25 at 50 of 1000 steps.
        if self.sampler == "ddpm" and self.sampling_steps < self.num_train_steps:
            raise ValueError(
                f"sampler ddpm needs all {self.num_train_steps} steps, num_sampling_steps is "
                f"{self.num_sampling_steps}: leave it out, or use dpm-solver++ or ddim"
            )
        return self

    @property
    def sampling_steps(self) -> int:
        """Network calls for an image."""
        default = _SAMPLING_STEPS.get(self.sampler, self.num_train_steps)
        return self.num_sampling_steps or default

    def build(self, image: ImageSpec) -> DDPM:
        return DDPM(self, image)

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            channels=(8, 8), num_res_blocks=1, attention_from=1, num_norm_groups=2,
            num_sampling_steps=3,
        )  # fmt: skip

    def faults(self, image: ImageSpec) -> list[str]:
        return [*self.network_faults(image), *loss_faults(self.losses, image)]

    def noise_schedule(self) -> Any:
        """The scheduler of diffusers that noises training images and samples ancestrally."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(**self._shared(), timestep_spacing="trailing")

    def solver(self) -> Any:
        """A fresh scheduler of diffusers for sampling."""
        from diffusers import DPMSolverMultistepScheduler

        if self.sampler == "ddpm":
            return self.noise_schedule()
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
            "beta_schedule": _SCHEDULES[self.schedule],
            "prediction_type": _PREDICTIONS[self.prediction],
        }


class DDPM(Family):
    """Predicts what was added to an image at a random step of the noise schedule."""

    config: DDPMConfig

    def __init__(self, config: DDPMConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.network = config.build_network(image)
        self.criterion = WeightedLosses(config.losses, image.rank)
        self.noise_schedule = config.noise_schedule()

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        x_0 = batch["image"]
        epsilon = torch.randn_like(x_0)
        step = torch.randint(self.config.num_train_steps, (len(x_0),), device=x_0.device)
        x_t = self.noise_schedule.add_noise(x_0, epsilon, step)
        target = epsilon
        if self.config.prediction == "v":
            target = self.noise_schedule.get_velocity(x_0, epsilon, step)
        elif self.config.prediction == "x_0":
            target = x_0
        condition = dropped(batch["condition"], self.config.condition_dropout)
        prediction = self.network(x_t, step.float(), condition).float()
        return {"loss": self.criterion(prediction, target)}

    def legacy_network(self) -> torch.nn.Module:
        return self.config.build_legacy_network(self.image)

    def outputs_of(
        self, legacy: torch.nn.Module, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs_of(self.network, legacy, self.image, generator)

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> torch.Tensor:
        start = noise(generators, self.image).to(self.device)
        predict = guided(self.network, condition, self.config.guidance)
        x_0 = integrate(
            self.config.solver(), predict, start, generators, self.config.sampling_steps
        )
        return x_0.clamp(-1, 1)
