"""Moving average of the weights: what is validated, drawn and shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.nn.modules.batchnorm import _BatchNorm


class RampedEMA(WeightAveraging):
    """Moving average of the weights whose decay ramps up, so that early weights are forgotten.

    At the n-th update the decay is min(`decay`, (1 + n) / (10 + n)), as in the exponential
    moving average of TensorFlow and diffusers. Buffers are copied, not averaged, but for the
    statistics of batch norms: those of the latest weights do not fit averaged ones.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.max_decay = decay

    @property
    def model(self) -> torch.nn.Module | None:
        """The model with the averaged weights, while training."""
        return self._average_model.module if self._average_model else None

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
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)

    def _decay(self, number: int) -> float:
        return min(self.max_decay, (1 + number) / (10 + number))


def _statistics(module: torch.nn.Module) -> list[torch.Tensor]:
    """Running mean and variance of every batch norm."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    found = [each for norm in norms for each in (norm.running_mean, norm.running_var)]
    return [each for each in found if each is not None]
