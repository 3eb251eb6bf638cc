"""Denoising diffusion in pixel space: Ho et al., "Denoising Diffusion Probabilistic Models" (2020).

The process is that of synthcube.models.diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from synthcube.models.diffusion import DiffusionFields
from synthcube.models.family import Family, FamilyConfig
from synthcube.models.losses import loss_faults
from synthcube.models.nets.conditioning import GuidanceFields, dropped, guided
from synthcube.models.nets.unet import UNetFields, outputs_of
from synthcube.models.samplers import noise
from synthcube.schema import Batch, Condition, ImageSpec


class DDPMConfig(DiffusionFields, UNetFields, GuidanceFields, FamilyConfig):
    """Noise-, velocity- or image-predicting U-Net in pixel space."""

    summary: ClassVar[str] = "denoising diffusion with the classic noise schedules and samplers"

    name: Literal["ddpm"] = Field(default="ddpm", description="Family of the model.")

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


class DDPM(Family):
    """Predicts what was added to an image at a random step of the noise schedule."""

    config: DDPMConfig

    def __init__(self, config: DDPMConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.network = config.build_network(image, config.out_channels(image.channels))
        self.process = config.process(image.rank, bounded=True)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        condition = dropped(batch["condition"], self.config.condition_dropout)
        return self.process.loss(
            lambda x_t, time: self.network(x_t, time, condition), batch["image"]
        )

    def legacy_network(self) -> torch.nn.Module:
        return self.config.build_legacy_network(self.image)

    def outputs_of(
        self, legacy: torch.nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return outputs_of(self.network, legacy, self.image, generator)

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        start = noise(generators, (self.image.channels, *self.image.size)).to(self.device)
        predict = guided(self.network, condition, self.config.guidance, self.image.channels)
        return self.config.draw(predict, start, generators, bounded=True).clamp(-1, 1)
