"""Metrics of a training: epoch means, metrics.csv, the best checkpoint, early stopping."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from synthcube import reading
from synthcube.errors import ConfigError, OutputError
from synthcube.models.family import EpochMeans, Family, Samples
from synthcube.schema import MAX_COUNT, Batch
from synthcube.storage import storage_errors, write_with
from synthcube.training.acceleration import trained_terms
from synthcube.training.checkpoints import BestAndLast, load
from synthcube.training.config import COPIES, EarlyStopConfig, TrainingConfig
from synthcube.training.loggers import log_row
from synthcube.training.strategies import gather_objects

log = logging.getLogger("synthcube")

_FIRST_COLUMNS = ("epoch", "step")


class MetricsTable(Logger):
    """Writes metrics.csv: appends a row of epoch, step and named numbers; new names add columns.

    Epochs count from 1, as they do for every logger.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = list(_FIRST_COLUMNS)
        if path.exists():
            self.columns = next(self._lines(), self.columns)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: f"{value:.8g}" for name, value in metrics.items() if name != "epoch"}
        row |= {"epoch": f"{int(metrics.get('epoch', 0))}", "step": str(step)}
        new = [name for name in row if name not in self.columns]
        if new or not self.path.exists():
            rows = self.rows()
            self.columns += new
            self._rewrite(rows)
        with storage_errors(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def drop_after(self, step: int, *, within_epoch: bool) -> None:
        """Remove rows that a killed run wrote after the checkpoint that is resumed.

        Args:
            within_epoch: the checkpoint was written before the end of its epoch.
        """
        if self.path.exists():
            last_epoch_row = step - 1 if within_epoch else step
            rows = [
                row
                for row in self.rows()
                if int(row["step"]) <= (last_epoch_row if _is_of_epoch(row) else step)
            ]
            self._rewrite(rows)

    def rows(self) -> list[dict[str, str]]:
        """The complete rows, as text by column."""
        if not self.path.exists():
            return []
        lines = self._lines()
        header = next(lines, [])
        # the last row of a killed run may be incomplete
        rows = [dict(itertools.zip_longest(header, line[: len(header)])) for line in lines]
        rows = [{name: cell or "" for name, cell in row.items() if name} for row in rows]
        return [row for row in rows if re.fullmatch(r"\d{1,19}", row.get("step", ""), re.ASCII)]

    def _lines(self) -> Iterator[list[str]]:
        text = reading.read_text(self.path, OutputError, limit=reading.MAX_LIST_BYTES)
        try:
            yield from csv.reader(io.StringIO(text, newline=""))
        except csv.Error as error:
            raise OutputError(f"{self.path} is not a valid CSV: {error}.") from error

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

        write_with(self.path, write)


def _is_of_epoch(row: Mapping[str, str]) -> bool:
    return any(value for name, value in row.items() if name.endswith("/loss"))


_KEY = "epoch_means"


class LogMeans(Callback):
    """Logs the mean of each term over the epoch and all processes.

    Unlike Lightning's means, these are saved in checkpoints: an interrupted epoch ends with the
    same numbers.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        _log(trainer, module, module.means["train"])

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.means["validation"].clear()  # from an interrupted validation

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        _log(trainer, module, module.means["validation"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = gather_objects(module.means["train"].state(), trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get(_KEY, [])
        if len(states) == trainer.world_size:
            module.means["train"].load(states[trainer.global_rank], module.device)


def _log(trainer: pl.Trainer, module: pl.LightningModule, means: EpochMeans) -> None:
    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(trainer.strategy.reduce(values, reduce_op="sum"))

    values = means.take(summed)
    module.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, logger=False, batch_size=1)
    # Lightning would write the row after the checkpoint: a kill in between would lose it.
    log_row(trainer, {name: float(value) for name, value in values.items()})


def best_and_last(folder: Path, monitor: str | None, training: TrainingConfig) -> BestAndLast:
    """The checkpoint callback for `training.best`, or for `monitor` without it."""
    best, every = training.best, training.validate_every_n_epochs
    if best is None:
        return BestAndLast(folder, monitor, every, "min")
    return BestAndLast(folder, best.metric, every, best.mode)


def configured_metrics(training: TrainingConfig) -> dict[str, str]:
    """Names of the metrics in a config, by their key."""
    sections = {"training.best": training.best, "training.early_stop": training.early_stop}
    return {f"{key}.metric": section.metric for key, section in sections.items() if section}


def require_metrics(
    family: Family, batch: Batch, training: TrainingConfig, *, validates: bool
) -> None:
    """Check the metrics of a config against those that `family` computes for one batch.

    Args:
        batch: on the family's device.
        validates: whether there are validation images.
    """
    metrics = configured_metrics(training)
    if not metrics:
        return
    known = {f"train/{name}" for name in trained_terms(copy.deepcopy(family).eval(), batch)}
    if validates:
        with torch.no_grad():
            known |= {f"validation/{name}" for name in copy.deepcopy(family).eval().loss(batch)}
        # A translated image is near to its own training image, as it should be; and patches are
        # cut at random places.
        is_comparable = not (family.image.source_channels or family.image.patches)
        if training.early_stop and isinstance(family, Samples) and is_comparable:
            known |= {COPIES}
    _refuse_unknown(metrics, sorted(known), validates=validates)


class MetricGuard(Callback):
    """Stops at the first validation without a metric that existed before the first step."""

    def __init__(self, training: TrainingConfig) -> None:
        self.metrics = configured_metrics(training)
        self.every_n_epochs = training.validate_every_n_epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            _refuse_unknown(self.metrics, sorted(trainer.callback_metrics), validates=True)


def _refuse_unknown(metrics: dict[str, str], known: list[str], *, validates: bool) -> None:
    unknown = [
        f"{key} is {metric!r}; known: {', '.join(known)}"
        for key, metric in metrics.items()
        if metric not in known
    ]
    if unknown:
        hint = "" if validates else " (no images are validated: raise data.validation_fraction)"
        raise ConfigError(f"This training has no such metric{hint}:", unknown)


class EarlyStop(EarlyStopping):
    """Lightning's EarlyStopping, whose patience always counts validations and can be raised.

    A metric that is not finite counts as no improvement.
    """

    def __init__(self, config: EarlyStopConfig, every_n_epochs: int) -> None:
        super().__init__(
            monitor=config.metric,
            min_delta=config.min_change,
            patience=config.patience if config.metric != COPIES else MAX_COUNT,
            divergence_threshold=config.worst,
            mode=config.mode,
            check_finite=False,
            # Validation metrics are new only at the end of a validation.
            check_on_train_epoch_end=not config.metric.startswith("validation/"),
        )
        self.config, self.every_n_epochs = config, every_n_epochs
        self.last = math.nan
        """The value that was looked at last."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.last = float(trainer.callback_metrics.get(self.monitor, math.nan))
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = float(trainer.callback_metrics.get(self.monitor, math.nan))
        super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning would restore the earlier patience.
        super().load_state_dict({**state_dict, "patience": self.patience})
        self.last = float(state_dict.get("last", math.nan))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and (reason := self.reason()):
            log.info("Stopped early: %s to continue.", reason)

    def reason(self) -> str:
        """Why it ends the training, and what would continue it; empty if it does not."""
        config, worst = self.config, self.config.worst
        if worst is not None and (self.last - worst) * (1 if config.mode == "min" else -1) > 0:
            return (
                f"{config.metric} is {self.last:.6g} (training.early_stop.limit is {worst:g}); "
                f"{'raise' if config.mode == 'min' else 'lower'} that limit"
            )
        if self.wait_count < self.patience:
            return ""
        return (
            f"{config.metric} has not improved on {float(self.best_score):.6g} in "
            f"{self.wait_count} validations (training.early_stop.patience is {config.patience}); "
            "raise that patience"
        )


def stopped_early(checkpoint: Path, training: TrainingConfig) -> str:
    """Why early stopping ended the training of a checkpoint, and what would continue it; empty if
    it did not end it."""
    if training.early_stop is None:
        return ""
    stop = EarlyStop(training.early_stop, training.validate_every_n_epochs)
    if state := load(checkpoint, mapped=True)["callbacks"].get(stop.state_key):
        stop.load_state_dict(state)
    return stop.reason()
