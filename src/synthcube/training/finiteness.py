"""Gradient norms for the log, and the end of a training whose loss or gradient is not finite."""

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
from synthcube.training.loggers import log_row
from synthcube.training.progress import optimizer_names
from synthcube.training.strategies import gather_objects, local

# A float16 scaler starts at 2 ** 16 and halves after every skipped step: gradients that are
# still not finite after this many are so without scaling.
_SKIPPED_IN_A_ROW = 20
_NAMED = 8


@dataclass(frozen=True, slots=True)
class _Step:
    """Input of one optimizer step."""

    number: int
    optimizer: int
    rows: list[torch.Tensor]
    losses: list[torch.Tensor]
    weights: list[str]
    norms: torch.Tensor  # (len(weights),), one for each gradient


class FiniteGuard(Callback):
    """Stops at a loss or gradient that is not finite, and names the step, files and weights.

    On a CPU it checks before every step. On a GPU the norms stay on the device until the check,
    every `interval` batches, before a validation, and before a checkpoint is written: no
    checkpoint contains the result of such a step.
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
        self._is_sharded = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._names = {id(weight): plain_name(name) for name, weight in module.named_parameters()}

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, _: int) -> None:
        self._number = trainer.global_step + 1
        self._rows.append(batch["index"])

    def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: torch.Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        position = _position(trainer, optimizer)
        gradients = [
            (self._names.get(id(weight), "?"), weight.grad)
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight.grad is not None
        ]
        # Some strategies hide gradients: then only losses are checked.
        norms = torch.zeros(0, device=module.device)
        if gradients:
            norms = torch.stack(torch._foreach_norm(local([gradient for _, gradient in gradients])))
            self._is_sharded = any(isinstance(gradient, DTensor) for _, gradient in gradients)
            self._latest[position] = norms
        names = [name for name, _ in gradients]
        self._steps.append(
            _Step(self._number, position, [*self._rows], [*self._losses], names, norms)
        )
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
        """Check all steps since the last check, in all processes together."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        faults = [fault for step in steps for fault in self._faults(step, trainer)]
        if not trainer.strategy.reduce_boolean_decision(bool(faults), all=False):
            return
        files_by_step = [(step.number, self._files(step)) for step in steps]
        gathered = gather_objects((faults, files_by_step), trainer)
        if not trainer.is_global_zero:
            raise SystemExit(0)  # the first process prints the error
        number, is_gradient, what, files = min(fault for faults, _ in gathered for fault in faults)
        if is_gradient:  # summed over processes whose losses were all finite
            files = [file for _, by_step in gathered for at, step_files in by_step if at == number
                     for file in step_files]  # fmt: skip
        raise NonFiniteLossError(
            f"{what} at step {number}. Last good checkpoint: {self.last_good()}. "
            "Try a lower model.optimizer.lr, compute.precision 32, or look at the batch:",
            dict.fromkeys(files),
        )

    def _files(self, step: _Step) -> list[str]:
        return self.files([row for batch in step.rows for row in batch.tolist()])

    def _faults(self, step: _Step, trainer: pl.Trainer) -> list[tuple[int, bool, str, list[str]]]:
        """(step, whether it is a gradient, what is wrong, files) for values that are not finite."""
        losses = [loss.float().reshape(1) for loss in step.losses]
        if bool(torch.isfinite(torch.cat([step.norms.float(), *losses])).all()):
            self._skipped[step.optimizer] = 0
            return []
        wrong = [value for value in map(float, step.losses) if not math.isfinite(value)]
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
        """Log the gradient norm before clipping of each optimizer's latest step."""
        names = optimizer_names(trainer, module)
        values = {}
        for position, norms in sorted(self._latest.items()):
            squared = norms.double().square().sum()
            if self._is_sharded:
                torch.distributed.all_reduce(squared)
            name = f"/{names[position]}" if len(names) > 1 else ""
            values[f"gradient_norm{name}"] = float(squared.sqrt())
        if values:
            log_row(trainer, values)


def _position(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> int:
    """Index of an optimizer, which a strategy may have wrapped."""
    inner = [getattr(wrapped, "optimizer", wrapped) for wrapped in trainer.optimizers]
    unwrapped = getattr(optimizer, "optimizer", optimizer)
    return next((i for i, other in enumerate(inner) if other is unwrapped), 0)


def _described(names: list[str], number: int) -> str:
    if len(names) == number:
        return f"The gradients of all {number} weights became NaN or infinite"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    shown = ", ".join(names[:_NAMED])
    return f"The gradient became NaN or infinite in {shown}{more} (of {number} weights)"
