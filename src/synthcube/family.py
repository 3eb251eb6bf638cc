"""The contract between the house and a family of generative models.

A family is one file in ``synthcube.families``: a config class that describes the model and
builds it, and a module that gives the training loss. What else a model can do, it says by
having the method of a protocol below: tasks ask with isinstance, never by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from pydantic import Field
from typing_extensions import Self

from synthcube.optimization import OptimizerConfig, SchedulerConfig
from synthcube.schema import Batch, ImageSpec, Schema

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


class FamilyConfig(Schema, ABC):
    """Describes one model of a family, and builds it."""

    summary: ClassVar[str] = ""
    """One line for ``synthcube families``."""

    name: str = Field(description="Family of the model.")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="Optimizer, with its arguments."
    )
    scheduler: SchedulerConfig | None = Field(
        default=SchedulerConfig(), description="Learning-rate schedule; null for none."
    )

    @abstractmethod
    def build(self, image: ImageSpec) -> Family:
        """The untrained model for images of that size and those channels."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Self:
        """The smallest instance, which trains in about a second on a CPU (images of 16 voxels)."""

    def faults(self, image: ImageSpec) -> list[str]:
        """Why these images do not fit this model, one sentence each; empty where they do."""
        return []


class Family(pl.LightningModule, ABC):
    """Trains with one optimizer on :meth:`loss`; everything is in the model's range [-1, 1]."""

    def __init__(self, config: FamilyConfig, image: ImageSpec) -> None:
        super().__init__()
        self.config = config
        self.image = image

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Scalars by name; ``loss`` is minimised, the others are logged beside it."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self._logged_loss(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._logged_loss(batch, "validation")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = self.config.optimizer.build(trained)
        if self.config.scheduler is None:
            return optimizer
        num_steps = int(self.trainer.estimated_stepping_batches)
        num_epochs = int(self.trainer.max_epochs or 1)
        schedule: Any = self.config.scheduler.build(optimizer, num_steps, num_epochs)
        if "monitor" in schedule:
            validates = bool(self.trainer.limit_val_batches)
            schedule["monitor"] = "validation/loss" if validates else "train/loss"
            schedule["frequency"] = self.trainer.check_val_every_n_epoch if validates else 1
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _logged_loss(self, batch: Batch, stage: str) -> torch.Tensor:
        terms = self.loss(batch)
        named = {f"{stage}/{name}": value.detach() for name, value in terms.items()}
        # Lightning averages counts over processes in integers: a multiple leaves nothing to round.
        number = len(batch["index"]) * self.trainer.world_size
        self.log_dict(
            named, on_step=False, on_epoch=True, prog_bar=True, batch_size=number, sync_dist=True
        )
        return terms["loss"]


@runtime_checkable
class Samples(Protocol):
    """Generates images out of noise."""

    def sample(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """One image for each generator: (B, C, *spatial) in [-1, 1].

        Image i depends on generator i alone, so that neither the batch size nor its neighbours
        change it.
        """
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """Maps an image through a bottleneck and back."""

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, *spatial) in [-1, 1] to the same shape and range."""
        ...


def noise(generators: Sequence[torch.Generator], image: ImageSpec) -> torch.Tensor:
    """Standard normal noise, (B, C, *spatial), one image from each generator, on the CPU.

    Drawn on the CPU whatever the device, so that a seed means the same image everywhere.
    """
    shape = (image.channels, *image.size)
    return torch.stack([torch.randn(shape, generator=each) for each in generators])
