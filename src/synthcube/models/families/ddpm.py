"""Denoising diffusion in pixel space: Ho et al., "Denoising Diffusion Probabilistic Models" (2020).

The process is that of synthcube.models.diffusion.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from synthcube.models.diffusion import DiffusionFields
from synthcube.models.nets.unet import PixelConfig, PixelFamily, outputs_of
from synthcube.schema import ImageSpec


class DDPMConfig(DiffusionFields, PixelConfig):
    """Noise-, velocity- or image-predicting U-Net in pixel space."""

    summary: ClassVar[str] = "denoising diffusion with the classic noise schedules and samplers"

    name: Literal["ddpm"] = Field(default="ddpm", description="Family of the model.")

    def build(self, image: ImageSpec) -> DDPM:
        return DDPM(self, image)


class DDPM(PixelFamily):
    """Predicts what was added to an image at a random step of the noise schedule."""

    def legacy_network(self) -> torch.nn.Module:
        network: torch.nn.Module = self.config.build_legacy_network(self.image)
        return network

    def outputs_of(
        self, legacy: torch.nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return outputs_of(self.network, legacy, self.image, generator)
