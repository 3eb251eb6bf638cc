"""Vector-quantised autoencoder: van den Oord et al., "Neural Discrete Representation Learning"
(NeurIPS 2017), with the moving-average codebook of its appendix and the code revival of
Dhariwal et al., "Jukebox" (2020). With a discriminator it is the VQ-GAN of Esser et al., "Taming
Transformers for High-Resolution Image Synthesis" (CVPR 2021).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from monai.networks import nets
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from synthcube.models.autoencoder import Autoencoder, AutoencoderConfig
from synthcube.models.family import size_faults
from synthcube.models.losses import at_least_float32
from synthcube.models.optimizers import OptimizerConfig
from synthcube.schema import Depth, ImageSpec, Levels, Pair, Weight, Width

# (stride, kernel, dilation, padding): halves every side exactly, and doubles it back.
_HALVE = (2, 4, 1, 1)
_DOUBLE = (2, 4, 1, 1, 0)


class VQVAEConfig(AutoencoderConfig):
    """Convolutional encoder and decoder around a codebook."""

    summary: ClassVar[str] = "compresses images into codes of a codebook, and reconstructs them"
    not_averaged: ClassVar[str] = (
        "the codes of its codebook come to mean something else at each site, so that their "
        "average means nothing; use autoencoder_kl"
    )
    not_private: ClassVar[str] = (
        "its codebook follows the images without a gradient, so that nothing bounds what it takes "
        "from one subject; use autoencoder_kl"
    )

    name: Literal["vqvae"] = Field(default="vqvae", description="Family of the model.")
    channels: Levels = Field(
        default=(64, 128), description="Channels at each level; each level halves every side."
    )
    num_res_layers: Depth = Field(default=2, description="Residual units at each level.")
    num_embeddings: int = Field(default=256, ge=2, le=65536, description="Codes in the codebook.")
    embedding_dim: Width = Field(default=32, description="Length of a code.")
    commitment_cost: Weight = Field(
        default=0.25, description="Weight of the encoder's distance to its codes."
    )
    codebook_decay: float = Field(
        default=0.99, gt=0, lt=1, description="Decay of the codebook's moving average."
    )
    revive_below: Weight = Field(
        default=0.1,
        description="A code used less often than this in a step, on average, is replaced by a "
        "random encoder output.",
    )
    network_range: Pair = Field(
        default=(-1.0, 1.0),
        description="What the network gets and gives for -1 and 1 of the images; other than that "
        "only in imported and migrated models, for which import and migrate set it.",
    )

    @model_validator(mode="after")
    def _network_range_rises(self) -> Self:
        low, high = self.network_range
        if not low < high:
            raise ValueError(f"network_range {low:g}, {high:g}: the first must be the smaller")
        return self

    def build(self, image: ImageSpec) -> VQVAE:
        return VQVAE(self, image)

    def network_settings(self, image: ImageSpec) -> dict[str, Any]:
        """Arguments of MONAI's VQVAE for such images."""
        levels = len(self.channels)
        return {
            "spatial_dims": image.rank,
            "in_channels": image.channels,
            "out_channels": image.channels,
            "channels": self.channels,
            "num_res_layers": self.num_res_layers,
            "num_res_channels": self.channels,
            "downsample_parameters": (_HALVE,) * levels,
            "upsample_parameters": (_DOUBLE,) * levels,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "commitment_cost": self.commitment_cost,
            "decay": self.codebook_decay,
        }

    @classmethod
    def tiny(cls) -> Self:
        fast = OptimizerConfig(lr=1e-3)
        return cls(
            channels=(8, 8), num_res_layers=1, num_embeddings=8, embedding_dim=4, optimizer=fast
        )

    def faults(self, image: ImageSpec) -> list[str]:
        levels = len(self.channels)
        return super().faults(image) + size_faults(image, 2**levels, levels)


class VQVAE(Autoencoder):
    """Reconstruction loss plus commitment; the codebook follows by moving average."""

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.network = nets.VQVAE(**config.network_settings(image))

    def autoencode(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.network.encode(self._to_network(image))
        if self.network.quantizer.training:  # which a frozen one is not
            self._revive_codes(z.detach())
        # MONAI leaves autocast on for the CPU here, and a codebook averaged in bfloat16 drifts.
        with torch.autocast(z.device.type, enabled=False):
            quantized, commitment, codes = self.network.quantizer.quantizer(z.float())
        reconstruction = self._from_network(self.network.decode(quantized))
        error = self.criterion(reconstruction, image)
        terms = {"loss": error + commitment, "reconstruction": error, "commitment": commitment}
        perplexity, codes_used = codebook_usage(codes, self.config.num_embeddings)
        return reconstruction, {**terms, "perplexity": perplexity, "codes_used": codes_used}

    def outputs_of(
        self, legacy: torch.nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        image = torch.randn(2, self.image.channels, *self.image.size, generator=generator)
        return self.network(image)[0], legacy(image)[0]

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.decode_codes(self.encode_codes(image))

    def latent_shape(self) -> tuple[int, ...]:
        return (self.config.embedding_dim, *self.code_shape())

    def encode(self, image: Tensor) -> Tensor:
        """The latent before it is quantised."""
        return self.network.encode(self._to_network(image)).float()

    def decode(self, latent: Tensor) -> Tensor:
        """The image of the codes that are nearest to the latent."""
        return self.decode_codes(self._nearest(latent))

    def code_shape(self) -> tuple[int, ...]:
        return tuple(side // 2 ** len(self.config.channels) for side in self.image.size)

    def num_codes(self) -> int:
        return self.config.num_embeddings

    def encode_codes(self, image: Tensor) -> Tensor:
        return self._nearest(self.encode(image))

    def decode_codes(self, codes: Tensor) -> Tensor:
        image = self._from_network(self.network.decode(self.network.quantizer.embed(codes)))
        return image.float().clamp(-1, 1)

    # Exactly the identity for -1 to 1, and not folded into the outer layers: they pad with zeros.
    def _to_network(self, image: Tensor) -> Tensor:
        low, high = self.config.network_range
        return image * ((high - low) / 2) + (high + low) / 2

    def _from_network(self, output: Tensor) -> Tensor:
        low, high = self.config.network_range
        return (at_least_float32(output) - (high + low) / 2) / ((high - low) / 2)

    def _nearest(self, z: Tensor) -> Tensor:
        # MONAI's index_quantize would move the codebook too.
        with torch.autocast(z.device.type, enabled=False):
            codes: Tensor = self.network.quantizer.quantizer.quantize(z.float())[2]
        return codes

    @torch.no_grad()
    def _revive_codes(self, z: Tensor) -> None:
        """Replace unused codes by encoder outputs; before the first step that is all of them."""
        quantizer = self.network.quantizer.quantizer
        outputs = z.float().movedim(1, -1).reshape(-1, self.config.embedding_dim)
        picked = outputs[torch.randint(len(outputs), (len(quantizer.ema_w),), device=z.device)]
        if torch.distributed.is_initialized():  # the codebook is one, whoever revives a code
            torch.distributed.broadcast(picked, src=0)
        unused = quantizer.ema_cluster_size < self.config.revive_below
        quantizer.ema_cluster_size.masked_fill_(unused, 1.0)
        quantizer.ema_w.copy_(torch.where(unused[:, None], picked, quantizer.ema_w))
        weight = quantizer.embedding.weight
        weight.copy_(torch.where(unused[:, None], picked, weight))


def codebook_usage(codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Perplexity of the codes of a batch (1 to `num_codes`), and the share of codes among them.

    The perplexity is the number of codes that, used equally often, would have the same entropy.
    """
    counts = torch.zeros(num_codes, device=codes.device)
    counts = counts.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten()).to(counts))
    share = counts / codes.numel()
    return torch.special.entr(share).sum().exp(), (counts > 0).float().mean()
