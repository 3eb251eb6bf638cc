"""Training against a discriminator: two optimizers, stepped by hand, and the losses by name.

Non-saturating loss: Goodfellow et al. (NeurIPS 2014). Least squares: Mao et al. (ICCV 2017).
Hinge: Lim and Ye, "Geometric GAN" (2017). R1: Mescheder et al., "Which Training Methods for GANs
do actually Converge?" (ICML 2018). Path length: Karras et al., StyleGAN2 (CVPR 2020). Sliced
Wasserstein distance: Rabin et al. (2011).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from synthcube.errors import ConfigError
from synthcube.models.family import Family, FamilyConfig
from synthcube.models.losses import at_least_float32
from synthcube.models.optimizers import OptimizerConfig, SchedulerConfig
from synthcube.schema import Batch, ImageSpec, Schema

AdversarialLoss = Literal["non_saturating", "hinge", "least_squares"]
_NUM_PROJECTIONS = 128
_MONITOR = "validation/loss"


class DiscriminatorFields(Schema):
    """The discriminator's part of a family's config."""

    adversarial_loss: AdversarialLoss = Field(
        default="non_saturating", description="Loss of generator and discriminator."
    )
    discriminator_optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="Optimizer of the discriminator."
    )
    discriminator_scheduler: SchedulerConfig | None = Field(
        default=None, description="Learning-rate schedule of the discriminator; null for none."
    )

    def optimizes_by_hand(self) -> bool:
        """Whether there is a discriminator; see FamilyConfig."""
        return True


class GANConfig(DiscriminatorFields, FamilyConfig):
    """A generator of images from noise and conditions, trained against a discriminator."""

    not_private: ClassVar[str] = (
        "it is trained against a discriminator, in steps of its own, which are not private; use "
        "rectified_flow"
    )

    scheduler: SchedulerConfig | None = Field(
        default=None, description="Learning-rate schedule of the generator; null for none."
    )


def generator_term(fake: Tensor, name: AdversarialLoss) -> Tensor:
    """Loss of the generator: a scalar, from the discriminator's logits (B, ...) of its images."""
    fake = at_least_float32(fake)
    if name == "non_saturating":
        return functional.softplus(-fake).mean()
    if name == "least_squares":
        return (fake - 1).square().mean()
    return -fake.mean()


def discriminator_term(real: Tensor, fake: Tensor, name: AdversarialLoss) -> Tensor:
    """Loss of the discriminator: a scalar, from logits (B, ...) of real and generated images."""
    real, fake = at_least_float32(real), at_least_float32(fake)
    if name == "non_saturating":
        return functional.softplus(-real).mean() + functional.softplus(fake).mean()
    if name == "least_squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Squared gradient of the logits (B,) by the images (B, C, *spatial): mean over the batch."""
    # Differentiated twice, bfloat16 has too few digits.
    with torch.autocast(image.device.type, enabled=False):
        real = image.detach().requires_grad_()
        (slope,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return slope.square().flatten(1).sum(dim=1).mean()


def path_lengths(generator: Callable[[Tensor], Tensor], styles: Tensor) -> Tensor:
    """Lengths (B,) of the gradient of images by their styles (B, L, dim), in random directions."""
    with torch.autocast(styles.device.type, enabled=False):
        image = generator(styles)
        direction = torch.randn_like(image) / math.sqrt(math.prod(image.shape[2:]))
        (slope,) = torch.autograd.grad((image * direction).sum(), styles, create_graph=True)
    return slope.square().sum(dim=2).mean(dim=1).sqrt()


def sliced_wasserstein(one: Tensor, other: Tensor) -> Tensor:
    """Distance of two batches of images, (B, C, *spatial) each: 0 where they are the same set.

    Mean over fixed random directions of the distance between the sorted projections, in the
    unit of the images.
    """
    one = at_least_float32(one).flatten(1)
    other = at_least_float32(other).flatten(1).to(one)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(one.shape[1], _NUM_PROJECTIONS, generator=generator).to(one)
    directions = directions / directions.norm(dim=0)
    sorted_one, sorted_other = ((x @ directions).sort(dim=0).values for x in (one, other))
    distance: Tensor = (sorted_one - sorted_other).abs().mean()
    return distance


class AdversarialFamily(Family):
    """Trains a generator and, where there is one, a discriminator against it.

    ``loss`` is what is validated; without a discriminator it is what is trained as well.
    """

    unaveraged = ("discriminator",)

    def __init__(self, config: FamilyConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        # Set on the instance, because an attribute of the class would hide the submodule.
        self.discriminator: torch.nn.Module | None = None

    @abstractmethod
    def generator_loss(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Scalars by name, of which ``loss`` is minimised; and the generated images."""

    @abstractmethod
    def discriminator_loss(self, batch: Batch, generated: Tensor) -> dict[str, Tensor]:
        """Scalars by name, of which ``loss`` is minimised; `generated` has no gradient."""

    def optimizer_configs(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """The optimizers of generator and discriminator, which a family may correct."""
        config: Any = self.config
        return config.optimizer, config.discriminator_optimizer

    @property
    def optimizer_names(self) -> tuple[str, ...]:
        return ("generator", "discriminator") if self.discriminator is not None else ("model",)

    def distance(self, batch: Batch) -> Tensor:
        """Distance of the real images to generated ones under their conditions.

        A row has the same latent at every validation, on whatever process.
        """
        family: Any = self
        generators = [torch.Generator().manual_seed(row) for row in batch["index"].tolist()]
        return sliced_wasserstein(family.sample(generators, batch["condition"]), batch["image"])

    def prepared(self, batch: Batch) -> Batch:
        """The batch that both networks see in this step, for instance with conditions left out."""
        return batch

    def trains_discriminator(self) -> bool:
        """Whether the discriminator, and its learning-rate schedule, make a step now."""
        return True

    def train_against(self, discriminator: torch.nn.Module) -> None:
        """Add the discriminator; to be called at the end of __init__."""
        self.discriminator = discriminator
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if self.discriminator is None:
            return super().training_step(batch, batch_idx)
        optimizers: Any = self.optimizers()
        generator, discriminator = optimizers
        # Lightning counts every optimizer's step; a step of the training is one of the generator.
        discriminator._on_before_step = discriminator._on_after_step = lambda: None
        steps = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        batch = self.prepared(batch)
        self.toggle_optimizer(generator)
        terms, generated = self.generator_loss(batch)
        self._learn(generator, terms["loss"], steps)
        self.log_terms(terms, batch, "train")
        if self.trains_discriminator():
            self.toggle_optimizer(discriminator)
            opposed = self.discriminator_loss(batch, generated.detach())
            self._learn(discriminator, opposed["loss"], steps)
            named = {f"discriminator_{name}": value for name, value in opposed.items()}
            self.log_terms(named, batch, "train")
        if steps:
            self._step_schedules("step")
        return {"loss": terms["loss"].detach()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, because only now the gradients of a 16-bit training have their true size.
        if self.discriminator is not None and self.gradient_clip_norm is not None:
            self.clip_gradients(optimizer, self.gradient_clip_norm, "norm")

    def on_train_epoch_end(self) -> None:
        if self.discriminator is not None:
            self._step_schedules("epoch")

    def configure_optimizers(self) -> Any:
        if self.discriminator is None:
            return super().configure_optimizers()
        config: Any = self.config
        opposed = {id(weight) for weight in self.discriminator.parameters()}
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        generator = [weight for weight in trained if id(weight) not in opposed]
        discriminator = [weight for weight in trained if id(weight) in opposed]
        first, second = self.optimizer_configs()
        described = [
            self.described_optimizer(generator, first, config.scheduler),
            self.described_optimizer(discriminator, second, config.discriminator_scheduler),
        ]
        validates = bool(self.trainer.limit_val_batches)
        for optimizer in described:
            schedule = optimizer.get("lr_scheduler", {})
            schedule.pop("monitor", None)  # Lightning warns that it will not look at it
            if isinstance(schedule.get("scheduler"), ReduceLROnPlateau) and not validates:
                raise ConfigError(
                    f"ReduceLROnPlateau follows {_MONITOR}, and there are no validation images: "
                    "raise data.validation_fraction, or use another schedule."
                )
        return described

    def _learn(self, optimizer: LightningOptimizer, loss: Tensor, steps: bool) -> None:
        """Backward pass and, if `steps`, a step of an optimizer that is toggled on; then off."""
        self.manual_backward(loss / self.accumulate)
        if steps:
            optimizer.step()
            optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def _step_schedules(self, interval: str) -> None:
        validated = (self.current_epoch + 1) % (self.trainer.check_val_every_n_epoch or 1) == 0
        waiting = [] if self.trains_discriminator() else self.trainer.optimizers[1:]
        for schedule in self.trainer.lr_scheduler_configs:
            if schedule.interval != interval or schedule.scheduler.optimizer in waiting:
                continue
            if not isinstance(schedule.scheduler, ReduceLROnPlateau):
                schedule.scheduler.step()
            elif validated:
                schedule.scheduler.step(float(self.trainer.callback_metrics[_MONITOR]))
