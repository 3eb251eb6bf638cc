"""Training against a discriminator: two optimizers, stepped by hand, and the losses by name.

Non-saturating loss: Goodfellow et al. (NeurIPS 2014). Least squares: Mao et al. (ICCV 2017).
Hinge: Lim and Ye, "Geometric GAN" (2017). Sliced Wasserstein distance: Rabin et al. (2011).


Penalties on how fast a network changes, which need gradients of gradients.

R1: Mescheder et al., "Which Training Methods for GANs do actually Converge?" (ICML 2018). Path
length: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from pydantic import Field
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from synthcube.errors import ConfigError
from synthcube.losses import wide
from synthcube.models.family import Family, FamilyConfig
from synthcube.optimization import OptimizerConfig, SchedulerConfig
from synthcube.schema import Batch, ImageSpec, Schema


def squared_slope(
    judge: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor
) -> torch.Tensor:
    """R1: squared gradient of the logits (B,) by the images, averaged over the images.

    Without autocast: differentiated twice, bfloat16 has too few digits.
    """
    with torch.autocast(image.device.type, enabled=False):
        real = image.detach().requires_grad_()
        (slope,) = torch.autograd.grad(judge(real).sum(), real, create_graph=True)
    return slope.square().flatten(1).sum(dim=1).mean()


def slope_lengths(
    make: Callable[[torch.Tensor], torch.Tensor], styles: torch.Tensor
) -> torch.Tensor:
    """(B,) lengths of the gradient of images by their styles (B, L, dim), in random directions."""
    with torch.autocast(styles.device.type, enabled=False):
        image = make(styles)
        direction = torch.randn_like(image) / math.sqrt(math.prod(image.shape[2:]))
        (slope,) = torch.autograd.grad((image * direction).sum(), styles, create_graph=True)
    return slope.square().sum(dim=2).mean(dim=1).sqrt()


AdversarialLoss = Literal["non_saturating", "hinge", "least_squares"]
_PROJECTIONS = 128
_MONITOR = "validation/loss"


class DiscriminatorFields(Schema):
    """The discriminator's part of a family's config."""

    adversarial_loss: AdversarialLoss = Field(
        default="non_saturating", description="What generator and discriminator play for."
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


def generator_term(fake: torch.Tensor, name: AdversarialLoss) -> torch.Tensor:
    """What the generator minimises, given the discriminator's logits of its images."""
    fake = wide(fake)
    if name == "non_saturating":
        return functional.softplus(-fake).mean()
    if name == "least_squares":
        return (fake - 1).square().mean()
    return -fake.mean()


def discriminator_term(
    real: torch.Tensor, fake: torch.Tensor, name: AdversarialLoss
) -> torch.Tensor:
    """What the discriminator minimises, given its logits of real and of made images."""
    real, fake = wide(real), wide(fake)
    if name == "non_saturating":
        return functional.softplus(-real).mean() + functional.softplus(fake).mean()
    if name == "least_squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()


def sliced_wasserstein(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Distance of two batches of images, (B, C, *spatial) each: 0 where they are the same set.

    Mean over fixed random directions of the distance between the sorted projections, in the
    unit of the images.
    """
    one, other = wide(one).flatten(1), wide(other).to(wide(one)).flatten(1)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(one.shape[1], _PROJECTIONS, generator=generator).to(one)
    directions = directions / directions.norm(dim=0)
    sorted_one, sorted_other = ((each @ directions).sort(dim=0).values for each in (one, other))
    distance: torch.Tensor = (sorted_one - sorted_other).abs().mean()
    return distance


class AdversarialFamily(Family):
    """Trains a generator and, where there is one, a discriminator against it.

    ``loss`` is what is validated; without a discriminator it is what is trained as well.
    """

    unaveraged = ("discriminator",)

    def __init__(self, config: FamilyConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        # Of the instance: a module is found after what a class has of the same name.
        self.discriminator: torch.nn.Module | None = None

    @abstractmethod
    def generator_loss(self, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Scalars by name, of which ``loss`` is minimised; and the images made, to be judged."""

    @abstractmethod
    def discriminator_loss(self, batch: Batch, made: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalars by name, of which ``loss`` is minimised; `made` has no gradient."""

    def optimizer_configs(self) -> tuple[OptimizerConfig, OptimizerConfig]:
        """The generator's and the discriminator's, which a family may correct."""
        config: Any = self.config
        return config.optimizer, config.discriminator_optimizer

    @property
    def optimizer_names(self) -> tuple[str, ...]:
        return ("generator", "discriminator") if self.discriminator is not None else ("model",)

    def presented(self, batch: Batch) -> Batch:
        """The batch as both networks are to see it in this step, as with conditions left out."""
        return batch

    def discriminates(self) -> bool:
        """Whether the discriminator learns in this step; a family may let it wait, and with it its
        learning-rate schedule."""
        return True

    def oppose(self, discriminator: torch.nn.Module) -> None:
        """Train against `discriminator` from now on; to be called at the end of __init__."""
        self.discriminator = discriminator
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if self.discriminator is None:
            return super().training_step(batch, batch_idx)
        generator, discriminator = self._optimizers()
        steps = (batch_idx + 1) % self.accumulate == 0 or self.trainer.is_last_batch
        batch = self.presented(batch)
        self.toggle_optimizer(generator)
        terms, made = self.generator_loss(batch)
        self._learn(generator, terms["loss"], steps)
        self.untoggle_optimizer(generator)
        self.log_terms(terms, batch, "train")
        if self.discriminates():
            self.toggle_optimizer(discriminator)
            judged = self.discriminator_loss(batch, made.detach())
            self._learn(discriminator, judged["loss"], steps)
            self.untoggle_optimizer(discriminator)
            self.log_terms(
                {f"discriminator_{name}": value for name, value in judged.items()}, batch, "train"
            )
        if steps:
            self._step_schedules("step")
        return {"loss": terms["loss"].detach()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, because only now the gradients of a 16-bit training have their true size.
        if self.discriminator is not None and self.gradient_clip_norm is not None:
            self.clip_gradients(
                optimizer, gradient_clip_val=self.gradient_clip_norm,
                gradient_clip_algorithm="norm",
            )  # fmt: skip

    def on_train_epoch_end(self) -> None:
        if self.discriminator is not None:
            self._step_schedules("epoch")

    def configure_optimizers(self) -> Any:
        if self.discriminator is None:
            return super().configure_optimizers()
        config: Any = self.config
        making_config, judging_config = self.optimizer_configs()
        judging = {id(weight) for weight in self.discriminator.parameters()}
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        judge = [weight for weight in trained if id(weight) in judging]
        maker = [weight for weight in trained if id(weight) not in judging]
        described = [
            self.described_optimizer(maker, making_config, config.scheduler),
            self.described_optimizer(judge, judging_config, config.discriminator_scheduler),
        ]
        for each in described:
            schedule = each.get("lr_scheduler", {})
            schedule.pop("monitor", None)  # Lightning warns that it will not look at it
            if isinstance(schedule.get("scheduler"), ReduceLROnPlateau) and not (
                self.trainer.limit_val_batches
            ):
                raise ConfigError(
                    f"ReduceLROnPlateau follows {_MONITOR}, and there are no validation images: "
                    "raise data.validation_fraction, or use another schedule."
                )
        return described

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer]:
        found: Any = self.optimizers()
        generator, discriminator = found
        # Lightning counts every optimizer's step; a step of the training is one of the generator.
        discriminator._on_before_step = discriminator._on_after_step = _nothing
        return generator, discriminator

    def _learn(self, optimizer: Any, loss: torch.Tensor, steps: bool) -> None:
        self.manual_backward(loss / self.accumulate)
        if steps:
            optimizer.step()
            optimizer.zero_grad()

    def _step_schedules(self, interval: str) -> None:
        validated = (self.current_epoch + 1) % (self.trainer.check_val_every_n_epoch or 1) == 0
        waiting = [] if self.discriminates() else self.trainer.optimizers[1:]
        for described in self.trainer.lr_scheduler_configs:
            if described.interval != interval or described.scheduler.optimizer in waiting:
                continue
            if not isinstance(described.scheduler, ReduceLROnPlateau):
                described.scheduler.step()
            elif validated:
                described.scheduler.step(float(self.trainer.callback_metrics[_MONITOR]))


def _nothing() -> None:
    return None
