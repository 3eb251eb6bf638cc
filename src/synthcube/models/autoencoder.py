"""What autoencoders share: losses beside the distance of image and reconstruction.

Each is off unless it has a weight. Adversarial, from the patches of an image: Isola et al. (CVPR
2017), as in VQ-GAN (Esser et al., "Taming Transformers", CVPR 2021). Spectral: Dhariwal et al.,
"Jukebox" (2020), section 3.3. Perceptual: LPIPS (Zhang et al., CVPR 2018). Used together in the
KL-autoencoder of latent diffusion (Rombach et al., CVPR 2022).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from monai.losses import JukeboxLoss
from monai.networks.nets import PatchDiscriminator
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from synthcube.models import adversarial
from synthcube.models.adversarial import AdversarialFamily, AdversarialLoss, DiscriminatorFields
from synthcube.models.family import FamilyConfig
from synthcube.models.losses import (
    LossConfig,
    Losses,
    WeightedLosses,
    at_least_float32,
    loss_faults,
)
from synthcube.models.nets.norm import share_statistics
from synthcube.models.nets.perceptual import PerceptualDistance, require_efficientnet
from synthcube.schema import Batch, Depth, ImageSpec, StepNumber, Weight, Width


class SpectralLoss(JukeboxLoss):
    """Mean squared difference of the amplitudes of two (B, C, *spatial); blind to phases.

    The transform runs over the channels and `spatial_dims` axes after them, orthonormally, so that
    the loss is at most the mean squared difference of the images.
    """

    def _get_fft_amplitude(self, images: Tensor) -> Tensor:
        # MONAI's square root has no gradient where an amplitude is 0, as in an empty image: NaN.
        transformed: Tensor = torch.fft.fftn(
            at_least_float32(images), s=self.fft_signal_size, dim=self.fft_dim, norm=self.fft_norm
        )
        return transformed.abs()


class AutoencoderConfig(DiscriminatorFields, FamilyConfig):
    """The part of an autoencoder's config that says what a good reconstruction is."""

    losses: Losses = Field(
        default=(LossConfig(name="l1"),),
        description="Losses between image and reconstruction, added up with their weights.",
    )
    adversarial_weight: Weight = Field(
        default=0.0,
        description="Weight of the adversarial loss of the reconstructions, which sharpens them; "
        "0.01 is a good start, 0 trains without a discriminator.",
    )
    adversarial_from_step: StepNumber = Field(
        default=1000, description="Steps that are trained before the discriminator joins."
    )
    adversarial_loss: AdversarialLoss = Field(
        default="least_squares", description="Loss of generator and discriminator."
    )
    discriminator_channels: Width = Field(
        default=32, description="Channels of the discriminator's first layer."
    )
    num_discriminator_layers: Depth = Field(
        default=3,
        description="Most layers of the discriminator, each of which doubles the side of the "
        "patches that it sees; lowered for small images.",
    )
    discriminator_norm: Literal["instance", "batch"] = Field(
        default="instance",
        description="Norm of the discriminator: of each image alone, or over a batch, as "
        "monai-generative's had it.",
    )
    perceptual_weight: Weight = Field(
        default=0.0,
        description="Weight of the distance in the features of a network trained on photographs; "
        "needs the extra synthcube[perceptual].",
    )
    spectral_weight: Weight = Field(
        default=0.0, description="Weight of the distance between the amplitudes of the frequencies."
    )

    def faults(self, image: ImageSpec) -> list[str]:
        return loss_faults(self.losses, image)

    def optimizes_by_hand(self) -> bool:
        return self.adversarial_weight > 0

    @abstractmethod
    def network_settings(self, image: ImageSpec) -> dict[str, Any]:
        """Arguments of MONAI's network for such images, those that monai-generative has too."""

    def resolved(self) -> Self:
        if self.perceptual_weight:
            require_efficientnet("model.perceptual_weight", "set it to 0")
        return super().resolved()

    def build_discriminator(self, image: ImageSpec) -> torch.nn.Module:
        """The discriminator of patches of such images."""
        settings = self.discriminator_settings(image)
        channels = settings.pop("num_channels")
        return share_statistics(PatchDiscriminator(channels=channels, **settings))

    def discriminator_settings(self, image: ImageSpec) -> dict[str, Any]:
        """Arguments of monai-generative's PatchDiscriminator for such images."""
        # The last layer has two voxels along the shortest side at least.
        deepest = max(0, int(math.log2(max(1, min(image.size) / 4))))
        return {
            "spatial_dims": image.rank,
            "num_channels": self.discriminator_channels,
            "in_channels": image.channels,
            "num_layers_d": min(self.num_discriminator_layers, deepest),
            "norm": self.discriminator_norm.upper(),
        }


class Autoencoder(AdversarialFamily):
    """Trains on its own losses, and on the shared ones that have a weight.

    ``loss``, which is validated, is without the adversarial loss: it means the same in every epoch.
    """

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.criterion = WeightedLosses(config.losses, image.rank)
        self._spectral = SpectralLoss(image.rank) if config.spectral_weight else None
        self._perceptual: PerceptualDistance | None = None
        if config.adversarial_weight:
            self.train_against(config.build_discriminator(image))

    @abstractmethod
    def autoencode(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction, (B, C, *spatial), float32; and scalars by name, as of ``loss``."""

    def legacy_network(self) -> torch.nn.Module:
        """The same network, untrained, as monai-generative builds it; see legacy.Imports."""
        from generative.networks import nets

        settings = self.config.network_settings(self.image)
        kind = getattr(nets, type(self.network).__name__)
        network: torch.nn.Module = kind(num_channels=settings.pop("channels"), **settings)
        return network

    def discriminator_import(self) -> ImportedDiscriminator | None:
        """The discriminator, for weights of monai-generative; see legacy.ImportsDiscriminator."""
        return None if self.discriminator is None else ImportedDiscriminator(self)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return self._reconstruction_loss(batch["image"])[0]

    def generator_loss(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        terms, reconstruction = self._reconstruction_loss(batch["image"])
        if self.trains_discriminator():
            logits = self._logits(reconstruction)
            loss = adversarial.generator_term(logits, self.config.adversarial_loss)
            terms["adversarial"] = loss
            terms["loss"] = terms["loss"] + self.config.adversarial_weight * loss
        return terms, reconstruction

    def discriminator_loss(self, batch: Batch, generated: Tensor) -> dict[str, Tensor]:
        real, fake = self._logits(batch["image"]), self._logits(generated)
        loss = adversarial.discriminator_term(real, fake, self.config.adversarial_loss)
        return {"loss": loss}

    def trains_discriminator(self) -> bool:
        return self.global_step >= self.config.adversarial_from_step

    def _reconstruction_loss(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        reconstruction, terms = self.autoencode(image)
        if self._spectral is not None:
            terms["spectral"] = self._spectral(reconstruction, image)
            terms["loss"] = terms["loss"] + self.config.spectral_weight * terms["spectral"]
        if self.config.perceptual_weight:
            # On first use: who samples from a trained model does not need its packages.
            self._perceptual = self._perceptual or PerceptualDistance()
            terms["perceptual"] = self._perceptual(reconstruction, image)
            terms["loss"] = terms["loss"] + self.config.perceptual_weight * terms["perceptual"]
        return terms, reconstruction

    def _logits(self, image: Tensor) -> Tensor:
        discriminator: Any = self.discriminator
        logits: Tensor = discriminator(image)[-1]
        return logits


class ImportedDiscriminator:
    """An autoencoder's discriminator as legacy.Imports describes it."""

    def __init__(self, family: Autoencoder) -> None:
        self.config, self.image = family.config, family.image
        network: Any = family.discriminator
        self.network: torch.nn.Module = network

    def legacy_network(self) -> torch.nn.Module:
        from generative.networks.nets import PatchDiscriminator as Legacy

        network: torch.nn.Module = Legacy(**self.config.discriminator_settings(self.image))
        return network

    def outputs_of(
        self, legacy: torch.nn.Module, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Outputs of every layer for one random input, the logits last."""
        image = torch.randn(2, self.image.channels, *self.image.size, generator=generator)
        outputs = [network(image) for network in (self.network, legacy)]
        ours, theirs = (torch.cat([layer.flatten() for layer in layers]) for layers in outputs)
        return ours, theirs
