"""StyleGAN2: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020).

Penalty of the discriminator's slope (R1): Mescheder et al., "Which Training Methods for GANs do
actually Converge?" (ICML 2018). Truncation and style mixing: Karras et al. (CVPR 2019). Growing:
Karras et al., "Progressive Growing of GANs" (ICLR 2018).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import Self

from synthcube.errors import ConfigError
from synthcube.models.adversarial import (
    AdversarialFamily,
    DiscriminatorFields,
    discriminator_term,
    generator_term,
    sliced_wasserstein,
    slope_lengths,
    squared_slope,
)
from synthcube.models.family import FamilyConfig
from synthcube.models.nets.style import (
    Growth,
    GrowthFields,
    MappingNetwork,
    ResidualDiscriminator,
    StyleGenerator,
    doubled,
)
from synthcube.optimization import OptimizerConfig, SchedulerConfig
from synthcube.schema import MAX_BATCH, MAX_COUNT, Batch, Condition, ImageSpec

log = logging.getLogger("synthcube")

_MEAN_DECAY = 0.995
_LENGTH_DECAY = 0.99


def _adam() -> OptimizerConfig:
    values = {"name": "Adam", "lr": 2e-3, "betas": [0.0, 0.99]}
    return OptimizerConfig.model_validate(values)


class StyleGANConfig(DiscriminatorFields, GrowthFields, FamilyConfig):
    """Style-based generator against a residual discriminator."""

    summary: ClassVar[str] = "sharp images in a single pass, from a generator steered by styles"

    name: Literal["stylegan"] = Field(default="stylegan", description="Family of the model.")
    latent_dim: int = Field(
        default=256, ge=1, le=16384, description="Length of z and of a style w."
    )
    num_mapping_layers: int = Field(default=4, ge=1, le=64, description="Layers from z to w.")
    style_mixing: float = Field(
        default=0.9, ge=0, le=1, description="Share of training images made of two styles."
    )
    truncation: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Distance of a sampled style from the mean one: less than 1 makes images more "
        "alike, 0 all the same but for noise.",
    )
    minibatch_group: int = Field(
        default=4,
        ge=1,
        le=MAX_BATCH,
        description="Images whose spread the discriminator sees; 1: none.",
    )
    r1_weight: float = Field(
        default=10.0,
        ge=0,
        le=1e6,
        description="Weight of the discriminator's squared slope at real images.",
    )
    r1_every: int = Field(
        default=16,
        ge=1,
        le=MAX_COUNT,
        description="Steps between those penalties, each weighted by as much.",
    )
    path_length_weight: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Weight of the spread of the generator's slope; 0: none.",
    )
    path_length_every: int = Field(
        default=4,
        ge=1,
        le=MAX_COUNT,
        description="Steps between those penalties, each weighted by as much.",
    )
    optimizer: OptimizerConfig = Field(default=_adam(), description="Optimizer of the generator.")
    scheduler: SchedulerConfig | None = Field(
        default=None, description="Learning-rate schedule of the generator; null for none."
    )
    discriminator_optimizer: OptimizerConfig = Field(
        default=_adam(), description="Optimizer of the discriminator."
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
        found = self.size_faults(image)
        if image.source_channels:
            found.append(
                f"data.source_channels {list(image.source_channels)}: stylegan makes images out "
                "of noise, not of other images; leave it out, or take another family"
            )
        return found


class StyleGAN(AdversarialFamily):
    """Sampled style by style; the noise of every layer is the generator's of its image."""

    config: StyleGANConfig
    w_mean: torch.Tensor
    path_length: torch.Tensor
    grown: torch.Tensor

    def __init__(self, config: StyleGANConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        channels = config.channels[::-1]
        self.mapping = MappingNetwork(
            image.conditions, config.latent_dim, config.num_mapping_layers
        )
        self.generator = StyleGenerator(image, channels, config.latent_dim)
        self._growth, self._step = config.growth(0), 0
        # Saved with the weights, as sampling needs them: the mean style, and the stage and alpha.
        self.register_buffer("w_mean", torch.zeros(config.latent_dim))
        self.register_buffer("grown", torch.tensor([float(each) for each in self._growth]))
        self.register_buffer("path_length", torch.zeros(()))
        self.oppose(
            ResidualDiscriminator(
                image, channels, group_size=config.minibatch_group, grows=config.progressive
            )
        )

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
        config, given = self.config, int(self.trainer.max_epochs or 1)
        if given < config.growing_epochs:
            raise ConfigError(
                f"training.max_epochs {given}: model.progressive reaches the full size after "
                f"{config.growing_epochs} epochs, {config.stage_epochs} (model.stage_epochs) at "
                "each smaller one."
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # From the place in the training alone, so that a resumed one grows on as it would have.
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

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Distance of the real images to as many made under their conditions, always the same.

        While the networks grow, `loss` is 2 more for each size that is missing, which is more than
        images in [-1, 1] are apart: enlarged small images would else pass for the best.
        """
        generators = [torch.Generator().manual_seed(row) for row in batch["index"].tolist()]
        made = self.sample(generators, batch["condition"])
        distance = sliced_wasserstein(made, batch["image"])
        stage, alpha = self.grown
        missing = self.config.last_stage - (stage - 1 + alpha)
        return {"loss": distance + 2 * missing, "sliced_wasserstein": distance}

    def generator_loss(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        discriminator: Any = self.discriminator
        values = batch["condition"]["values"]
        made = self._made(self._styles(values))
        logits = discriminator(made, values, self._growth)
        terms = {"loss": generator_term(logits, self.config.adversarial_loss)}
        every = self.config.path_length_every
        if self.config.path_length_weight and self._step % every == 0:
            penalty = self._path_length_penalty(values)
            terms["path_length_penalty"] = penalty
            terms["loss"] = terms["loss"] + self.config.path_length_weight * every * penalty
        return terms, made

    def discriminator_loss(self, batch: Batch, made: torch.Tensor) -> dict[str, torch.Tensor]:
        discriminator: Any = self.discriminator
        values = batch["condition"]["values"]
        image = self.config.shrunk(batch["image"], self._growth)
        real, fake = (discriminator(each, values, self._growth) for each in (image, made))
        terms = {"loss": discriminator_term(real, fake, self.config.adversarial_loss)}
        every = self.config.r1_every
        if self.config.r1_weight and self._step % every == 0:
            terms["r1"] = squared_slope(
                lambda each: discriminator(each, values, self._growth), image.to(self.w_mean)
            )
            terms["loss"] = terms["loss"] + self.config.r1_weight / 2 * every * terms["r1"]
        return terms

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> torch.Tensor:
        z = self._drawn(generators, (self.config.latent_dim,))
        w = self.mapping(z, condition["values"])
        w = self.w_mean + self.config.truncation * (w - self.w_mean)
        stage, alpha = self.grown.tolist()
        growth = Growth(int(stage), alpha)
        noises = [
            self._drawn(generators, shape) for shape in self.generator.noise_shapes(growth.stage)
        ]
        styles = w[:, None].expand(-1, self.generator.num_styles, -1)
        image: torch.Tensor = self.generator(styles, noises, growth)
        for _ in range(self.config.last_stage - growth.stage):
            image = doubled(image)
        return image.float().clamp(-1, 1)

    def _drawn(self, generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.stack([torch.randn(shape, generator=each) for each in generators])
        return drawn.to(self.w_mean)

    def _made(self, styles: torch.Tensor) -> torch.Tensor:
        noises = [
            torch.randn(len(styles), *shape, device=styles.device, dtype=styles.dtype)
            for shape in self.generator.noise_shapes(self._growth.stage)
        ]
        made: torch.Tensor = self.generator(styles, noises, self._growth)
        return made

    def _styles(self, values: torch.Tensor) -> torch.Tensor:
        """(B, num_styles, dim) of new images, some of which change style on the way."""
        number, used = len(values), 2 * (self._growth.stage + 1)
        z = torch.randn(2, number, self.config.latent_dim, device=self.device).to(self.w_mean)
        w = self.mapping(z[0], values)
        decay = min(_MEAN_DECAY, (1 + self._step) / (10 + self._step))
        mean = _over_processes(w.detach().mean(dim=0)).to(self.w_mean)
        self.w_mean.lerp_(mean, 1 - decay)
        styles: torch.Tensor = w[:, None].expand(-1, self.generator.num_styles, -1)
        if not self.config.style_mixing:
            return styles
        mixed = torch.rand(number, 1, device=self.device) < self.config.style_mixing
        crossing = torch.randint(1, used, (number, 1), device=self.device)
        layer = torch.arange(self.generator.num_styles, device=self.device)
        other = self.mapping(z[1], values)[:, None]
        return torch.where((mixed & (layer >= crossing))[..., None], other, styles)

    def _path_length_penalty(self, values: torch.Tensor) -> torch.Tensor:
        """Squared distance of the slope's length from its mean; on half the batch, for memory."""
        styles = self._styles(values[: (len(values) + 1) // 2])
        lengths = slope_lengths(self._made, styles)
        self.path_length.lerp_(_over_processes(lengths.detach().mean()), 1 - _LENGTH_DECAY)
        penalty: torch.Tensor = (lengths - self.path_length.clone()).square().mean()
        return penalty


def _over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean over all processes, the same in each, so that they keep the same buffers."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def _corrected(optimizer: OptimizerConfig, every: int) -> OptimizerConfig:
    """For penalties of some steps only: as if those were steps of their own (appendix B)."""
    share = every / (every + 1)
    changed: dict[str, Any] = {"lr": optimizer.lr * share}
    betas = (optimizer.model_extra or {}).get("betas")
    if betas is not None:
        changed["betas"] = [beta**share for beta in betas]
    return OptimizerConfig.model_validate({**optimizer.model_dump(), **changed})
