"""One training: from a model and its data to checkpoints, metrics and pictures in a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_only

from synthcube.compute import ComputeConfig, devices_used
from synthcube.data.module import DataModule
from synthcube.environment import derived_seed, is_terminal, quiet_lightning
from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.models.nets.norm import share_statistics
from synthcube.storage import make_folder, sweep
from synthcube.training import checkpoints, loggers, progress
from synthcube.training.acceleration import (
    compile_networks,
    determinism,
    explained,
    is_halved,
    recompute_blocks,
    weights_precision,
)
from synthcube.training.checkpoints import (
    AtomicCheckpointIO,
    Continuation,
    NewHyperparameters,
    load,
)
from synthcube.training.config import TrainingConfig
from synthcube.training.ema import RampedEMA
from synthcube.training.fine_tuning import Frozen, freeze
from synthcube.training.finiteness import FiniteGuard
from synthcube.training.metrics import (
    EarlyStop,
    LogMeans,
    MetricGuard,
    MetricsTable,
    best_and_last,
    require_metrics,
)
from synthcube.training.pictures import SamplePictures
from synthcube.training.preemption import Preemption
from synthcube.training.progress import Ledger, LogLines, SlowestProcess
from synthcube.training.strategies import require_same, strategy


@dataclass(frozen=True, slots=True)
class Plan:
    """One training, or the rest of one.

    Args:
        run: folder that everything is written to.
        precision: Lightning's full name of it.
        checkpoint: to go on from, if any.
        accept_changes: optimizers of a continued run take the hyperparameters of the config.
        settings: the resolved config, for loggers that show it.
    """

    data: DataModule
    training: TrainingConfig
    compute: ComputeConfig
    run: Path
    seed: int
    precision: str
    device: torch.device
    checkpoint: Path | None = None
    preemption: Preemption = field(default_factory=lambda: Preemption(()))
    accept_changes: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_devices(self) -> int:
        """Devices of each node, with a process for each."""
        return devices_used(self.compute, self.device)

    @property
    def num_processes(self) -> int:
        return self.num_devices * self.compute.num_nodes

    @property
    def validates(self) -> bool:
        return bool(self.data.rows("validation"))

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.run / "checkpoints"


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


def callbacks(family: Family, plan: Plan, ledger: Ledger) -> list[Callback]:
    """All of them; Lightning calls those that save last, whatever the order."""
    training = plan.training
    ema = RampedEMA(training.ema.decay, halved=is_halved(plan.precision)) if training.ema else None
    guard = _guard(plan)
    found: list[Callback | None] = [
        StepSeeds(plan.seed),
        guard,
        LogMeans(),
        NewHyperparameters() if plan.accept_changes else None,
        LogLines(training.log_every_n_steps, ledger, quiet=is_terminal()),
        SlowestProcess(ledger),
        MetricGuard(training),
        best_and_last(plan.checkpoints, _monitor(family, plan), training),
        SamplePictures(
            plan.run / "samples",
            plan.data.examples(_pictured(plan)),
            lambda: ema.model if ema else None,
            training.sample_every_n_epochs,
            plan.seed,
            plan.preemption,
        ),
        ema,
        Continuation(
            plan.checkpoints / checkpoints.LAST,
            plan.preemption,
            accumulate=training.accumulate,
            every_n_minutes=training.checkpoint_every_n_minutes,
            restored=ema.restore if ema else lambda *_: None,
        ),
        EarlyStop(training.early_stop, training.validate_every_n_epochs)
        if training.early_stop
        else None,
        Timer(timedelta(minutes=training.max_minutes), interval="step")
        if training.max_minutes
        else None,
        TQDMProgressBar() if is_terminal() else None,
    ]
    return [each for each in found if each]


def _guard(plan: Plan) -> FiniteGuard:
    def files(rows: Sequence[int]) -> list[str]:
        return [str(path) for row in rows for path in plan.data.manifest.rows[row].channels]

    def last_good() -> str:
        last = plan.checkpoints / checkpoints.LAST
        return str(last) if last.exists() else "none yet"

    return FiniteGuard(files, last_good, plan.training.log_every_n_steps)


def _monitor(family: Family, plan: Plan) -> str | None:
    """The loss whose lowest point is the best model; None where there is no such loss."""
    if plan.validates:
        return "validation/loss"
    # A loss against an opponent says who is winning, not how good the images are.
    return "train/loss" if family.automatic_optimization else None


def _pictured(plan: Plan) -> list[int]:
    """Rows whose conditions are followed in pictures: of every class, if these are in a row."""
    held = plan.data.rows("validation") or plan.data.rows("train")
    number = min(plan.training.num_sample_images, len(held))
    return [held[i * len(held) // number] for i in range(number)]


def fit(family: Family, plan: Plan) -> dict[str, float]:
    """Train `family` as planned; returns the last metrics.

    Writes `checkpoints/`, `samples/`, `metrics.csv`, `throughput.json` and, where loggers are asked
    for, `logs/` under `plan.run`.

    Raises:
        ConfigError: a metric, a frozen weight or something of `compute` is not to be had.
        NonFiniteLossError: a loss or a gradient became NaN or infinite.
        PreemptedError: a signal came, and a checkpoint was saved.
        OutputError: the run folder cannot be written.
    """
    table = MetricsTable(plan.run / "metrics.csv")
    ledger = progress.Ledger(type(family).__name__, SamplePictures.__name__)
    if plan.checkpoint:
        plan.data.position = checkpoints.position(plan.checkpoint)
        require_same(load(plan.checkpoint, mapped=True), plan.compute, plan.num_processes)
    frozen = _ready(family, plan)
    compute = plan.compute
    with quiet_lightning(), determinism(compute.deterministic), explained(compute):
        trainer = _trainer(
            **_places(family, plan),
            **_lengths(family, plan),
            callbacks=[*callbacks(family, plan, ledger), *([Frozen(frozen)] if frozen else [])],
            profiler=ledger,
            logger=table,
            enable_progress_bar=is_terminal(),
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=plan.run,
        )
        with _reported(trainer, table, ledger, plan), plan.preemption.patient():
            trainer.fit(family, datamodule=plan.data, ckpt_path=plan.checkpoint, weights_only=True)
    plan.preemption.stop_if_heard()  # after the last step, when nobody asked any more
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _ready(family: Family, plan: Plan) -> list[Any]:
    """Freeze, wrap and compile what the config says; returns the modules that are frozen whole."""
    training, compute = plan.training, plan.compute
    if not family.automatic_optimization:
        family.accumulate = training.accumulate
        family.gradient_clip_norm = training.clip_norm(by_hand=True)
    share_statistics(family)
    rows = plan.data.rows("validation") or plan.data.rows("train")
    trial = move_data_to_device(plan.data.examples(rows[:2]), plan.device)
    require_metrics(family, trial, training, validates=plan.validates)
    frozen = freeze(family, training)
    if compute.activation_checkpointing:
        recompute_blocks(family)
    compile_networks(family, trial, compute)
    return frozen


def _places(family: Family, plan: Plan) -> dict[str, Any]:
    """Where and in which numbers the trainer computes."""
    by_hand = not family.automatic_optimization
    plugins: list[Any] = [AtomicCheckpointIO(), *_cluster()]
    precision: dict[str, Any] = {"precision": plan.precision}
    if own := weights_precision(plan.precision, plan.device.type):
        own.convert_module(family)  # before a checkpoint is read into it
        plugins, precision = [*plugins, own], {}
    return {
        "accelerator": "gpu" if plan.device.type == "cuda" else "cpu",
        "devices": plan.num_devices,
        "num_nodes": plan.compute.num_nodes,
        "strategy": strategy(
            plan.compute, plan.training, plan.num_devices,
            by_hand=by_hand, mixed=plan.precision == "bf16-mixed",
        ),
        "deterministic": plan.compute.deterministic,
        "plugins": plugins,
        **precision,
    }  # fmt: skip


def _lengths(family: Family, plan: Plan) -> dict[str, Any]:
    """How much the trainer does, and how often."""
    training, by_hand = plan.training, not family.automatic_optimization
    return {
        "max_epochs": training.max_epochs,
        "accumulate_grad_batches": 1 if by_hand else training.accumulate,
        "gradient_clip_val": None if by_hand else training.clip_norm(by_hand=False),
        "check_val_every_n_epoch": training.validate_every_n_epochs,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1.0 if plan.validates else 0,
        "log_every_n_steps": training.log_every_n_steps,
    }


@contextmanager
def _reported(
    trainer: pl.Trainer, table: MetricsTable, ledger: progress.Ledger, plan: Plan
) -> Iterator[None]:
    """Report to every logger, on from the checkpoint, and where the time went, however it ends."""
    if not trainer.is_global_zero:
        yield
        return
    make_folder(plan.run)
    sweep(plan.checkpoints)
    start = plan.checkpoint
    steps = checkpoints.reached(start)[1] if start else None
    table.drop_after(steps or 0, within_epoch=bool(start and checkpoints.is_within_epoch(start)))
    opened = loggers.opened(plan.training.loggers, plan.run, plan.settings, steps)
    trainer.loggers = [table, *opened]
    try:
        yield
    finally:
        taken = trainer.global_step - (steps or 0)
        progress.report(
            ledger, taken, plan.data, plan.training, plan.run, resumed=steps is not None
        )
        for each in opened:
            each.close()


def _trainer(**settings: Any) -> pl.Trainer:
    try:
        trainer = pl.Trainer(**settings)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"compute: {error}") from error
    # It would take SIGTERM, also from us, and talk to other processes from within the signal.
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    # Lightning takes it from Slurm, also where a task of a job is a training of its own.
    vars(rank_zero_only)["rank"] = trainer.global_rank
    return trainer


def _cluster() -> list[SLURMEnvironment]:
    """Slurm's part in the start of processes; jobs are put back into the queue by their script."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
