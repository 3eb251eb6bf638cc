"""Rectified flow in pixel space: straight paths from noise to image, the default family.

Liu et al., "Flow Straight and Fast" (ICLR 2023); the process is that of synthcube.models.flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from synthcube.models.family import Family, FamilyConfig
from synthcube.models.flow import FlowFields
from synthcube.models.losses import loss_faults
from synthcube.models.nets.conditioning import GuidanceFields, dropped, guided
from synthcube.models.nets.unet import UNetFields
from synthcube.models.samplers import noise
from synthcube.schema import Batch, Condition, ImageSpec


class RectifiedFlowConfig(FlowFields, UNetFields, GuidanceFields, FamilyConfig):
    """Velocity-predicting U-Net in pixel space."""

    summary: ClassVar[str] = "straight paths from noise to image; good in 20 steps (the default)"

    name: Literal["rectified_flow"] = Field(
        default="rectified_flow", description="Family of the model."
    )

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


class RectifiedFlow(Family):
    """x_t = (1 - t) x_0 + t noise; the network predicts the velocity noise - x_0."""

    config: RectifiedFlowConfig

    def __init__(self, config: RectifiedFlowConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.network = config.build_network(image)
        self.process = config.process(image.rank, bounded=True)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        condition = dropped(batch["condition"], self.config.condition_dropout)
        return self.process.loss(
            lambda x_t, time: self.network(x_t, time, condition), batch["image"]
        )

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        start = noise(generators, (self.image.channels, *self.image.size)).to(self.device)
        predict = guided(self.network, condition, self.config.guidance)
        return self.config.draw(predict, start, generators, bounded=True).clamp(-1, 1)
