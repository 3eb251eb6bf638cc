"""The contract of a family: its config, its model, and the protocols of what else it can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import lightning.pytorch as pl
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import Self

from synthcube.errors import ConfigError
from synthcube.models.convolution import replace_kernels
from synthcube.models.optimizers import OptimizerConfig, SchedulerConfig
from synthcube.plugins import TRAINED
from synthcube.reading import faults_of
from synthcube.schema import Batch, Condition, ImageSpec, Moments, Schema, completed

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

replace_kernels()


class EpochMeans:
    """Running means of named numbers, each weighted by the images that it stands for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name -> (sum, images), float64

    def add(self, terms: Mapping[str, Tensor], num_images: int) -> None:
        """Add scalars that are means over `num_images` images; waits for no device."""
        for name, value in terms.items():
            mean = value.detach().double().reshape(1)
            pair = torch.cat([mean * num_images, mean.new_full((1,), num_images)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The means, float32 scalars by name; the next epoch starts from nothing.

        `reduce` adds up a tensor over the processes that train together.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = reduce(torch.stack([self._sums[name] for name in names]))  # (names, 2)
        self.clear()
        return dict(zip(names, (sums[:, 0] / sums[:, 1]).float(), strict=True))

    def clear(self) -> None:
        self._sums = {}

    def state(self) -> dict[str, list[float]]:
        """Sum and number of images by name, as plain numbers."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from what :meth:`state` returned."""
        as_tensor = partial(torch.tensor, dtype=torch.float64, device=device)
        self._sums = {name: as_tensor(pair) for name, pair in state.items()}


class FamilyConfig(Schema, ABC):
    """Describes one model of a family, and builds it."""

    summary: ClassVar[str] = ""
    """One line for ``synthcube families``."""

    needs: ClassVar[str] = ""
    """Family whose trained artifact the field ``first_stage`` names; empty where there is none."""

    not_averaged: ClassVar[str] = ""
    """Why weights that several sites trained cannot be averaged; empty where they can."""

    not_private: ClassVar[str] = ""
    """Why it cannot be trained with differential privacy; empty where it can."""

    name: str = Field(description="Family of the model.")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="Optimizer, with its arguments."
    )
    scheduler: SchedulerConfig | None = Field(
        default=SchedulerConfig(), description="Learning-rate schedule; null for none."
    )

    @model_validator(mode="before")
    @classmethod
    def _optimizers_keep_their_kind(cls, values: Any) -> Any:
        return completed(cls.model_fields, values)

    @abstractmethod
    def build(self, image: ImageSpec) -> Family:
        """The untrained model for images of this size and number of channels."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """The smallest model, which trains in about a second on a CPU (images of 16 voxels)."""

    def resolved(self) -> Self:
        """A copy that contains what `build` needs of the files that this config points at.

        Raises SynthCubeError where a file is missing, or does not fit.
        """
        return self

    def with_sampling(self, settings: Mapping[str, Any]) -> Self:
        """A copy that draws images with other settings; those that are None stay.

        Args:
            settings: those of SAMPLING_KEYS.

        Raises:
            ConfigError: this family has no such setting, or not this value of it.
        """
        return with_sampling(self, settings, self.name)

    def sampling(self) -> dict[str, Any]:
        """The settings that images are drawn with: those of SAMPLING_KEYS that this family has."""
        return sampling_of(self)

    def earlier_share(self) -> float:
        """Share of the training after which the averaged weights of the family's `network` are kept
        in its `earlier` (models/nets/autoguidance.py); 0: they are not."""
        return 0.0

    def optimizes_by_hand(self) -> bool:
        """Whether several networks are trained, each with its own optimizer."""
        return False

    def private_faults(self, kept: Callable[[str], bool]) -> list[str]:
        """Reasons why a training with privacy would tell of the images, one sentence each.

        Args:
            kept: whether the weight or buffer of a name is taken from a trained model.
        """
        if self.not_private:
            return [f"model.name {self.name}: {self.not_private}"]
        if self.optimizes_by_hand():
            return [
                "model.adversarial_weight: a discriminator is trained in steps of its own, which "
                "are not private; set it to 0"
            ]
        return []

    def shortened(self) -> tuple[dict[str, int], int]:
        """Settings with which a training passes all its phases soon, and after how many epochs."""
        return {}, 1

    def faults(self, image: ImageSpec) -> list[str]:
        """Reasons why these images do not fit this model, one sentence each; empty if they fit."""
        return []

    def source_faults(self, image: ImageSpec) -> list[str]:
        """The reason why source images are refused, for families that cannot follow them."""
        if not image.source_channels:
            return []
        return [
            f"data.source_channels {list(image.source_channels)}: {self.name} makes images out of "
            "noise alone; ddpm and rectified_flow follow source images"
        ]


SAMPLING_KEYS = ("guidance", "autoguidance", "sampler", "steps", "truncation")
F = TypeVar("F", bound=Schema)


def with_sampling(fields: F, settings: Mapping[str, Any], family: str) -> F:
    """A copy of `fields` that draws with other settings; see FamilyConfig.with_sampling."""
    kind = type(fields)
    changes = {key: value for key, value in settings.items() if value is not None}
    if not changes:
        return fields
    unknown = [f"sampling.{key}" for key in changes if sampling_field(key) not in kind.model_fields]
    if unknown:
        raise ConfigError(f"{family} cannot use {' and '.join(unknown)}: leave it out.")
    values = fields.model_dump()
    if "sampler" in changes and "steps" not in changes:
        values.pop("num_sampling_steps", None)  # each sampler has its own default
    values |= {sampling_field(key): value for key, value in changes.items()}
    try:
        return kind.model_validate(values, context=TRAINED)
    except ValidationError as error:
        faults = faults_of(error)
        raise ConfigError("The section sampling does not fit the model:", faults) from error


def sampling_of(fields: Schema) -> dict[str, Any]:
    """The settings that `fields` draw with; see FamilyConfig.sampling."""
    present = [key for key in SAMPLING_KEYS if sampling_field(key) in type(fields).model_fields]
    values = {key: getattr(fields, sampling_field(key)) for key in present}
    if "steps" in values:
        values["steps"] = getattr(fields, "sampling_steps", values["steps"])
    return values


def sampling_field(key: str) -> str:
    """The field of a config that a key of the section `sampling` stands for."""
    return "num_sampling_steps" if key == "steps" else key


def size_faults(
    image: ImageSpec, factor: int, num_levels: int, *,
    key: str = "model.channels", size_name: str = "data.size", least: int = 1,
) -> list[str]:  # fmt: skip
    """The reason why a network whose `key` has that many levels cannot make the sides `factor`
    times smaller, with `least` voxels left of the shortest; empty if it can."""
    if all(side % factor == 0 and side >= least * factor for side in image.size):
        return []
    bound = f", and at least {least * factor}" if least > 1 else ""
    return [
        f"{size_name} {list(image.size)}: every side must be a multiple of {factor}{bound}, "
        f"because {key} has {num_levels} levels"
    ]


class Family(pl.LightningModule, ABC):
    """Trains with one optimizer on :meth:`loss`; everything is in the model's range [-1, 1]."""

    unaveraged: ClassVar[tuple[str, ...]] = ()
    """Submodules that are not needed for sampling, of which no moving average is kept."""
    predicts_noise: ClassVar[bool] = False
    """Whether `loss` is that of a prediction of noise, which is large until images are drawn."""
    translates_any_size: ClassVar[bool] = False
    """Whether images are made of source images that are larger or smaller than those trained on."""

    def __init__(self, config: FamilyConfig, image: ImageSpec) -> None:
        super().__init__()
        self.config = config
        self.image = image
        # The training sets these for families that optimize by hand: batches of a step, and the
        # largest norm of a gradient.
        self.accumulate = 1
        self.gradient_clip_norm: float | None = None
        self.time_share: Callable[[], float] = lambda: 0.0
        """The share of the training's time limit that is spent, if there is one."""
        self.means = {"train": EpochMeans(), "validation": EpochMeans()}
        self.latest_terms: dict[str, Tensor] = {}
        """The losses that the last training step logged, by train/name."""

    @property
    def optimizer_names(self) -> tuple[str, ...]:
        """What each optimizer trains, in the order of `configure_optimizers`."""
        return ("model",)

    @property
    def differentiates_twice(self) -> bool:
        """Whether the loss contains a gradient, as a gradient penalty does."""
        return False

    def fit_statistics(self, batches: Iterable[Batch], train_rows: Sequence[int]) -> None:
        """Measure the images before the first step, also of a resumed run.

        `batches` are all images of the manifest, in its order, not augmented; `train_rows` are the
        rows of the training images among them.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name; ``loss`` is minimised, the others are logged beside it."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._logged_loss(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._logged_loss(batch, "validation")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        described = self.described_optimizer(trained, self.config.optimizer, self.config.scheduler)
        return cast("OptimizerLRScheduler", described)

    def described_optimizer(
        self, trained: Sequence[Parameter], config: OptimizerConfig, rate: SchedulerConfig | None
    ) -> dict[str, Any]:
        """Lightning's description of an optimizer with its schedule over this training."""
        optimizer = config.build(trained)
        if rate is None:
            return {"optimizer": optimizer}
        num_epochs = int(self.trainer.max_epochs or 1)
        # The rest of an epoch is a step too.
        batches = self.trainer.estimated_stepping_batches / num_epochs
        num_steps = math.ceil(batches / self.accumulate) * num_epochs
        schedule = rate.build(optimizer, num_steps, num_epochs, self.time_share)
        if "monitor" in schedule:
            validates = bool(self.trainer.limit_val_batches)
            schedule["monitor"] = "validation/loss" if validates else "train/loss"
            schedule["frequency"] = self.trainer.check_val_every_n_epoch if validates else 1
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def log_terms(self, terms: dict[str, Tensor], batch: Batch, stage: str) -> None:
        """Log each scalar as stage/name, averaged over the epoch and over processes."""
        named = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        if stage == "train":
            self.latest_terms.update(named)
        self.means[stage].add(named, len(batch["index"]))

    def _logged_loss(self, batch: Batch, stage: str) -> Tensor:
        terms = self.loss(batch)
        self.log_terms(terms, batch, stage)
        return terms["loss"]


@runtime_checkable
class Samples(Protocol):
    """Generates images out of noise."""

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        """One image for each generator: (B, C, *spatial) in [-1, 1], following `condition`.

        Image i depends on generator i and row i of the condition alone, so that neither the batch
        size nor its neighbours change it.
        """


@runtime_checkable
class Reconstructs(Protocol):
    """Maps an image through a bottleneck and back."""

    def reconstruct(self, image: Tensor) -> Tensor:
        """(B, C, *spatial) in [-1, 1] to the same shape and range."""


@runtime_checkable
class Encodes(Protocol):
    """Compresses images to a smaller grid of real numbers, and back."""

    def latent_shape(self) -> tuple[int, ...]:
        """(c, *smaller spatial) of the latent of one image."""

    def encode(self, image: Tensor) -> Tensor:
        """(B, C, *spatial) in [-1, 1] to (B, *latent_shape): the most likely latent, no sample."""

    def decode(self, latent: Tensor) -> Tensor:
        """(B, *latent_shape) to (B, C, *spatial) in [-1, 1]."""


@runtime_checkable
class ScalesByMoments(Protocol):
    """Scales what it learns by the mean and spread of the training images, which sites pool."""

    def moments(self) -> Moments:
        """Of the training images, once `fit_statistics` has measured them."""

    def scale_by(self, moments: Moments) -> None:
        """Scale by these moments in place of the measured ones."""


@runtime_checkable
class Quantizes(Protocol):
    """Compresses images to a smaller grid of codes, and back."""

    def code_shape(self) -> tuple[int, ...]:
        """Number of codes along each spatial axis."""

    def num_codes(self) -> int:
        """Size of the codebook: codes are 0 to this number, exclusive."""

    def encode_codes(self, image: Tensor) -> Tensor:
        """(B, C, *spatial) in [-1, 1] to (B, *code_shape), int64."""

    def decode_codes(self, codes: Tensor) -> Tensor:
        """(B, *code_shape), int64, to (B, C, *spatial) in [-1, 1]."""
