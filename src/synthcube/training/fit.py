"""One training: from a model and its data to checkpoints, metrics and pictures in a run folder."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only

from synthcube.compute import ComputeConfig, devices_used, strategy
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError
from synthcube.family import Family
from synthcube.runtime import is_terminal, quiet_lightning
from synthcube.training import checkpoints
from synthcube.training.averaging import RampedEMA
from synthcube.training.callbacks import (
    FiniteLossGuard,
    LogLines,
    SamplePictures,
    StepSeeds,
)
from synthcube.training.config import TrainingConfig
from synthcube.training.continuation import Continuation, NewHyperparameters
from synthcube.training.means import LogMeans
from synthcube.training.metrics import MetricsTable
from synthcube.training.preemption import Preemption

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
) -> dict[str, float]:
    """Train `family`, from `checkpoint` where one is given; returns the last metrics.

    Args:
        accept_changes: optimizers of a continued run take the hyperparameters of the config.

    Writes `checkpoints/`, `samples/` and `metrics.csv` under `run`.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite.
        PreemptedError: a signal came, and a checkpoint was saved.
        OutputError: the run folder cannot be written.
    """
    table = MetricsTable(run / "metrics.csv")
    if checkpoint:
        data.position = checkpoints.position(checkpoint)
    num_devices = devices_used(compute, device)
    by_hand = not family.automatic_optimization
    if by_hand:
        family.accumulate = training.accumulate
        family.gradient_clip_norm = training.clip_norm(by_hand=True)
    with quiet_lightning():
        trainer = _trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=num_devices,
            num_nodes=compute.num_nodes,
            strategy=strategy(compute, num_devices, unused_parameters=by_hand),
            precision=precision,
            max_epochs=training.max_epochs,
            accumulate_grad_batches=1 if by_hand else training.accumulate,
            gradient_clip_val=None if by_hand else training.clip_norm(by_hand=False),
            check_val_every_n_epoch=training.validate_every_n_epochs,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if data.rows("validation") else 0,
            log_every_n_steps=training.log_every_n_steps,
            callbacks=_callbacks(
                data, training, run, seed, _monitor(data, family), preemption, accept_changes
            ),
            plugins=[checkpoints.AtomicCheckpointIO(), *_cluster()],
            logger=table,
            enable_progress_bar=is_terminal(),
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run,
        )
        if trainer.is_global_zero:
            checkpoints.remove_unfinished(run / "checkpoints")
            if checkpoint:
                table.drop_after(
                    checkpoints.reached(checkpoint)[1],
                    within_epoch=checkpoints.is_within_epoch(checkpoint),
                )
        with preemption.patient():
            trainer.fit(family, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


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


def _callbacks(
    data: DataModule, training: TrainingConfig, run: Path, seed: int, monitor: str | None,
    preemption: Preemption,
    accept_changes: bool,
) -> list[Callback]:  # fmt: skip
    folder = run / "checkpoints"
    ema = RampedEMA(training.ema.decay) if training.ema else None
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
        LogLines(training.log_every_n_steps, quiet=is_terminal()),
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
