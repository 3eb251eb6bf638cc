"""Convolutional GAN: Radford et al., "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (ICLR 2016).

Conditions: Miyato and Koyama, "cGANs with Projection Discriminator" (ICLR 2018). Spectral norm:
Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from monai.networks.layers.factories import Conv
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import Self

from synthcube.models import adversarial
from synthcube.models.adversarial import AdversarialFamily, GANConfig
from synthcube.models.family import size_faults
from synthcube.models.losses import at_least_float32
from synthcube.models.nets.conditioning import ConditionEmbedding, dropped
from synthcube.models.nets.norm import ConditionalNorm, NormName, build_norm
from synthcube.models.optimizers import OptimizerConfig
from synthcube.models.samplers import noise
from synthcube.schema import Batch, Condition, ImageSpec, Levels, Width

_ADAM = OptimizerConfig.model_validate({"name": "Adam", "lr": 2e-4, "betas": [0.5, 0.999]})
# Kernel, stride and padding that halve every side exactly, or double it.
_HALVE: Any = {"kernel_size": 4, "stride": 2, "padding": 1}
_EMBEDDING = 128
_SMOOTHED_START, _SMOOTHED_WIDTH = 4, 128


class DCGANConfig(GANConfig):
    """Generator and discriminator of strided convolutions."""

    summary: ClassVar[str] = "generator against discriminator: an image in one pass"

    name: Literal["dcgan"] = Field(default="dcgan", description="Family of the model.")
    optimizer: OptimizerConfig = Field(default=_ADAM, description="Optimizer of the generator.")
    discriminator_optimizer: OptimizerConfig = Field(
        default=_ADAM, description="Optimizer of the discriminator."
    )
    latent_dim: Width = Field(default=100, description="Length of the random vector of an image.")
    channels: Levels = Field(
        default=(64, 128, 256, 512),
        description="Channels of the generator at each level, finest first; each level doubles "
        "every side.",
    )
    discriminator_channels: Levels = Field(
        default=(64, 128, 256, 512),
        description="Channels of the discriminator at each level, finest first; each level halves "
        "every side.",
    )
    norm: NormName = Field(default="batch", description="Normalisation in the generator.")
    discriminator_norm: NormName | Literal["none"] = Field(
        default="batch", description="Normalisation in the discriminator."
    )
    spectral_norm: bool = Field(
        default=False,
        description="Hold the discriminator's layers to a spectral norm of 1; goes well with "
        "discriminator_norm none.",
    )
    negative_slope: float = Field(
        default=0.2, ge=0, lt=1, description="Slope of the discriminator's leaky ReLU below 0."
    )
    smoothing: bool = Field(
        default=False,
        description="The levels double 4 voxels a side, whatever the size; then the image is "
        "enlarged to its size and smoothed by two convolutions, as in GaNDLF-Synth.",
    )
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="Share of the images that are learned without their conditions, so that a "
        "condition may be left unknown.",
    )

    def build(self, image: ImageSpec) -> DCGAN:
        return DCGAN(self, image)

    @classmethod
    def tiny(cls) -> Self:
        return cls(latent_dim=8, channels=(8, 8), discriminator_channels=(8, 8))

    def faults(self, image: ImageSpec) -> list[str]:
        faults = []
        keys = ("channels", "discriminator_channels")
        for key in keys[1:] if self.smoothing else keys:
            levels = len(getattr(self, key))
            faults += size_faults(image, 2**levels, levels, key=f"model.{key}", least=2)
        return faults + self.source_faults(image)


class DCGAN(AdversarialFamily):
    """An image from a latent in one pass; validated by a distance of sets of images."""

    config: DCGANConfig

    def __init__(self, config: DCGANConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.generator = Generator(config, image)
        self.train_against(Discriminator(config, image))
        # Channels last: a quarter less time for a step on a CPU.
        self.to(memory_format=torch.channels_last if image.rank == 2 else torch.channels_last_3d)

    def prepared(self, batch: Batch) -> Batch:
        condition = dropped(batch["condition"], self.config.condition_dropout)
        return Batch({**batch, "condition": condition})

    def generator_loss(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        values = batch["condition"]["values"]
        latent = torch.randn(len(values), self.config.latent_dim, device=self.device)
        generated = self.generator(latent, values)
        logits = self._logits(generated, values)
        loss = adversarial.generator_term(logits, self.config.adversarial_loss)
        return {"loss": loss}, generated

    def discriminator_loss(self, batch: Batch, generated: Tensor) -> dict[str, Tensor]:
        values = batch["condition"]["values"]
        # Not as one batch: a batch norm would tell them apart by their shared statistics.
        real, fake = self._logits(batch["image"], values), self._logits(generated, values)
        loss = adversarial.discriminator_term(real, fake, self.config.adversarial_loss)
        return {"loss": loss, "real": real.mean(), "fake": fake.mean()}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.distance(batch)}

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        latent = noise(generators, (self.config.latent_dim,)).to(self.device)
        images: Tensor = self.generator(latent, condition["values"])
        return images

    def _logits(self, images: Tensor, values: Tensor) -> Tensor:
        assert self.discriminator is not None
        logits: Tensor = self.discriminator(images, values)
        return logits


class Generator(nn.Module):
    """From a latent to an image, doubling every side at each level."""

    def __init__(self, config: DCGANConfig, image: ImageSpec) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.start = tuple(
            _SMOOTHED_START if config.smoothing else side >> len(widths) for side in image.size
        )
        self.project = nn.Linear(config.latent_dim, widths[0] * math.prod(self.start), bias=False)
        self.embed = _embedding(image)
        transposed = Conv["convtrans", image.rank]
        self.norms = nn.ModuleList(
            ConditionalNorm(config.norm, width, _EMBEDDING)
            if image.conditions
            else build_norm(config.norm, width)
            for width in widths
        )
        # A norm would take out the bias of the layer before it.
        self.doublings = nn.ModuleList(
            [transposed(a, b, bias=False, **_HALVE) for a, b in pairwise(widths)]
            + [transposed(widths[-1], image.channels, **_HALVE)]
        )
        _initialise(self.project, *self.doublings)
        self.size = image.size
        self.smooth: nn.Sequential | None = None
        if config.smoothing:
            convolution, channels = Conv["conv", image.rank], image.channels
            pad: Any = nn.ConstantPad2d if image.rank == 2 else nn.ConstantPad3d
            # An even kernel keeps the size with one voxel more at the end.
            self.smooth = nn.Sequential(
                pad((1, 2) * image.rank, 0.0),
                convolution(channels, _SMOOTHED_WIDTH, 4, bias=False),
                build_norm("batch", _SMOOTHED_WIDTH),
                nn.ReLU(),
                convolution(_SMOOTHED_WIDTH, channels, 3, padding=1, bias=False),
            )
            _initialise(self.smooth[1], self.smooth[4])

    def forward(self, latent: Tensor, values: Tensor) -> Tensor:
        """(B, latent_dim) under conditions (B, K) to (B, C, *spatial) in [-1, 1], float32."""
        x = self.project(latent).view(latent.shape[0], -1, *self.start)
        embedded = (self.embed(values),) if self.embed else ()
        for norm, double in zip(self.norms, self.doublings, strict=True):
            x = double(functional.relu(norm(x, *embedded)))
        if self.smooth is not None:
            mode = "bilinear" if x.ndim == 4 else "trilinear"
            x = self.smooth(functional.interpolate(x, self.size, mode=mode, align_corners=True))
        images: Tensor = at_least_float32(x).tanh()
        return images


class Discriminator(nn.Module):
    """From an image to a logit, halving every side at each level; conditions by projection."""

    def __init__(self, config: DCGANConfig, image: ImageSpec) -> None:
        super().__init__()
        widths = config.discriminator_channels
        norm = config.discriminator_norm
        convolution = Conv["conv", image.rank]
        self.slope = config.negative_slope
        self.halvings = nn.ModuleList(
            [convolution(image.channels, widths[0], **_HALVE)]
            + [convolution(a, b, bias=norm == "none", **_HALVE) for a, b in pairwise(widths)]
        )
        # Never evaluated, so without running statistics.
        self.norms = nn.ModuleList(
            nn.Identity() if norm == "none" else build_norm(norm, width, running=False)
            for width in widths[1:]
        )
        num_features = widths[-1] * math.prod(side >> len(widths) for side in image.size)
        self.head = nn.Linear(num_features, 1)
        self.embed = _embedding(image)
        self.project = nn.Linear(_EMBEDDING, num_features, bias=False) if self.embed else None
        _initialise(*self.halvings, self.head, *([self.project] if self.project else []))
        if config.spectral_norm:
            norms = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
            for module in list(self.modules()):
                weight = getattr(module, "weight", None)
                if isinstance(weight, nn.Parameter) and not isinstance(module, norms):
                    spectral_norm(module)

    def forward(self, images: Tensor, values: Tensor) -> Tensor:
        """Logits (B,) of (B, C, *spatial) under conditions (B, K)."""
        x = functional.leaky_relu(self.halvings[0](images), self.slope)
        for halve, norm in zip(list(self.halvings)[1:], self.norms, strict=True):
            x = functional.leaky_relu(norm(halve(x)), self.slope)
        features = x.flatten(1)
        logits: Tensor = self.head(features).squeeze(1)
        if self.embed and self.project:
            # On features in their places: the paper's sum over places cannot tell left from right.
            logits = logits + (self.project(self.embed(values)) * features).sum(1)
        return logits


def _embedding(image: ImageSpec) -> nn.Module | None:
    """Conditions (B, K) to vectors of unit variance: small, as they start, they are ignored."""
    if not image.conditions:
        return None
    norm = nn.LayerNorm(_EMBEDDING, elementwise_affine=False)
    return nn.Sequential(ConditionEmbedding(image.conditions, _EMBEDDING), norm)


def _initialise(*layers: nn.Module) -> None:
    for layer in layers:
        weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
        nn.init.normal_(weight, 0.0, 0.02)
        if bias is not None:
            nn.init.zeros_(bias)
