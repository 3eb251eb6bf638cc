"""A family of a user's own, with torch's batch norms and without noise: see training/."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from synthcube.models.family import Family, FamilyConfig
from synthcube.schema import Batch, ImageSpec


class NormedConfig(FamilyConfig):
    """Two convolutions around a batch norm."""

    name: Literal["normed_family:NormedConfig"] = Field(
        default="normed_family:NormedConfig", description="Family of the model."
    )

    def build(self, image: ImageSpec) -> Normed:
        return Normed(self, image)

    @classmethod
    def tiny(cls) -> NormedConfig:
        return cls()


class Normed(Family):
    """Reconstructs an image."""

    def __init__(self, config: NormedConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.network = torch.nn.Sequential(
            torch.nn.Conv2d(image.channels, 4, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, image.channels, 3, padding=1),
        )

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": (self.reconstruct(batch["image"]) - batch["image"]).square().mean()}

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.network(image)
        return output
