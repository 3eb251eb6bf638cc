"""What happens around the training steps."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from synthcube.data.pictures import save_grid
from synthcube.errors import NonFiniteLossError
from synthcube.family import Reconstructs, Samples
from synthcube.runtime import derived_seed
from synthcube.schema import Batch, Condition
from synthcube.storage import make_folder
from synthcube.training.preemption import Preemption

log = logging.getLogger("synthcube")


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


class FiniteLossGuard(Callback):
    """Stops at a loss that is not finite, naming the step, its files and the way back.

    On a GPU the loss is looked at only every `interval` steps, so that no step waits for it.
    """

    def __init__(
        self,
        files: Callable[[Sequence[int]], list[str]],
        last_good: Callable[[], str],
        interval: int,
    ) -> None:
        self.files = files
        self.last_good = last_good
        self.interval = interval
        self._recent: deque[tuple[int, torch.Tensor, torch.Tensor]] = deque()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        self._recent.append((trainer.global_step, loss.detach(), batch["index"]))
        if loss.device.type == "cpu" or len(self._recent) >= self.interval:
            self.check(trainer)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Look at the losses since the last look, in all processes together.

        Raises:
            NonFiniteLossError: one is NaN or infinite.
        """
        found = [
            (step, loss.item(), self.files(rows.tolist()))
            for step, loss, rows in self._recent
            if not math.isfinite(loss.item())
        ]
        self._recent.clear()
        if not trainer.strategy.reduce_boolean_decision(bool(found), all=False):
            return
        found = _gathered(found, trainer)
        step, loss, _ = min(found)
        if not trainer.is_global_zero:
            raise SystemExit(0)  # the first process says it for all
        raise NonFiniteLossError(
            f"The loss became {loss} at step {step}. Last good checkpoint: {self.last_good()}. "
            "Try a lower model.optimizer.lr, compute.precision 32, or look at the batch:",
            [file for at, _, files in found if at == step for file in files],
        )


def _gathered(values: list[Any], trainer: pl.Trainer) -> list[Any]:
    """The lists of all processes, one after the other."""
    if trainer.world_size == 1:
        return values
    lists: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(lists, values)
    return [value for each in lists for value in each]


class SamplePictures(Callback):
    """Writes what the averaged weights make, with the same seeds each time.

    Args:
        examples: images whose conditions are followed, or that are reconstructed.
        averaged: the model with averaged weights, or None where there is none.
    """

    def __init__(
        self,
        folder: Path,
        examples: Batch,
        averaged: Callable[[], Any],
        every_n_epochs: int,
        seed: int,
        preemption: Preemption,
    ) -> None:
        self.folder = folder
        self.examples = examples
        self.averaged = averaged
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self.preemption = preemption

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        is_last = epoch == trainer.max_epochs or trainer.should_stop
        if not trainer.is_global_zero:
            return
        if not self.every_n_epochs or (epoch % self.every_n_epochs and not is_last):
            return
        with self.preemption.impatient():  # who asks to stop does not wait for a picture
            self._draw(trainer, self.averaged() or module, epoch)

    def _draw(self, trainer: pl.Trainer, drawn: Any, epoch: int) -> None:
        was_training = drawn.training
        drawn.eval()
        try:
            with torch.inference_mode(), trainer.precision_plugin.forward_context():
                tiles = self._tiles(drawn)
        finally:
            drawn.train(was_training)
        number = len(self.examples["index"])
        if tiles:
            make_folder(self.folder)
            save_grid(
                self.folder / f"epoch_{epoch:04d}.png",
                tiles,
                columns=number if len(tiles) > number else None,
                raster=drawn.image.file_format == "png",
                spacing_mm=drawn.image.spacing_mm,
            )

    def _tiles(self, module: Any) -> list[torch.Tensor]:
        device = module.device
        images, number = self.examples["image"], len(self.examples["index"])
        if isinstance(module, Samples):
            seeds = [derived_seed(self.seed, "picture", i) for i in range(number)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            condition = self.examples["condition"]
            moved = Condition(
                values=condition["values"].to(device),
                source=condition["source"].to(device),
            )
            made = module.sample(generators, moved).float().cpu()
            return [*images, *made] if condition["source"].shape[1] else list(made)
        if isinstance(module, Reconstructs):
            made = module.reconstruct(images.to(device)).float().cpu()
            return [*images, *made]
        return []


class LogLines(Callback):
    """One row of metrics.csv every N steps; lines too, where no progress bar is shown."""

    def __init__(self, interval: int, *, quiet: bool) -> None:
        self.interval = interval
        self.level = logging.DEBUG if quiet else logging.INFO
        self._since = time.monotonic()
        self._images = 0
        self._rate = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._since, self._images = time.monotonic(), 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # Schedules step before the end of a batch: this is the rate that its step is taken with.
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        self._images += len(batch["index"]) * trainer.world_size
        step = trainer.fit_loop.total_batch_idx + 1
        if step % self.interval or outputs is None:
            return
        now = time.monotonic()
        values = {
            "train/loss_now": float(outputs["loss"]),
            "lr": self._rate,
            "images_per_second": self._images / max(now - self._since, 1e-9),
        }
        self._since, self._images = now, 0
        trainer.logger.log_metrics(  # type: ignore[union-attr]  # there is always metrics.csv
            values | {"epoch": trainer.current_epoch}, trainer.global_step
        )
        log.log(
            self.level,
            "epoch %d/%s  step %d  loss %.4f  lr %.2e  %.1f images/s",
            trainer.current_epoch + 1, trainer.max_epochs, trainer.global_step,
            values["train/loss_now"], values["lr"], values["images_per_second"],
        )  # fmt: skip

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        shown = [
            f"{name} {float(value):.4f}"
            for name, value in trainer.callback_metrics.items()
            if name.endswith("/loss")
        ]
        log.log(
            self.level,
            "epoch %d/%s  %s",
            trainer.current_epoch + 1,
            trainer.max_epochs,
            "  ".join(shown),
        )
