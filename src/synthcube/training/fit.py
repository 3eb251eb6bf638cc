"""The training loop: a model and its data become checkpoints, metrics and sample pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from synthcube import terminal
from synthcube.compute import ComputeConfig, devices_used
from synthcube.data.batches import evenly_spaced
from synthcube.data.module import DataModule
from synthcube.environment import derived_seed, quiet_lightning
from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.models.nets.norm import share_statistics
from synthcube.storage import make_folder, sweep
from synthcube.training import acceleration, checkpoints, curve, loggers, metrics, progress
from synthcube.training.accountant import Budget, noise_warning
from synthcube.training.config import COPIES, TrainingConfig
from synthcube.training.copies import CopyWatch
from synthcube.training.ema import KeepEarlier, RampedEMA
from synthcube.training.fine_tuning import FreezeCallback, freeze
from synthcube.training.finiteness import FiniteGuard
from synthcube.training.leaks import require_private
from synthcube.training.pictures import SamplePictures
from synthcube.training.preemption import Preemption
from synthcube.training.privacy import BudgetRecord, PrivateSteps, require_differentiable, trained
from synthcube.training.proximal import ProximalTerm
from synthcube.training.strategies import require_same, strategy
from synthcube.training.time_limit import NoiseWarning, TimeLimit

log = logging.getLogger("synthcube")


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Everything that one training needs besides the model.

    Args:
        folder: run folder; all output is written to it.
        precision: Lightning's full name, such as "32-true".
        checkpoint: checkpoint to resume from, if any.
        accept_changes: let a resumed optimizer use the hyperparameters of the config.
        settings: the resolved config, which loggers show as hyperparameters.
        budget: what a private training may spend; None: it is not private.
        until_epoch: stop after so many epochs although `training.max_epochs` is more; None: train
            to the end. Schedules follow `max_epochs`.
        proximal: holds the weights near those that a round of a federation began with.
    """

    data: DataModule
    training: TrainingConfig
    compute: ComputeConfig
    folder: Path
    seed: int
    precision: str
    device: torch.device
    checkpoint: Path | None = None
    preemption: Preemption = field(default_factory=lambda: Preemption(()))
    accept_changes: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    until_epoch: int | None = None
    proximal: ProximalTerm | None = None
    budget: Budget | None = None

    @property
    def num_devices(self) -> int:
        """Number of devices of each node; each has one process."""
        return devices_used(self.compute, self.device)

    @property
    def validates(self) -> bool:
        # A loss would tell of the images that it was computed on.
        return not self.budget and bool(self.data.rows("validation"))

    @property
    def example_rows(self) -> list[int]:
        """Rows of images to try the model on: of the validation, where there is one."""
        return self.data.rows("validation") or self.data.rows("train")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def is_part(self) -> bool:
        """Whether it ends before the last epoch of the training, as a round of a federation."""
        return (self.until_epoch or self.training.max_epochs) < self.training.max_epochs


def fit(family: Family, run: TrainingRun) -> dict[str, float]:
    """Train `family` and return the last value of every metric.

    Writes `checkpoints/`, `samples/`, `metrics.csv`, `throughput.json` and, with loggers, `logs/`
    under `run.folder`, and `curve.png` from time to time.

    Raises NonFiniteLossError, or PreemptedError once a checkpoint is saved after a signal.
    """
    table = metrics.MetricsTable(run.folder / "metrics.csv")
    profiler = progress.TimeProfiler(type(family).__name__, SamplePictures.__name__)
    if run.checkpoint:
        run.data.position = checkpoints.position(run.checkpoint)
        content = checkpoints.load(run.checkpoint, mapped=True)
        require_same(content, run.compute, run.num_devices * run.compute.num_nodes)
    frozen = _prepare(family, run)
    bar = terminal.Progress("Training", unit="step", has_lines=False)  # LogLines has its own
    compute = run.compute
    deterministic = acceleration.determinism(compute.deterministic)
    with quiet_lightning(), deterministic, acceleration.compile_errors(compute):
        trainer = _trainer(
            **_hardware(family, run),
            **_schedule(family, run),
            callbacks=[
                *callbacks(family, run, profiler, bar),
                FreezeCallback(frozen),
                curve.LossCurve(table),
            ],
            profiler=profiler,
            logger=table,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run.folder,
        )
        with _reported(trainer, table, profiler, run), run.preemption.deferred(), bar:
            trainer.fit(family, datamodule=run.data, ckpt_path=run.checkpoint, weights_only=True)
    run.preemption.stop_if_heard()  # a signal after the last step
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class StepSeeds(Callback):
    """Seeds torch before every step from the run's seed and the step: a resumed run repeats it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._draw(trainer, "step", trainer.fit_loop.total_batch_idx)

    def on_validation_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # The same random numbers at every validation make its loss comparable between epochs.
        self._draw(trainer, "validation")

    def _draw(self, trainer: pl.Trainer, *parts: str | int) -> None:
        # Processes that share a batch draw different noise.
        rank = [trainer.global_rank] if trainer.global_rank else []
        torch.manual_seed(derived_seed(self.seed, *parts, *rank))


class StopAfterEpoch(Callback):
    """Ends a training after so many epochs in all, with a checkpoint."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True  # before the callback that saves


def callbacks(
    family: Family, run: TrainingRun, profiler: progress.TimeProfiler, bar: terminal.Progress
) -> list[Callback]:
    """The callbacks of a training; Lightning moves those that save checkpoints to the end."""
    training, ema, time_limit = run.training, None, None
    if training.max_minutes:
        time_limit = TimeLimit(training.max_minutes, bar)
        family.time_share = partial(getattr, time_limit, "share")
    if training.ema:
        ema = RampedEMA(training.ema.decay, halved=run.precision in acceleration.HALF_PRECISIONS)
    optional: list[Callback | None] = [
        StepSeeds(run.seed),
        _guard(run),
        CopyWatch(run.data, training.early_stop.num_images, run.seed)
        if training.early_stop and training.early_stop.metric == COPIES
        else None,
        metrics.LogMeans(),
        checkpoints.NewHyperparameters() if run.accept_changes else None,
        progress.LogLines(
            training.log_every_n_steps, profiler, bar, tells_of_images=not run.budget
        ),
        progress.SlowestProcess(profiler),
        metrics.MetricGuard(training),
        metrics.best_and_last(run.checkpoints, _monitor(family, run), training),
        None
        if run.budget
        else SamplePictures(
            run.folder / "samples",
            run.data.examples(evenly_spaced(run.example_rows, training.num_sample_images)),
            run.data.image,
            lambda: ema.model if ema else None,
            training.sample_every_n_epochs,
            run.seed,
            run.preemption,
        ),
        ema,
        KeepEarlier(share, ema) if (share := family.config.earlier_share()) else None,
        checkpoints.MidEpochCheckpoint(
            run.checkpoints / checkpoints.LAST,
            run.preemption,
            accumulate=training.accumulate,
            every_n_minutes=training.checkpoint_every_n_minutes,
            restore_weights=ema.restore if ema else lambda *_: None,
        ),
        metrics.EarlyStop(training.early_stop, training.validate_every_n_epochs)
        if training.early_stop
        else None,
        time_limit,
        StopAfterEpoch(run.until_epoch) if run.until_epoch else None,
        run.proximal,
        NoiseWarning(silent=run.is_part) if family.predicts_noise and not run.budget else None,
        BudgetRecord() if run.budget else None,
    ]
    return [callback for callback in optional if callback]


def _guard(run: TrainingRun) -> FiniteGuard:
    def files(rows: Sequence[int]) -> list[str]:
        if run.budget:
            return []  # who was drawn for a step is private
        return [str(path) for row in rows for path in run.data.manifest.rows[row].channels]

    def last_good() -> str:
        last = run.checkpoints / checkpoints.LAST
        return str(last) if last.exists() else "none yet"

    return FiniteGuard(files, last_good, run.training.log_every_n_steps)


def _monitor(family: Family, run: TrainingRun) -> str | None:
    """Name of the loss that chooses the best checkpoint; None for a GAN without validation, and
    with privacy."""
    if run.budget:
        return None
    if run.validates:
        return "validation/loss"
    # An adversarial loss shows which network is ahead, not how good the images are.
    return "train/loss" if family.automatic_optimization else None


def _prepare(family: Family, run: TrainingRun) -> list[Any]:
    """Freeze, wrap and compile networks as configured; returns the completely frozen modules."""
    training, compute = run.training, run.compute
    if not family.automatic_optimization:
        family.accumulate = training.accumulate
        family.gradient_clip_norm = training.clip_norm(by_hand=True)
    share_statistics(family)
    batch = move_data_to_device(run.data.examples(run.example_rows[:2]), run.device)
    metrics.require_metrics(family, batch, training, validates=run.validates)
    frozen = freeze(family, training)
    if training.privacy and run.budget:
        if warning := noise_warning(run.budget, sum(w.numel() for w in trained(family).values())):
            log.warning("privacy: %s.", warning)
        require_private(family.train())
        require_differentiable(family, batch, training.privacy)
    if compute.activation_checkpointing:
        acceleration.recompute_blocks(family)
    acceleration.compile_networks(family, batch, compute)
    return frozen


def _hardware(family: Family, run: TrainingRun) -> dict[str, Any]:
    """The trainer's arguments for devices, strategy and precision."""
    plugins: list[Any] = [checkpoints.AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # the job script requeues
    precision: dict[str, Any] = {"precision": run.precision}
    if plugin := acceleration.weights_precision(run.precision, run.device.type):
        plugin.convert_module(family)  # before a checkpoint is read into it
        plugins, precision = [*plugins, plugin], {}
    return {
        "accelerator": "gpu" if run.device.type == "cuda" else "cpu",
        "devices": run.num_devices,
        "num_nodes": run.compute.num_nodes,
        "strategy": _strategy(family, run),
        "deterministic": run.compute.deterministic,
        "plugins": plugins,
        **precision,
    }  # fmt: skip


def _strategy(family: Family, run: TrainingRun) -> Strategy | str:
    if run.budget and run.training.privacy:
        device = torch.device("cuda", 0) if run.device.type == "cuda" else run.device
        return PrivateSteps(device, run.training.privacy, run.budget)
    return strategy(
        run.compute, run.training, run.num_devices,
        by_hand=not family.automatic_optimization, mixed=run.precision == "bf16-mixed",
    )  # fmt: skip


def _schedule(family: Family, run: TrainingRun) -> dict[str, Any]:
    """The trainer's arguments for epochs, accumulation, clipping and intervals."""
    training, by_hand = run.training, not family.automatic_optimization
    return {
        "max_epochs": training.max_epochs,
        "accumulate_grad_batches": 1 if by_hand else training.accumulate,
        "gradient_clip_val": None if by_hand else training.clip_norm(by_hand=False),
        "check_val_every_n_epoch": training.validate_every_n_epochs,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1.0 if run.validates else 0,
        "log_every_n_steps": training.log_every_n_steps,
    }


@contextmanager
def _reported(
    trainer: pl.Trainer,
    table: metrics.MetricsTable,
    profiler: progress.TimeProfiler,
    run: TrainingRun,
) -> Iterator[None]:
    """Open the loggers; at the end, also after an error, write the time report and close them."""
    if not trainer.is_global_zero:
        yield
        return
    make_folder(run.folder)
    sweep(run.checkpoints)
    resumed = run.checkpoint
    steps = checkpoints.reached(resumed)[1] if resumed else None
    table.drop_after(steps or 0, within_epoch=bool(resumed and checkpoints.position(resumed)[1]))
    opened = loggers.opened(run.training.loggers, run.folder, run.settings, steps)
    trainer.loggers = [table, *opened]
    try:
        yield
    finally:
        taken = trainer.global_step - (steps or 0)
        progress.report(
            profiler, taken, run.data, run.training, run.folder, resumed=steps is not None
        )
        for logger in opened:
            logger.close()


def _trainer(**settings: Any) -> pl.Trainer:
    try:
        trainer = pl.Trainer(**settings)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"compute: {error}") from error
    # Lightning would replace our SIGTERM handler, and communicate between processes in it.
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    # Lightning takes the rank from Slurm, even where each task of a job is a separate training.
    vars(rank_zero_only)["rank"] = trainer.global_rank
    return trainer
