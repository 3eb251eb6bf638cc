"""What happens around the steps of a training, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from lightning.pytorch.callbacks import Callback, Timer, TQDMProgressBar

from synthcube.models.family import Family
from synthcube.runtime import is_terminal
from synthcube.training import checkpoints
from synthcube.training.averaging import RampedEMA
from synthcube.training.best import MetricGuard, best_and_last
from synthcube.training.continuation import Continuation, NewHyperparameters
from synthcube.training.early_stop import EarlyStop
from synthcube.training.finiteness import FiniteGuard
from synthcube.training.means import LogMeans
from synthcube.training.pictures import SamplePictures
from synthcube.training.plan import Plan
from synthcube.training.precision import is_halved
from synthcube.training.progress import LogLines
from synthcube.training.seeds import StepSeeds
from synthcube.training.throughput import Ledger, SlowestProcess


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
