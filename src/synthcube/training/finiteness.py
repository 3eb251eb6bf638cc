"""Losses and gradients of every step: their norms for the log, and the end where one is not finite.

On a GPU nothing waits for them: norms stay there until the next look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor

from synthcube.errors import NonFiniteLossError
from synthcube.schema import Batch
from synthcube.training.acceleration import plain_name
from synthcube.training.progress import optimizer_names
from synthcube.training.strategies import gather_objects

# A float16 scaler starts at 2 ** 16 and halves with each step that it skips: after as many,
# gradients that are still not finite are so without any scale.
_SKIPPED_IN_A_ROW = 20
_NAMED = 8


@dataclass(frozen=True, slots=True)
class _Step:
    """What one optimizer is about to take a step with."""

    number: int
    optimizer: int
    rows: list[torch.Tensor]
    losses: list[torch.Tensor]
    weights: list[str]
    norms: torch.Tensor  # (len(weights),), one for each gradient


class FiniteGuard(Callback):
    """Stops at a loss or a gradient that is not finite: names the step, the files, the weights.

    On a CPU it stops before the step is taken. On a GPU it looks every `interval` batches, before
    each validation, and before a checkpoint is written, so that none holds what such a step left.
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
        self._rows: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []
        self._steps: list[_Step] = []
        self._number = 0
        self._stepped = False
        self._skipped: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._latest: dict[int, torch.Tensor] = {}
        self._in_pieces = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._names = {id(each): plain_name(name) for name, each in module.named_parameters()}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, _: int) -> None:
        self._number = trainer.global_step + 1
        self._rows.append(batch["index"])

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: torch.Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        place = _place(trainer, optimizer)
        moved = [
            (self._names.get(id(weight), "?"), weight.grad)
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight.grad is not None
        ]
        # Some strategies keep gradients to themselves: then the losses are all there is to see.
        norms = torch.zeros(0, device=module.device)
        if moved:
            norms = torch.stack(torch._foreach_norm([_local(each) for _, each in moved]))
            self._in_pieces = any(isinstance(each, DTensor) for _, each in moved)
            self._latest[place] = norms
        names = [name for name, _ in moved]
        self._steps.append(_Step(self._number, place, [*self._rows], [*self._losses], names, norms))
        self._losses.clear()
        self._stepped = True
        if norms.device.type == "cpu":
            self.check(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, _: int
    ) -> None:
        if self._stepped:
            self._rows.clear()
            self._losses.clear()
            self._stepped = False
        done = trainer.fit_loop.total_batch_idx + 1
        if done % self.interval == 0:
            self.check(trainer)
            self._log_norms(trainer, module)

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.check(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        """Look at what came since the last look, in all processes together.

        Raises:
            NonFiniteLossError: a loss or a gradient is NaN or infinite.
        """
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        faults = [fault for step in steps for fault in self._faults(step, trainer)]
        if not trainer.strategy.reduce_boolean_decision(bool(faults), all=False):
            return
        found = gather_objects(
            (faults, [(each.number, self._files(each)) for each in steps]), trainer
        )
        if not trainer.is_global_zero:
            raise SystemExit(0)  # the first process says it for all
        number, is_gradient, what, files = min(fault for faults, _ in found for fault in faults)
        if is_gradient:  # processes have made it together, of a loss that was finite in each
            files = [file for _, all_files in found for at, each in all_files if at == number
                     for file in each]  # fmt: skip
        raise NonFiniteLossError(
            f"{what} at step {number}. Last good checkpoint: {self.last_good()}. "
            "Try a lower model.optimizer.lr, compute.precision 32, or look at the batch:",
            dict.fromkeys(files),
        )

    def _files(self, step: _Step) -> list[str]:
        return self.files([row for each in step.rows for row in each.tolist()])

    def _faults(self, step: _Step, trainer: pl.Trainer) -> list[tuple[int, bool, str, list[str]]]:
        """(step, whether it is a gradient, what is wrong, files) of what is not finite."""
        losses = [loss.float().reshape(1) for loss in step.losses]
        if bool(torch.isfinite(torch.cat([step.norms.float(), *losses])).all()):
            self._skipped[step.optimizer] = 0
            return []
        wrong = [float(each) for each in step.losses if not math.isfinite(float(each))]
        if wrong:
            return [(step.number, False, f"The loss became {wrong[0]}", self._files(step))]
        self._skipped[step.optimizer] = self._skipped.get(step.optimizer, 0) + 1
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and self._skipped[step.optimizer] < _SKIPPED_IN_A_ROW:
            return []
        finite = torch.isfinite(step.norms).tolist()
        names = [
            name for name, is_finite in zip(step.weights, finite, strict=True) if not is_finite
        ]
        return [(step.number, True, _described(names, len(step.weights)), self._files(step))]

    def _log_norms(self, trainer: pl.Trainer, module: Any) -> None:
        """Norms before clipping, of the latest step of each optimizer."""
        names = optimizer_names(trainer, module)
        values = {}
        for place, norms in sorted(self._latest.items()):
            squared = norms.double().square().sum()
            if self._in_pieces:
                torch.distributed.all_reduce(squared)
            name = f"/{names[place]}" if len(names) > 1 else ""
            values[f"gradient_norm{name}"] = float(squared.sqrt())
        if values:
            for logger in trainer.loggers:
                logger.log_metrics(values | {"epoch": trainer.current_epoch}, trainer.global_step)


def _place(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> int:
    inner = [getattr(each, "optimizer", each) for each in trainer.optimizers]
    wanted = getattr(optimizer, "optimizer", optimizer)
    return next((i for i, each in enumerate(inner) if each is wanted), 0)


def _local(gradient: torch.Tensor) -> torch.Tensor:
    """The piece of this process, where weights are cut into pieces."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _described(names: list[str], number: int) -> str:
    if len(names) == number:
        return f"The gradients of all {number} weights became NaN or infinite"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    shown = ", ".join(names[:_NAMED])
    return f"The gradient became NaN or infinite in {shown}{more} (of {number} weights)"
