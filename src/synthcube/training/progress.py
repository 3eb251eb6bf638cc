"""How far a training is and how fast: rows for the loggers, and lines for a job's log."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from synthcube.models.family import Family
from synthcube.runtime import resident_bytes
from synthcube.schema import Batch
from synthcube.training.throughput import Ledger

log = logging.getLogger("synthcube")


class LogLines(Callback):
    """A row for every logger each N steps; lines too, where no progress bar is shown.

    Nothing is read from a GPU between two rows.
    """

    def __init__(self, interval: int, ledger: Ledger, *, quiet: bool) -> None:
        self.interval = interval
        self.ledger = ledger
        self.level = logging.DEBUG if quiet else logging.INFO
        self._images = 0
        self._before = (0.0, 0.0)  # seconds in steps, and in waiting for data
        self._rates: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._images, self._before = 0, self.ledger.training_seconds()
        if isinstance(module, Family):
            for line in described_optimizers(trainer, module):
                log.log(self.level, line)

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any
    ) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % self.interval == 0:
            # Schedules step before the end of a batch: these are the rates of its own step.
            self._rates = learning_rates(trainer.optimizers, optimizer_names(trainer, module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        self._images += len(batch["index"]) * trainer.world_size
        if (trainer.fit_loop.total_batch_idx + 1) % self.interval or outputs is None:
            return
        values = {
            "train/loss_now": float(outputs["loss"]),
            **_other_terms(module),
            **self._rates,
            **self._speed(),
            "memory_gb": memory_gb(trainer.strategy.root_device),
        }
        for logger in trainer.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, trainer.global_step)
        log.log(self.level, line(trainer, values))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        shown = [
            f"{name} {float(value):.4f}"
            for name, value in trainer.callback_metrics.items()
            if name.endswith("/loss")
        ]
        log.log(
            self.level, "epoch %d/%s  %s",
            trainer.current_epoch + 1, trainer.max_epochs, "  ".join(shown),
        )  # fmt: skip

    def _speed(self) -> dict[str, float]:
        """Since the last row; validation, pictures and saving do not count."""
        step, data = self.ledger.training_seconds()
        stepped, waited = step - self._before[0], data - self._before[1]
        images, self._images, self._before = self._images, 0, (step, data)
        spent = max(stepped + waited, 1e-9)
        return {"images_per_second": images / spent, "data_wait_percent": 100 * waited / spent}


def line(trainer: pl.Trainer, values: dict[str, float]) -> str:
    """What a job's log says at a step."""
    losses = [
        f"{name.removeprefix('train/').removesuffix('_now')} {value:.4f}"
        for name, value in values.items()
        if name.endswith("loss_now")
    ]
    rates = [
        f"{name.replace('/', ' ')} {value:.2e}"
        for name, value in values.items()
        if name.split("/")[0] == "lr"
    ]
    return "  ".join([
        f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
        f"step {trainer.global_step}", *losses, *rates,
        f"{values['images_per_second']:.1f} images/s",
        f"data wait {values['data_wait_percent']:.0f}%",
        f"memory {values['memory_gb']:.2f} GB",
    ])  # fmt: skip


def learning_rates(optimizers: list[torch.optim.Optimizer], names: list[str]) -> dict[str, float]:
    """lr, or lr/name where there are several; lr/name/0 and so on for groups that differ."""
    found: dict[str, float] = {}
    for name, optimizer in zip(names, optimizers, strict=True):
        key = f"lr/{name}" if len(optimizers) > 1 else "lr"
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        alike = len(set(rates)) == 1
        found |= {key: rates[0]} if alike else {f"{key}/{i}": r for i, r in enumerate(rates)}
    return found


def optimizer_names(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """A name for each optimizer: the family's, or its number where that has none."""
    names = module.optimizer_names if isinstance(module, Family) else ()
    number = len(trainer.optimizers)
    return list(names) if len(names) == number else [str(i) for i in range(number)]


def described_optimizers(trainer: pl.Trainer, family: Family) -> list[str]:
    """One line for each: what it trains, how, and on what schedule."""
    lines = []
    names = optimizer_names(trainer, family)
    for name, optimizer in zip(names, trainer.optimizers, strict=True):
        numbers = [each.numel() for group in optimizer.param_groups for each in group["params"]]
        key = "scheduler" if name == names[0] else f"{name}_scheduler"
        schedule = getattr(getattr(family.config, key, None), "name", "no")
        # Schedules with a warm-up have lowered it by now.
        rates = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups}
        lines.append(
            f"{name}: {sum(numbers):,} weights, {type(optimizer).__name__}, {schedule} schedule, "
            f"lr {', '.join(f'{rate:.2e}' for rate in sorted(rates))}"
        )
    return lines


def memory_gb(device: torch.device) -> float:
    """On a GPU the most that was allocated so far; on a CPU what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resident_bytes() / 1e9


def _other_terms(module: pl.LightningModule) -> dict[str, float]:
    terms = module.latest_terms if isinstance(module, Family) else {}
    return {f"{name}_now": float(value) for name, value in terms.items() if name != "train/loss"}
