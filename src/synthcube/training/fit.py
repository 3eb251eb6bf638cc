"""One training: from a model and its data to checkpoints, metrics and pictures in a run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only

from synthcube.compute import ComputeConfig, devices_used
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError
from synthcube.family import Family
from synthcube.nets.norm import share_statistics
from synthcube.runtime import is_terminal, quiet_lightning
from synthcube.training import checkpoints, reports, throughput
from synthcube.training.averaging import RampedEMA
from synthcube.training.callbacks import (
    FiniteLossGuard,
    SamplePictures,
    StepSeeds,
)
from synthcube.training.config import TrainingConfig
from synthcube.training.continuation import Continuation, NewHyperparameters
from synthcube.training.means import LogMeans
from synthcube.training.metrics import MetricsTable
from synthcube.training.precision import weights_precision
from synthcube.training.preemption import Preemption
from synthcube.training.progress import LogLines
from synthcube.training.strategies import require_same, strategy

log = logging.getLogger("synthcube")


def fit(
    family: Family,
    data: DataModule,
    training: TrainingConfig,
    compute: ComputeConfig,
    *,
    run: Path,
    seed: int,
    precision: str,
    device: torch.device,
    checkpoint: Path | None,
    preemption: Preemption,
    accept_changes: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train `family`, from `checkpoint` where one is given; returns the last metrics.

    Args:
        accept_changes: optimizers of a continued run take the hyperparameters of the config.
        settings: the resolved config, for loggers that show it.

    Writes `checkpoints/`, `samples/`, `metrics.csv`, `throughput.json` and, where loggers are asked
    for, `logs/` under `run`.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        PreemptedError: a signal came, and a checkpoint was saved.
        OutputError: the run folder cannot be written.
    """
    table = MetricsTable(run / "metrics.csv")
    ledger = throughput.Ledger(type(family).__name__, SamplePictures.__name__)
    if checkpoint:
        data.position = checkpoints.position(checkpoint)
    num_devices = devices_used(compute, device)
    by_hand = not family.automatic_optimization
    if by_hand:
        family.accumulate = training.accumulate
        family.gradient_clip_norm = training.clip_norm(by_hand=True)
    share_statistics(family)
    if checkpoint:
        require_same(checkpoints.load(checkpoint), compute, num_devices * compute.num_nodes)
    callbacks = _callbacks(
        data,
        training,
        run,
        seed,
        _monitor(data, family),
        preemption,
        accept_changes,
        ledger,
        halved=_is_halved(precision),
    )
    with quiet_lightning():
        trainer = _trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=num_devices,
            num_nodes=compute.num_nodes,
            strategy=strategy(
                compute, training, num_devices, by_hand=by_hand, mixed=precision == "bf16-mixed"
            ),
            max_epochs=training.max_epochs,
            accumulate_grad_batches=1 if by_hand else training.accumulate,
            gradient_clip_val=None if by_hand else training.clip_norm(by_hand=False),
            check_val_every_n_epoch=training.validate_every_n_epochs,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if data.rows("validation") else 0,
            log_every_n_steps=training.log_every_n_steps,
            callbacks=callbacks,
            profiler=ledger,
            **_plugins(family, precision, device.type),
            logger=table,
            enable_progress_bar=is_terminal(),
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run,
        )
        with (
            _reported(trainer, table, ledger, data, training, run, settings or {}, checkpoint),
            preemption.patient(),
        ):
            trainer.fit(family, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@contextmanager
def _reported(
    trainer: pl.Trainer, table: MetricsTable, ledger: throughput.Ledger, data: DataModule,
    training: TrainingConfig, run: Path, settings: Mapping[str, Any],
    checkpoint: Path | None,
) -> Iterator[None]:  # fmt: skip
    """Report to every logger, on from `checkpoint`, and where the time went, however it ends."""
    if not trainer.is_global_zero:
        yield
        return
    checkpoints.remove_unfinished(run / "checkpoints")
    steps = checkpoints.reached(checkpoint)[1] if checkpoint else None
    within_epoch = bool(checkpoint and checkpoints.is_within_epoch(checkpoint))
    table.drop_after(steps or 0, within_epoch=within_epoch)
    opened = reports.opened(training.loggers, run, settings, steps)
    trainer.loggers = [table, *opened]
    try:
        yield
    finally:
        taken = trainer.global_step - (steps or 0)
        throughput.report(ledger, taken, data, training, run, resumed=steps is not None)
        for each in opened:
            each.close()


def _trainer(**settings: Any) -> pl.Trainer:
    try:
        trainer = pl.Trainer(**settings)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"compute: {error}") from error
    # Lightning takes it from Slurm, also where a task of a job is a training of its own.
    vars(rank_zero_only)["rank"] = trainer.global_rank
    return trainer


def _cluster() -> list[SLURMEnvironment]:
    """Slurm's part in the start of processes; jobs are put back into the queue by their script."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def _monitor(data: DataModule, family: Family) -> str | None:
    """The loss whose lowest point is the best model; None where there is no such loss."""
    if data.rows("validation"):
        return "validation/loss"
    # A loss against an opponent says who is winning, not how good the images are.
    return "train/loss" if family.automatic_optimization else None


def _plugins(family: Family, precision: str, device: str) -> dict[str, Any]:
    plugin = weights_precision(precision, device)
    plugins: list[Any] = [checkpoints.AtomicCheckpointIO(), *_cluster()]
    if plugin is None:
        return {"plugins": plugins, "precision": precision}
    plugin.convert_module(family)  # before a checkpoint is read into it
    return {"plugins": [*plugins, plugin]}


def _is_halved(precision: str) -> bool:
    return precision in ("16-true", "bf16-true")


def _callbacks(
    data: DataModule, training: TrainingConfig, run: Path, seed: int, monitor: str | None,
    preemption: Preemption,
    accept_changes: bool, ledger: throughput.Ledger, *, halved: bool,
) -> list[Callback]:  # fmt: skip
    folder = run / "checkpoints"
    ema = RampedEMA(training.ema.decay, halved=halved) if training.ema else None
    held = data.rows("validation") or data.rows("train")
    number = min(training.num_sample_images, len(held))
    rows = [held[i * len(held) // number] for i in range(number)]  # of every class, if sorted
    guard = FiniteLossGuard(
        lambda rows: [str(path) for row in rows for path in data.manifest.rows[row].channels],
        lambda: _last_good(folder),
        training.log_every_n_steps,
    )
    callbacks: list[Callback] = [
        StepSeeds(seed),
        guard,
        LogMeans(),
        *([NewHyperparameters()] if accept_changes else []),
        LogLines(training.log_every_n_steps, ledger, quiet=is_terminal()),
        throughput.SlowestProcess(ledger),
        checkpoints.BestAndLast(folder, monitor, training.validate_every_n_epochs),
        SamplePictures(
            run / "samples",
            data.examples(rows),
            lambda: ema.model if ema else None,
            training.sample_every_n_epochs,
            seed,
            preemption,
        ),
        *([ema] if ema else []),
        Continuation(
            folder / checkpoints.LAST,
            preemption,
            accumulate=training.accumulate,
            every_n_minutes=training.checkpoint_every_n_minutes,
            check=guard.check,
            restored=ema.restore if ema else lambda *_: None,
        ),
    ]
    if training.max_minutes:
        callbacks.append(Timer(timedelta(minutes=training.max_minutes), interval="step"))
    if is_terminal():
        callbacks.append(TQDMProgressBar())
    return callbacks


def _last_good(folder: Path) -> str:
    last: Any = folder / checkpoints.LAST
    return str(last) if last.exists() else "none yet"
