"""A family of your own: a plain convolutional autoencoder, in one file outside the package.

synthcube train -c examples/own_family.yaml -d DATA -o RUN --plugins examples/plugins
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from synthcube.models.family import Family, FamilyConfig
from synthcube.schema import Batch, ImageSpec


class MyAutoencoderConfig(FamilyConfig):
    """One strided convolution down, one up, nothing else."""

    summary: ClassVar[str] = "a plain autoencoder, as an example"

    num_features: int = Field(default=16, ge=1, description="Channels of the bottleneck.")

    def build(self, image: ImageSpec) -> "MyAutoencoder":
        return MyAutoencoder(self, image)

    @classmethod
    def tiny(cls) -> "MyAutoencoderConfig":
        return cls(name="my_autoencoder:MyAutoencoderConfig", num_features=2)

    def faults(self, image: ImageSpec) -> list[str]:
        odd = [side for side in image.size if side % 2]
        return [f"data.size {list(image.size)}: every side must be even"] if odd else []


class MyAutoencoder(Family):
    """Having `reconstruct` is all it takes for `synthcube infer -d DATA` to work."""

    config: MyAutoencoderConfig

    def __init__(self, config: MyAutoencoderConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        down, up = {2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[
            image.rank
        ]
        self.network = nn.Sequential(
            down(image.channels, config.num_features, 4, stride=2, padding=1),
            nn.SiLU(),
            up(config.num_features, image.channels, 4, stride=2, padding=1),
            nn.Tanh(),
        )

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        decoded = self.network(batch["image"]).float()
        return {"loss": torch.nn.functional.l1_loss(decoded, batch["image"])}

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image).float()
