"""Autoencoder with a regularised latent: Kingma and Welling, "Auto-Encoding Variational Bayes"
(ICLR 2014), as the first stage of Rombach et al., "Latent Diffusion Models" (CVPR 2022).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from monai.networks import nets
from pydantic import Field
from typing_extensions import Self

from synthcube.family import Family, FamilyConfig
from synthcube.schema import Batch, ImageSpec, List


class AutoencoderKLConfig(FamilyConfig):
    """Convolutional encoder and decoder around a latent grid."""

    summary: ClassVar[str] = "compresses images into a smaller grid of numbers, and reconstructs"

    name: Literal["autoencoder_kl"] = Field(
        default="autoencoder_kl", description="Family of the model."
    )
    channels: Annotated[List[int], Field(min_length=1)] = Field(
        default=(32, 64, 64), description="Channels at each level; all but the first halve sides."
    )
    num_res_blocks: int = Field(default=1, ge=1, description="Residual blocks at each level.")
    latent_channels: int = Field(default=3, ge=1, description="Channels of the latent.")
    num_norm_groups: int = Field(default=16, ge=1, description="Most groups of a group norm.")
    kl_weight: float = Field(default=1e-6, ge=0, description="Weight of the divergence.")

    def build(self, image: ImageSpec) -> AutoencoderKL:
        return AutoencoderKL(self, image)

    @classmethod
    def tiny(cls) -> Self:
        return cls(channels=(8, 8), latent_channels=2, num_norm_groups=2)

    def faults(self, image: ImageSpec) -> list[str]:
        step = 2 ** (len(self.channels) - 1)
        if any(side % step for side in image.size):
            return [
                f"data.size {list(image.size)}: every side must be a multiple of {step}, because "
                f"model.channels has {len(self.channels)} levels"
            ]
        return []


class AutoencoderKL(Family):
    """L1 reconstruction plus the divergence of the latent from a standard normal."""

    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.network: Any = nets.AutoencoderKL(
            spatial_dims=image.rank,
            in_channels=image.channels,
            out_channels=image.channels,
            num_res_blocks=config.num_res_blocks,
            channels=config.channels,
            attention_levels=(False,) * len(config.channels),
            latent_channels=config.latent_channels,
            norm_num_groups=math.gcd(config.num_norm_groups, *config.channels),
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        mean, std = (each.float() for each in self.network.encode(batch["image"]))
        latent = mean + std * torch.randn_like(mean)
        error = torch.nn.functional.l1_loss(self.network.decode(latent).float(), batch["image"])
        divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).flatten(1).sum(1).mean()
        return {
            "loss": error + self.config.kl_weight * divergence,
            "reconstruction": error,
            "divergence": divergence,
        }

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(image))

    def latent_shape(self) -> tuple[int, ...]:
        step = 2 ** (len(self.config.channels) - 1)
        return (self.config.latent_channels, *(side // step for side in self.image.size))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = self.network.encode(image)[0]
        return mean.float()

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.network.decode(latent)
        return image.float().clamp(-1, 1)
