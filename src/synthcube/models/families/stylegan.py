"""StyleGAN2: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020).

Penalty of the discriminator's slope (R1): Mescheder et al., "Which Training Methods for GANs do
actually Converge?" (ICML 2018). Truncation and style mixing: Karras et al. (CVPR 2019). Growing:
Karras et al., "Progressive Growing of GANs" (ICLR 2018).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from synthcube.errors import ConfigError
from synthcube.models import adversarial
from synthcube.models.adversarial import AdversarialFamily, GANConfig
from synthcube.models.family import size_faults
from synthcube.models.nets import style
from synthcube.models.nets.style import Growth
from synthcube.models.optimizers import OptimizerConfig
from synthcube.models.samplers import noise
from synthcube.schema import Batch, Condition, Count, Depth, ImageSpec, Levels, Weight, Width

log = logging.getLogger("synthcube")

_EVERY = "Steps between those penalties, each weighted by as much."
_MEAN_DECAY = 0.995
_LENGTH_DECAY = 0.99
_ADAM = OptimizerConfig.model_validate({"name": "Adam", "lr": 2e-3, "betas": [0.0, 0.99]})


class StyleGANConfig(GANConfig):
    """Style-based generator against a residual discriminator."""

    summary: ClassVar[str] = "sharp images in a single pass, from a generator steered by styles"

    name: Literal["stylegan"] = Field(default="stylegan", description="Family of the model.")
    channels: Levels = Field(
        default=(32, 64, 128, 128, 128),
        description="Channels at each level of both networks, full resolution first.",
    )
    progressive: bool = Field(
        default=False, description="Whether training begins with the smallest images and grows."
    )
    stage_epochs: Count = Field(
        default=10,
        description="Epochs at each size if progressive, the last one excepted; a new size fades "
        "in over the first half of them.",
    )
    latent_dim: Width = Field(default=256, description="Length of z and of a style w.")
    num_mapping_layers: Depth = Field(default=4, description="Layers from z to w.")
    style_mixing: float = Field(
        default=0.9, ge=0, le=1, description="Share of training images made of two styles."
    )
    truncation: float = Field(
        default=1.0, ge=0, le=1,
        description="Distance of a sampled style from the mean one: less than 1 makes images more "
        "alike, 0 all the same but for noise.",
    )  # fmt: skip
    minibatch_group: Count = Field(
        default=4, description="Images whose spread the discriminator sees; 1: none."
    )
    r1_weight: Weight = Field(
        default=10.0, description="Weight of the discriminator's squared slope at real images."
    )
    r1_every: Count = Field(default=16, description=_EVERY)
    path_length_weight: Weight = Field(
        default=0.0, description="Weight of the spread of the generator's slope; 0: none."
    )
    path_length_every: Count = Field(default=4, description=_EVERY)
    optimizer: OptimizerConfig = Field(default=_ADAM, description="Optimizer of the generator.")
    discriminator_optimizer: OptimizerConfig = Field(
        default=_ADAM, description="Optimizer of the discriminator."
    )

    def build(self, image: ImageSpec) -> StyleGAN:
        return StyleGAN(self, image)

    @classmethod
    def tiny(cls) -> Self:
        return cls(channels=(8, 8), latent_dim=8, num_mapping_layers=2)

    def shortened(self) -> tuple[dict[str, int], int]:
        quick = self.model_copy(update={"stage_epochs": 1})
        return {"stage_epochs": 1}, max(1, quick.growing_epochs)

    def faults(self, image: ImageSpec) -> list[str]:
        levels = len(self.channels)
        return size_faults(image, 2**self.last_stage, levels) + self.source_faults(image)

    @property
    def last_stage(self) -> int:
        """The stage of the full size; the first is 0."""
        return len(self.channels) - 1

    @property
    def growing_epochs(self) -> int:
        """Epochs until the full size has faded in."""
        if not self.progressive or not self.last_stage:
            return 0
        return math.ceil((self.last_stage + 0.5) * self.stage_epochs)

    def growth(self, epoch: float) -> Growth:
        """How far the networks have grown after so many epochs, of which fractions count."""
        if not self.progressive:
            return Growth(self.last_stage, 1.0)
        stage = min(int(epoch // self.stage_epochs), self.last_stage)
        elapsed = epoch - stage * self.stage_epochs
        return Growth(stage, min(1.0, 2 * elapsed / self.stage_epochs) if stage else 1.0)

    def shrunk(self, image: Tensor, growth: Growth) -> Tensor:
        """Real images (B, C, *spatial) at the size of the stage, as blurred as alpha makes them."""
        for _ in range(self.last_stage - growth.stage):
            image = style.halved(image)
        if growth.alpha < 1:
            image = torch.lerp(style.doubled(style.halved(image)), image, growth.alpha)
        return image


class StyleGAN(AdversarialFamily):
    """Noise of every layer comes from the random generator of its image."""

    config: StyleGANConfig
    w_mean: Tensor
    path_length: Tensor
    grown: Tensor

    def __init__(self, config: StyleGANConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        channels = config.channels[::-1]
        dim, depth = config.latent_dim, config.num_mapping_layers
        self.mapping = style.MappingNetwork(image.conditions, dim, depth)
        self.generator = style.StyleGenerator(image, channels, dim)
        self._growth, self._step = config.growth(0), 0
        # Saved with the weights, as sampling needs the mean style, and the stage and alpha.
        self.register_buffer("w_mean", torch.zeros(dim))
        self.register_buffer("grown", torch.tensor([float(value) for value in self._growth]))
        self.register_buffer("path_length", torch.zeros(()))
        group, grows = config.minibatch_group, config.progressive
        discriminator = style.ResidualDiscriminator(image, channels, group_size=group, grows=grows)
        self.train_against(discriminator)

    @property
    def differentiates_twice(self) -> bool:
        return bool(self.config.r1_weight or self.config.path_length_weight)

    def optimizer_configs(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        config = self.config
        generator, discriminator = super().optimizer_configs()
        if config.path_length_weight:
            generator = _corrected(generator, config.path_length_every)
        if config.r1_weight:
            discriminator = _corrected(discriminator, config.r1_every)
        return generator, discriminator

    def on_fit_start(self) -> None:
        config, epochs = self.config, int(self.trainer.max_epochs or 1)
        if epochs < config.growing_epochs:
            raise ConfigError(
                f"training.max_epochs {epochs}: model.progressive reaches the full size after "
                f"{config.growing_epochs} epochs, {config.stage_epochs} (model.stage_epochs) at "
                "each smaller one."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # From the position in the training alone, so that a resumed one grows as it would have.
        part = (batch_idx + 1) / self.trainer.num_training_batches
        self._step = self.trainer.global_step
        self._growth = self.config.growth(self.trainer.current_epoch + part)
        self.grown[0].fill_(self._growth.stage)
        self.grown[1].fill_(self._growth.alpha)

    def on_train_end(self) -> None:
        if self._growth != (self.config.last_stage, 1.0):
            log.warning(
                "The networks were still growing: images are enlarged from size %d of %d.",
                self._growth.stage + 1, len(self.config.channels),
            )  # fmt: skip

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Distance of the real images to generated ones under their conditions, always the same.

        While the networks grow, `loss` is 2 more for each size that is missing, which is more than
        images in [-1, 1] are apart: enlarged small images would otherwise pass for the best.
        """
        distance = self.distance(batch)
        stage, alpha = self.grown
        missing = self.config.last_stage - (stage - 1 + alpha)
        return {"loss": distance + 2 * missing, "sliced_wasserstein": distance}

    def generator_loss(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        discriminator: Any = self.discriminator
        values = batch["condition"]["values"]
        generated = self._generate(self._styles(values))
        logits = discriminator(generated, values, self._growth)
        terms = {"loss": adversarial.generator_term(logits, self.config.adversarial_loss)}
        every = self.config.path_length_every
        if self.config.path_length_weight and self._step % every == 0:
            penalty = self._path_length_penalty(values)
            terms["path_length_penalty"] = penalty
            terms["loss"] = terms["loss"] + self.config.path_length_weight * every * penalty
        return terms, generated

    def discriminator_loss(self, batch: Batch, generated: Tensor) -> dict[str, Tensor]:
        discriminator: Any = self.discriminator
        values = batch["condition"]["values"]
        image = self.config.shrunk(batch["image"], self._growth)
        real = discriminator(image, values, self._growth)
        fake = discriminator(generated, values, self._growth)
        terms = {"loss": adversarial.discriminator_term(real, fake, self.config.adversarial_loss)}
        every = self.config.r1_every
        if self.config.r1_weight and self._step % every == 0:
            terms["r1"] = adversarial.r1_penalty(
                lambda real: discriminator(real, values, self._growth), image.to(self.w_mean)
            )
            terms["loss"] = terms["loss"] + self.config.r1_weight / 2 * every * terms["r1"]
        return terms

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        stage, alpha = self.grown.tolist()
        growth = Growth(int(stage), alpha)
        shapes = [(self.config.latent_dim,), *self.generator.noise_shapes(growth.stage)]
        z, *noises = (noise(generators, shape).to(self.w_mean) for shape in shapes)
        w = self.mapping(z, condition["values"])
        w = self.w_mean + self.config.truncation * (w - self.w_mean)
        styles = w[:, None].expand(-1, self.generator.num_styles, -1)
        image: Tensor = self.generator(styles, noises, growth)
        for _ in range(self.config.last_stage - growth.stage):
            image = style.doubled(image)
        return image.float().clamp(-1, 1)

    def _generate(self, styles: Tensor) -> Tensor:
        noises = [
            torch.randn(len(styles), *shape, device=styles.device, dtype=styles.dtype)
            for shape in self.generator.noise_shapes(self._growth.stage)
        ]
        images: Tensor = self.generator(styles, noises, self._growth)
        return images

    def _styles(self, values: Tensor) -> Tensor:
        """Styles of new images, (B, num_styles, dim), some of which change on the way."""
        number, used = len(values), 2 * (self._growth.stage + 1)
        z = torch.randn(2, number, self.config.latent_dim, device=self.device).to(self.w_mean)
        w = self.mapping(z[0], values)
        decay = min(_MEAN_DECAY, (1 + self._step) / (10 + self._step))
        mean = _over_processes(w.detach().mean(dim=0)).to(self.w_mean)
        self.w_mean.lerp_(mean, 1 - decay)
        styles: Tensor = w[:, None].expand(-1, self.generator.num_styles, -1)
        if not self.config.style_mixing:
            return styles
        mixed = torch.rand(number, 1, device=self.device) < self.config.style_mixing
        crossing = torch.randint(1, used, (number, 1), device=self.device)
        layer = torch.arange(self.generator.num_styles, device=self.device)
        other = self.mapping(z[1], values)[:, None]
        return torch.where((mixed & (layer >= crossing))[..., None], other, styles)

    def _path_length_penalty(self, values: Tensor) -> Tensor:
        """Squared distance of path lengths from their mean; on half the batch, for memory."""
        styles = self._styles(values[: (len(values) + 1) // 2])
        lengths = adversarial.path_lengths(self._generate, styles)
        self.path_length.lerp_(_over_processes(lengths.detach().mean()), 1 - _LENGTH_DECAY)
        penalty: Tensor = (lengths - self.path_length.clone()).square().mean()
        return penalty


def _over_processes(value: Tensor) -> Tensor:
    """Mean over all processes, so that all keep the same buffers."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def _corrected(optimizer: OptimizerConfig, every: int) -> OptimizerConfig:
    """Optimizer for a penalty at some steps only, as if they were extra steps (appendix B)."""
    share = every / (every + 1)
    changed: dict[str, Any] = {"lr": optimizer.lr * share}
    betas = (optimizer.model_extra or {}).get("betas")
    if betas is not None:
        changed["betas"] = [beta**share for beta in betas]
    return OptimizerConfig.model_validate({**optimizer.model_dump(), **changed})
