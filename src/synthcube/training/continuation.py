"""Checkpoints within an epoch, from which a training goes on exactly where it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from synthcube.training.preemption import Preemption

# Processes on GPUs ask each other only so often, for none of them should wait for the others.
_STEPS_BETWEEN_QUESTIONS = 10


class Continuation(Checkpoint):
    """Saves when its time has come, and when a signal did, after which the training ends.

    Args:
        path: of the checkpoint.
        accumulate: batches whose gradients make a step; in between nothing can be saved.
        every_n_minutes: between checkpoints; None: only for a signal.
        restored: puts trained weights back where averaged ones stand in for a validation.
    """

    def __init__(
        self,
        path: Path,
        preemption: Preemption,
        *,
        accumulate: int,
        every_n_minutes: float | None,
        restored: Callable[[pl.Trainer, Any], None],
    ) -> None:
        self.path = path
        self.preemption = preemption
        self.accumulate = accumulate
        self.seconds = 60 * every_n_minutes if every_n_minutes else float("inf")
        self.restored = restored
        self._saved_at = time.monotonic()
        self._saves: str | None = None

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._saved_at = time.monotonic()
        self.preemption.listen()  # a logger may have taken one
        # It would have the processes ask each other at every step whether that came; we do below.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, _: Any, __: Any, batch_idx: int
    ) -> None:
        is_last = trainer.is_last_batch
        if (batch_idx + 1) % self.accumulate and not is_last:
            return
        number = (batch_idx + 1) // self.accumulate
        late, stops = self._asked(trainer, number, always=is_last)
        if stops or (late and not is_last):  # the epoch's end saves anyway
            self._save(trainer, "validation" if is_last and _validates(trainer) else "batch")
        if stops:
            self._stop(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, _: Any, __: Any, batch_idx: int, *___: Any
    ) -> None:
        if self._asked(trainer, batch_idx, always=False)[1]:
            self.restored(trainer, module)
            self._save(trainer, "validation")
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._saved_at = time.monotonic()
        # Lightning leaves schedules that follow a metric alone where an epoch was interrupted,
        # for it forgets the metric; we do not.
        trainer.fit_loop.restarting = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if self._saves:
            _set_progress(checkpoint["loops"]["fit_loop"], before=self._saves)

    def _asked(self, trainer: pl.Trainer, number: int, *, always: bool) -> tuple[bool, bool]:
        """Whether to save, and whether to stop: all processes do the same.

        Args:
            number: of the step, or of the batch in a validation.
            always: ask the others now, not only every so often.
        """
        late = time.monotonic() - self._saved_at > self.seconds
        stops = self.preemption.heard is not None
        if trainer.world_size == 1:
            return late, stops
        device = trainer.strategy.root_device
        if device.type != "cpu" and number % _STEPS_BETWEEN_QUESTIONS and not always:
            return False, False
        asked = torch.tensor([float(late), float(stops)], device=device)
        answer: Any = trainer.strategy.reduce(asked, reduce_op="max")
        late, stops = (bool(each) for each in answer.tolist())
        return late, stops

    def _save(self, trainer: pl.Trainer, before: str) -> None:
        self._saves = before
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self._saves = None
        self._saved_at = time.monotonic()

    def _stop(self, trainer: pl.Trainer) -> None:
        writer: Any = trainer.strategy.checkpoint_io
        writer.finish()
        stop = self.preemption.stop(trainer.current_epoch, trainer.global_step, self.path)
        if trainer.is_global_zero:
            raise stop
        raise SystemExit(stop.exit_code)  # the first process says it for all


def _validates(trainer: pl.Trainer) -> bool:
    every = trainer.check_val_every_n_epoch or 1
    return trainer.enable_validation and (trainer.current_epoch + 1) % every == 0


def _set_progress(loops: dict[str, Any], *, before: str) -> None:
    """Let Lightning's counters say that a batch is over, or that the validation is to come.

    Lightning counts a batch as completed after the callbacks that save have run, and takes one
    that is not for one to be repeated, or an epoch's last one for a reason not to validate.
    """
    batches = loops["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"]
    if before == "batch":
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        return
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        # what it looks like when the first batch is about to be validated
        validation[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False


class NewHyperparameters(Callback):
    """Lets the optimizers of a continued run have what the config says now.

    A checkpoint holds the hyperparameters of its time. A schedule goes on from where it was, in
    proportion to the new learning rate.
    """

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._wanted = [
            [
                {name: group[name] for name in group if name != "params"}
                for group in each.param_groups
            ]
            for each in trainer.optimizers
        ]

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for optimizer, groups in zip(trainer.optimizers, self._wanted, strict=True):
            for group, wanted in zip(optimizer.param_groups, groups, strict=True):
                start = "initial_lr" if "initial_lr" in group else "lr"
                group |= {**wanted, "lr": group["lr"] * (wanted[start] / group[start])}
        for each in trainer.lr_scheduler_configs:
            if hasattr(each.scheduler, "base_lrs"):
                groups = each.scheduler.optimizer.param_groups
                each.scheduler.base_lrs = [group["initial_lr"] for group in groups]
