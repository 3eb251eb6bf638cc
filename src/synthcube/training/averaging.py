"""Moving average of the weights: what is validated, drawn and shared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from synthcube.training.sharding import FullySharded, gathered, scattered


class RampedEMA(WeightAveraging):
    """Moving average of the weights whose decay ramps up, so that early weights are forgotten.

    At the n-th update the decay is min(`decay`, (1 + n) / (10 + n)), as in the exponential
    moving average of TensorFlow and diffusers. Buffers are copied, not averaged, but for the
    statistics of batch norms: those of the latest weights do not fit averaged ones.

    Args:
        halved: whether the weights have 16 bits; the average is in float32 all the same.
    """

    def __init__(self, decay: float, *, halved: bool = False) -> None:
        how: Any = {"avg_fn": self._average_one} if halved else {"multi_avg_fn": self._average}
        super().__init__(use_buffers=False, **how)
        self.max_decay = decay
        self.halved = halved

    @property
    def model(self) -> torch.nn.Module | None:
        """The model with the averaged weights, while training."""
        return self._average_model.module if self._average_model else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self.halved and self.model:
            self.model.float()
        if isinstance(trainer.strategy, FullySharded) and self.model:
            trainer.strategy.shard(self.model)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = gathered(checkpoint["state_dict"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        pieces = {
            name: scattered(checkpoint[name], pl_module)
            for name in ("state_dict", "current_model_state")
            if name in checkpoint
        }
        super().on_load_checkpoint(trainer, pl_module, checkpoint | pieces)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        number = self._latest_update_step
        statistics = _statistics(self.model) if number and self.model else []
        averaged = [each.clone() for each in statistics]
        super().on_train_batch_end(trainer, pl_module, *args)
        if averaged:
            if self._latest_update_step > number:
                torch._foreach_lerp_(averaged, _statistics(pl_module), 1 - self._decay(number))
            torch._foreach_copy_(statistics, averaged)

    def restore(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the trained weights back in a validation that is broken off."""
        self.on_validation_epoch_end(trainer, module)

    @torch.no_grad()
    def _average(
        self, averaged: Sequence[torch.Tensor], current: Sequence[torch.Tensor], _: Any
    ) -> None:
        decay = self._decay(self._latest_update_step)
        torch._foreach_lerp_(_local(averaged), _local(current), 1 - decay)

    def _average_one(self, averaged: torch.Tensor, current: torch.Tensor, _: Any) -> torch.Tensor:
        decay = self._decay(self._latest_update_step)
        return averaged.lerp(current.to(averaged.dtype), 1 - decay)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        if not self.halved or self.model is None:
            super()._swap_models(pl_module)
            return
        averaged = chain(self.model.parameters(), self.model.buffers())
        for one, other in zip(averaged, chain(pl_module.parameters(), pl_module.buffers()),
                              strict=True):  # fmt: skip
            # Not their values: those of the average would be rounded.
            one.data, other.data = other.data, one.data

    def _decay(self, number: int) -> float:
        return min(self.max_decay, (1 + number) / (10 + number))


def _local(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This process's pieces of those that are cut, and the others as they are."""
    return [each.to_local() if isinstance(each, DTensor) else each for each in tensors]


def _statistics(module: torch.nn.Module) -> list[torch.Tensor]:
    """Running mean and variance of every batch norm."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    found = [each for norm in norms for each in (norm.running_mean, norm.running_var)]
    return [each for each in found if each is not None]
