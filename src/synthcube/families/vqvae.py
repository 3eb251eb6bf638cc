"""Vector-quantised autoencoder: van den Oord et al., "Neural Discrete Representation Learning"
(NeurIPS 2017), with the moving-average codebook of its appendix and the code revival of
Dhariwal et al., "Jukebox" (2020).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from monai.networks import nets
from pydantic import Field
from typing_extensions import Self

from synthcube.family import Family, FamilyConfig
from synthcube.losses import LossConfig, Losses, WeightedLosses, loss_faults
from synthcube.optimization import OptimizerConfig
from synthcube.schema import Batch, ImageSpec, List

# (stride, kernel, dilation, padding): halves every side exactly, and doubles it back.
_HALVE = (2, 4, 1, 1)
_DOUBLE = (2, 4, 1, 1, 0)


class VQVAEConfig(FamilyConfig):
    """Convolutional encoder and decoder around a codebook."""

    summary: ClassVar[str] = "compresses images into codes of a codebook, and reconstructs them"

    name: Literal["vqvae"] = Field(default="vqvae", description="Family of the model.")
    channels: Annotated[List[int], Field(min_length=1)] = Field(
        default=(64, 128), description="Channels at each level; each level halves every side."
    )
    num_res_layers: int = Field(default=2, ge=1, description="Residual units at each level.")
    num_embeddings: int = Field(default=256, ge=2, description="Codes in the codebook.")
    embedding_dim: int = Field(default=32, ge=1, description="Length of a code.")
    commitment_cost: float = Field(
        default=0.25, ge=0, description="Weight of the encoder's distance to its codes."
    )
    codebook_decay: float = Field(
        default=0.99, gt=0, lt=1, description="Decay of the codebook's moving average."
    )
    revive_below: float = Field(
        default=0.1,
        ge=0,
        description="A code used less often than this in a step, on average, is put on a random "
        "encoder output.",
    )
    losses: Losses = Field(
        default=(LossConfig(name="l1"),),
        description="Losses between image and reconstruction, added up with their weights.",
    )

    def build(self, image: ImageSpec) -> VQVAE:
        return VQVAE(self, image)

    @classmethod
    def tiny(cls) -> Self:
        return cls(
            channels=(8, 8), num_res_layers=1, num_embeddings=8, embedding_dim=4,
            optimizer=OptimizerConfig(lr=1e-3),
        )  # fmt: skip

    def faults(self, image: ImageSpec) -> list[str]:
        step = 2 ** len(self.channels)
        found = loss_faults(self.losses, image)
        if any(side % step for side in image.size):
            found.append(
                f"data.size {list(image.size)}: every side must be a multiple of {step}, because "
                f"model.channels has {len(self.channels)} levels"
            )
        return found


class VQVAE(Family):
    """Reconstruction loss plus commitment; the codebook follows by moving average."""

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        levels = len(config.channels)
        self.criterion = WeightedLosses(config.losses, image.rank)
        self.network = nets.VQVAE(
            spatial_dims=image.rank,
            in_channels=image.channels,
            out_channels=image.channels,
            channels=config.channels,
            num_res_layers=config.num_res_layers,
            num_res_channels=config.channels,
            downsample_parameters=(_HALVE,) * levels,
            upsample_parameters=(_DOUBLE,) * levels,
            num_embeddings=config.num_embeddings,
            embedding_dim=config.embedding_dim,
            commitment_cost=config.commitment_cost,
            decay=config.codebook_decay,
        )

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        x = batch["image"]
        z = self.network.encode(x)
        if self.training:
            self._revive_codes(z.detach())
        codes, commitment = self._quantize(z)
        reconstruction = self.network.decode(codes).float()
        error = self.criterion(reconstruction, x)
        return {
            "loss": error + commitment,
            "reconstruction": error,
            "commitment": commitment,
            "perplexity": self.network.quantizer.perplexity,
        }

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        codes, _ = self._quantize(self.network.encode(image))
        reconstruction: torch.Tensor = self.network.decode(codes)
        return reconstruction.float().clamp(-1, 1)

    def code_shape(self) -> tuple[int, ...]:
        step = 2 ** len(self.config.channels)
        return tuple(side // step for side in self.image.size)

    def num_codes(self) -> int:
        return self.config.num_embeddings

    def encode_codes(self, image: torch.Tensor) -> torch.Tensor:
        z = self.network.encode(image)
        with torch.autocast(z.device.type, enabled=False):
            codes: torch.Tensor = self.network.quantizer.quantize(z.float())
        return codes

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        embedded = self.network.quantizer.embed(codes)
        image: torch.Tensor = self.network.decode(embedded)
        return image.float().clamp(-1, 1)

    def _quantize(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # MONAI leaves autocast on for the CPU here, and a codebook averaged in bfloat16 drifts.
        with torch.autocast(z.device.type, enabled=False):
            codes, commitment = self.network.quantize(z.float())
        return codes, commitment

    @torch.no_grad()
    def _revive_codes(self, z: torch.Tensor) -> None:
        """Put unused codes on encoder outputs; before the first step that is all of them."""
        quantizer = self.network.quantizer.quantizer
        outputs = z.float().movedim(1, -1).reshape(-1, self.config.embedding_dim)
        picked = outputs[torch.randint(len(outputs), (len(quantizer.ema_w),), device=z.device)]
        if torch.distributed.is_initialized():  # the codebook is one, whoever revives a code
            torch.distributed.broadcast(picked, src=0)
        unused = quantizer.ema_cluster_size < self.config.revive_below
        quantizer.ema_cluster_size.masked_fill_(unused, 1.0)
        quantizer.ema_w.copy_(torch.where(unused[:, None], picked, quantizer.ema_w))
        quantizer.embedding.weight.copy_(
            torch.where(unused[:, None], picked, quantizer.embedding.weight)
        )
