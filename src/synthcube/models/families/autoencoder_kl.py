"""Autoencoder with a continuous latent: the first stage of latent diffusion.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022); the
variational bound is that of Kingma and Welling (ICLR 2014), with a very small weight.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from monai.networks import nets
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from synthcube.models.autoencoder import Autoencoder, AutoencoderConfig
from synthcube.models.family import size_faults
from synthcube.models.losses import at_least_float32
from synthcube.models.nets.tiling import decode_in_tiles
from synthcube.models.optimizers import OptimizerConfig
from synthcube.schema import Depth, ImageSpec, Level, Levels, Voxels, Weight, Width


class AutoencoderKLConfig(AutoencoderConfig):
    """Convolutional encoder and decoder around a normally distributed latent."""

    summary: ClassVar[str] = "compresses images into a small grid of numbers, for latent diffusion"

    name: Literal["autoencoder_kl"] = Field(
        default="autoencoder_kl", description="Family of the model."
    )
    channels: Annotated[Levels, Field(min_length=2)] = Field(
        default=(32, 64, 128),
        description="Channels at each level, full resolution first; each level after the first "
        "halves every side.",
    )
    num_res_blocks: Depth = Field(default=1, description="Residual blocks at each level.")
    latent_channels: Width = Field(default=4, description="Channels of the latent.")
    kl_weight: Weight = Field(
        default=1e-6,
        description="Weight of the divergence, summed over the latent, from a standard normal "
        "distribution.",
    )
    attention_from: Level | None = Field(
        default=None,
        description="First level with self-attention (0 is full resolution); null: none.",
    )
    num_norm_groups: Width = Field(
        default=32, description="Most groups of a group norm; lowered to divide model.channels."
    )
    decode_voxels: Voxels = Field(
        default=128**3,
        description="Most voxels that are decoded at once; levels of a larger image are decoded in "
        "tiles, to the same image with less memory in two to four times the time.",
    )

    def build(self, image: ImageSpec) -> AutoencoderKL:
        return AutoencoderKL(self, image)

    @classmethod
    def tiny(cls) -> Self:
        fast = OptimizerConfig(lr=1e-3)
        return cls(channels=(8, 8), latent_channels=2, num_norm_groups=2, optimizer=fast)

    def faults(self, image: ImageSpec) -> list[str]:
        return super().faults(image) + size_faults(image, self.factor, len(self.channels))

    def network_settings(self, image: ImageSpec) -> dict[str, Any]:
        """Arguments of MONAI's AutoencoderKL for such images."""
        levels = range(len(self.channels))
        first = len(levels) if self.attention_from is None else self.attention_from
        return {
            "spatial_dims": image.rank,
            "in_channels": image.channels,
            "out_channels": image.channels,
            "channels": self.channels,
            "num_res_blocks": (self.num_res_blocks,) * len(levels),
            "attention_levels": tuple(level >= first for level in levels),
            "latent_channels": self.latent_channels,
            "norm_num_groups": math.gcd(self.num_norm_groups, *self.channels),
            "with_encoder_nonlocal_attn": False,
            "with_decoder_nonlocal_attn": False,
        }

    @property
    def factor(self) -> int:
        """How many times shorter each side of the latent is than that of the image."""
        return 1 << (len(self.channels) - 1)


class AutoencoderKL(Autoencoder):
    """Reconstruction from a sample of the latent, plus the divergence of its distribution."""

    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        settings = config.network_settings(image)
        self.network = nets.AutoencoderKL(**settings, use_flash_attention=True)

    def autoencode(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std = (at_least_float32(latent) for latent in self.network.encode(image))
        reconstruction = at_least_float32(self.network.decode(mean + std * torch.randn_like(std)))
        error, divergence = self.criterion(reconstruction, image), kl_divergence(mean, std)
        loss = error + self.config.kl_weight * divergence
        return reconstruction, {"loss": loss, "reconstruction": error, "kl": divergence}

    def outputs_of(
        self, legacy: torch.nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        image = torch.randn(2, self.image.channels, *self.image.size, generator=generator)
        theirs: Any = legacy
        return self.network.reconstruct(image), theirs.reconstruct(image)

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))

    def latent_shape(self) -> tuple[int, ...]:
        factor = self.config.factor
        return (self.config.latent_channels, *(side // factor for side in self.image.size))

    def encode(self, image: Tensor) -> Tensor:
        return self.network.encode(image)[0].float()

    def decode(self, latent: Tensor) -> Tensor:
        at_once = max(1, self.config.decode_voxels // math.prod(self.image.size))
        images = []
        for part in latent.split(at_once):
            features = self.network.post_quant_conv(part)
            decoder = self.network.decoder
            images.append(decode_in_tiles(decoder, features, self.config.decode_voxels))
        return torch.cat(images).float().clamp(-1, 1)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """Divergence of N(mean, std^2), (B, ...) each, from N(0, 1): summed over the latent, averaged
    over the batch."""
    nats = 0.5 * (mean.square() + std.square() - 1) - std.log()
    return nats.flatten(1).sum(dim=1).mean()
