"""Rectified flow: straight paths from noise to image, the default family.

Liu et al., "Flow Straight and Fast" (ICLR 2023); times from a logit-normal as in Esser et al.,
"Scaling Rectified Flow Transformers" (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import Self

from synthcube.family import Family, FamilyConfig, noise
from synthcube.losses import LossConfig, Losses, WeightedLosses, loss_faults
from synthcube.nets.conditioning import GuidanceFields, dropped, guided
from synthcube.nets.solver import integrate
from synthcube.nets.unet import UNetFields
from synthcube.schema import Batch, Condition, ImageSpec

# The network's time embedding was made for the steps of a diffusion, 0 to 1000.
TIME_SCALE = 1000


class RectifiedFlowConfig(UNetFields, GuidanceFields, FamilyConfig):
    """Velocity-predicting U-Net in pixel space."""

    summary: ClassVar[str] = "straight paths from noise to image; good in 20 steps (the default)"

    name: Literal["rectified_flow"] = Field(
        default="rectified_flow", description="Family of the model."
    )
    time_mean: float = Field(default=0.0, description="Mean of logit(t) while training.")
    time_std: float = Field(
        default=1.0, gt=0, description="Standard deviation of logit(t) while training."
    )
    losses: Losses = Field(
        default=(LossConfig(name="mse"),),
        description="Losses between predicted and true velocity, added up with their weights.",
    )
    sampler: Literal["dpm-solver++", "euler", "heun"] = Field(
        default="dpm-solver++",
        description="Solver of the flow: dpm-solver++ (second order, one network call a step), "
        "euler (first order) or heun (second order, two calls a step).",
    )
    num_sampling_steps: int = Field(default=20, ge=2, description="Steps of the solver.")

    def build(self, image: ImageSpec) -> RectifiedFlow:
        return RectifiedFlow(self, image)

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            channels=(8, 8), num_res_blocks=1, attention_from=1, num_norm_groups=2,
            num_sampling_steps=3,
        )  # fmt: skip

    def faults(self, image: ImageSpec) -> list[str]:
        return [*self.network_faults(image), *loss_faults(self.losses, image)]

    def solver(self) -> Any:
        """A fresh scheduler of diffusers; its times are t * 1000."""
        from diffusers import (
            DPMSolverMultistepScheduler,
            FlowMatchEulerDiscreteScheduler,
            FlowMatchHeunDiscreteScheduler,
        )

        if self.sampler == "euler":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIME_SCALE)
        if self.sampler == "heun":
            return FlowMatchHeunDiscreteScheduler(num_train_timesteps=TIME_SCALE)
        return DPMSolverMultistepScheduler(
            num_train_timesteps=TIME_SCALE, prediction_type="flow_prediction", use_flow_sigmas=True
        )


class RectifiedFlow(Family):
    """x_t = (1 - t) x_0 + t noise; the network predicts the velocity noise - x_0."""

    config: RectifiedFlowConfig

    def __init__(self, config: RectifiedFlowConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.network = config.build_network(image)
        self.criterion = WeightedLosses(config.losses, image.rank)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        x_0 = batch["image"]
        x_1 = torch.randn_like(x_0)
        logit = torch.randn(len(x_0), device=x_0.device)
        t = torch.sigmoid(self.config.time_mean + self.config.time_std * logit)
        weight = t.view(-1, *[1] * (x_0.ndim - 1))
        condition = dropped(batch["condition"], self.config.condition_dropout)
        velocity = self.network((1 - weight) * x_0 + weight * x_1, t * TIME_SCALE, condition)
        return {"loss": self.criterion(velocity.float(), x_1 - x_0)}

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> torch.Tensor:
        start = noise(generators, self.image).to(self.device)
        predict = guided(self.network, condition, self.config.guidance)
        x_0 = integrate(
            self.config.solver(), predict, start, generators, self.config.num_sampling_steps
        )
        return x_0.clamp(-1, 1)
