"""One training: from a model and its data to checkpoints, metrics and pictures in a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.models.nets.norm import share_statistics
from synthcube.runtime import is_terminal, quiet_lightning
from synthcube.storage import make_folder, sweep
from synthcube.training import checkpoints, reports, throughput
from synthcube.training.best import require_metrics
from synthcube.training.callbacks import callbacks
from synthcube.training.checkpoint_io import AtomicCheckpointIO, load
from synthcube.training.compilation import compile_networks, explained
from synthcube.training.determinism import determinism
from synthcube.training.metrics import MetricsTable
from synthcube.training.pictures import SamplePictures
from synthcube.training.plan import Plan
from synthcube.training.precision import weights_precision
from synthcube.training.recomputation import recompute_blocks
from synthcube.training.start import Frozen, freeze
from synthcube.training.strategies import require_same, strategy


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
    ledger = throughput.Ledger(type(family).__name__, SamplePictures.__name__)
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
    trainer: pl.Trainer, table: MetricsTable, ledger: throughput.Ledger, plan: Plan
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
    opened = reports.opened(plan.training.loggers, plan.run, plan.settings, steps)
    trainer.loggers = [table, *opened]
    try:
        yield
    finally:
        taken = trainer.global_step - (steps or 0)
        throughput.report(
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
