"""Metrics of a training by name: which of them chooses the best model, and whether it exists."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.schema import Batch
from synthcube.training.checkpoints import BestAndLast
from synthcube.training.config import TrainingConfig
from synthcube.training.dry_pass import copy_of, trained_terms


def best_and_last(folder: Path, monitor: str | None, training: TrainingConfig) -> BestAndLast:
    """Checkpoints by `training.best`, or by `monitor` where that says nothing."""
    best = training.best
    every = training.validate_every_n_epochs
    if best is None:
        return BestAndLast(folder, monitor, every, "min")
    return BestAndLast(folder, best.metric, every, best.mode)


def metrics_asked_for(training: TrainingConfig) -> dict[str, str]:
    """Names of metrics that a config mentions, by the key that does."""
    sections = {"training.best": training.best, "training.early_stop": training.early_stop}
    return {f"{key}.metric": section.metric for key, section in sections.items() if section}


def require_metrics(
    family: Family, batch: Batch, training: TrainingConfig, *, validates: bool
) -> None:
    """Compute the losses of one batch on a copy of `family`, if its metrics must be known.

    Args:
        batch: on the family's device.
        validates: whether there are images to validate on.

    Raises:
        ConfigError: a metric that the config mentions is none of this training.
    """
    asked = metrics_asked_for(training)
    if not asked:
        return
    known = {f"train/{name}" for name in trained_terms(copy_of(family), batch)}
    if validates:
        with torch.no_grad():
            known |= {f"validation/{name}" for name in copy_of(family).loss(batch)}
    _refuse_unknown(asked, sorted(known), validates=validates)


class MetricGuard(Callback):
    """Stops at the first validation that lacks a metric that was there before the first step."""

    def __init__(self, training: TrainingConfig) -> None:
        self.asked = metrics_asked_for(training)
        self.every_n_epochs = training.validate_every_n_epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            _refuse_unknown(self.asked, sorted(trainer.callback_metrics), validates=True)


def _refuse_unknown(asked: dict[str, str], known: list[str], *, validates: bool) -> None:
    unknown = [
        f"{key} is {metric!r}; known: {', '.join(known)}"
        for key, metric in asked.items()
        if metric not in known
    ]
    if unknown:
        hint = "" if validates else " (no images are validated: raise data.validation_fraction)"
        raise ConfigError(f"This training has no such metric{hint}:", unknown)
