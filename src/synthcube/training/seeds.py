"""Random draws of a training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from synthcube.runtime import derived_seed


class StepSeeds(Callback):
    """Draws of every step depend on the seed and the step alone: a resumed run repeats them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._draw(trainer, "step", trainer.fit_loop.total_batch_idx)

    def on_validation_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # The same draws at every validation, so that its loss compares from epoch to epoch.
        self._draw(trainer, "validation")

    def _draw(self, trainer: pl.Trainer, *parts: str | int) -> None:
        # Processes that share a batch draw noise of their own.
        rank = [trainer.global_rank] if trainer.global_rank else []
        torch.manual_seed(derived_seed(self.seed, *parts, *rank))
