"""Rectified flow: straight paths from noise to data, of images or of latents.

Liu et al., "Flow Straight and Fast" (ICLR 2023). Training times come from a logit-normal, shifted
towards noise by resolution, as in Esser et al., "Scaling Rectified Flow Transformers" (ICML 2024,
section 5.3.2), but half as far, and with a wider spread: details need the early times as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from synthcube.models import samplers
from synthcube.models.losses import LossConfig, Losses, WeightedLosses, at_least_float32
from synthcube.models.samplers import FlowSampler, NumSteps, Predict
from synthcube.schema import Schema

# The network's time embedding was made for the steps of a diffusion, 0 to 1000.
TIME_SCALE = 1000
# Voxels of the images whose times need no shift; see docs/recipes.md.
_UNSHIFTED_VOXELS = 64 * 64


class FlowFields(Schema):
    """The flow's part of a family's config."""

    time_mean: float = Field(
        default=0.0, ge=-100, le=100, description="Mean of logit(t) while training."
    )
    time_std: float = Field(
        default=1.0, gt=0, le=100, description="Standard deviation of logit(t) while training."
    )
    time_shift: float | None = Field(
        default=None, ge=1, le=1000,
        description="Moves the times of training towards noise, by log(s) in the mean of logit(t) "
        "and by half of that in its deviation: the more voxels, the more noise an outline shows "
        "through. null: the fourth root of the number of voxels over 64x64, 1.4 for 128x128, 2.8 "
        "for 64x64x64; 1: none.",
    )  # fmt: skip
    losses: Losses = Field(
        default=(LossConfig(name="mse"),),
        description="Losses between predicted and true velocity, added up with their weights.",
    )
    sampler: FlowSampler = Field(
        default="dpm-solver++", description=f"Solver of the flow: {samplers.described('flow')}."
    )
    num_sampling_steps: NumSteps = Field(default=20, description="Steps of the solver.")

    def out_channels(self, channels: int) -> int:
        """Channels of the network's output, for data of `channels`."""
        return channels

    def process(self, spatial_dims: int, *, bounded: bool) -> Flow:
        """The flow; it is the same whether or not the data are bounded to [-1, 1]."""
        return Flow(self, spatial_dims)

    def shift_of(self, size: Sequence[int]) -> float:
        """`time_shift` for data of a spatial size."""
        return self.time_shift or max(1.0, (math.prod(size) / _UNSHIFTED_VOXELS) ** 0.25)

    def solver(self) -> Any:
        """A fresh scheduler of diffusers; its times are t * 1000."""
        return samplers.build(self.sampler, "flow", num_train_timesteps=TIME_SCALE)

    def draw(
        self, predict: Predict, start: Tensor, generators: Sequence[torch.Generator], *,
        bounded: bool,
    ) -> Tensor:  # fmt: skip
        """Data out of standard normal noise of the same shape, not clipped.

        Args:
            bounded: the data lie in [-1, 1], which a flow does not need to know.
        """
        steps = self.num_sampling_steps
        return samplers.integrate(self.solver(), predict, start, generators, steps)


class Flow:
    """x_t = (1 - t) x_0 + t noise; the network predicts the velocity noise - x_0."""

    def __init__(self, fields: FlowFields, spatial_dims: int, *, in_one_step: bool = False) -> None:
        """`in_one_step`: only the time t = 1 is trained."""
        self.fields = fields
        self.criterion = WeightedLosses(fields.losses, spatial_dims)
        self.in_one_step = in_one_step

    def loss(self, predict: Predict, x_0: Tensor, x_1: Tensor | None = None) -> dict[str, Tensor]:
        """The scalar ``loss`` between predicted and true velocity, at random times.

        Args:
            predict: (x_t (B, C, *spatial), 1000 t (B,)) to a velocity of x_t's shape.
            x_0: data, (B, C, *spatial), about as spread as standard normal noise or less.
            x_1: where the flow starts, of the same shape; None: at standard normal noise.
        """
        x_1 = torch.randn_like(x_0) if x_1 is None else x_1
        if self.in_one_step:
            t = x_0.new_ones(len(x_0))
        else:
            shift = math.log(self.fields.shift_of(x_0.shape[2:]))
            mean, std = self.fields.time_mean + shift, self.fields.time_std + shift / 2
            logit = mean + std * torch.randn(len(x_0), device=x_0.device)
            t = torch.sigmoid(logit)
        weight = t.view(-1, *[1] * (x_0.ndim - 1))
        velocity = predict((1 - weight) * x_0 + weight * x_1, t * TIME_SCALE)
        return {"loss": self.criterion(at_least_float32(velocity), x_1 - x_0)}
