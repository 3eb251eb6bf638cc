"""The end of a training by time: schedules follow the clock, and nothing learned is lost."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer

from synthcube.models.family import Family
from synthcube.terminal import Progress

log = logging.getLogger("synthcube")

# Share of the first loss at which generated images are still noise: a U-Net that has learned
# nothing predicts zero, whose loss is the first one.
_NOISE_SHARE = 0.25
_FEWEST_STEPS = 10  # fewer are a trial, whose images nobody expects to be good


class TimeLimit(Timer):
    """Ends a training after `training.max_minutes`, with a validation, whatever the epoch.

    The family's `time_share` tells its schedules how much of the time is spent, the same in all
    processes, so that a training that its time ends is annealed as one that its epochs end.
    """

    def __init__(self, minutes: float, bar: Progress) -> None:
        super().__init__(timedelta(minutes=minutes), interval="step", verbose=False)
        self.minutes = minutes
        self.bar = bar
        self.share = 0.0
        """Share of the time that is spent, in [0, 1]."""

    @property
    def state_key(self) -> str:
        return Timer.__name__

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.bar.ends_at = time.monotonic() + 60 * self.minutes - self.time_elapsed()

    def _check_time_remaining(self, trainer: pl.Trainer) -> None:
        spent = self.time_elapsed() / (60 * self.minutes)
        self.share = min(1.0, float(trainer.strategy.broadcast(spent)))
        if self.share == 1.0:
            trainer.should_stop = True
            # The weights of the last step may be the best; they are validated in any epoch.
            trainer.check_val_every_n_epoch = 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        epochs = trainer.current_epoch
        if self.share == 1.0 and epochs < (trainer.max_epochs or 0):
            log.info(
                "Stopped by training.max_minutes (%g) after %d of %s epochs, %d steps.",
                self.minutes, epochs, trainer.max_epochs, trainer.global_step,
            )  # fmt: skip


class NoiseWarning(pl.Callback):
    """Warns at the end of a training whose model still predicts little better than at first.

    For families whose network predicts the noise or the velocity in a noisy image: until its loss
    is well below that of the first step, generated images are noise.

    Args:
        silent: only remember the first loss, for a later part of the training.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self._first: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if self._first is None and isinstance(pl_module, Family):
            self._first = pl_module.latest_terms.get("train/loss")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        last = metrics.get("validation/loss", metrics.get("train/loss"))
        if last is None or self._first is None or self.silent:
            return
        before, now = float(self._first), float(last)
        is_noise = now > _NOISE_SHARE * before and trainer.global_step >= _FEWEST_STEPS
        if is_noise and trainer.is_global_zero:
            log.warning(
                "The loss is %.3g after %d steps, and was %.3g at the first: generated images will "
                "be mostly noise. Train longer (training.max_epochs, training.max_minutes), or "
                "with a higher model.optimizer.lr.", now, trainer.global_step, before,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {} if self._first is None else {"first": float(self._first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "first" in state_dict:
            self._first = torch.tensor(state_dict["first"])
