"""Optimizers and learning-rate schedules by name, with their arguments checked at start."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from synthcube.schema import Schema

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

# These need a closure, sparse gradients, functions or other schedulers: nothing a YAML can say.
_UNUSABLE = {
    "Optimizer", "LBFGS", "SparseAdam", "Muon", "LRScheduler", "LambdaLR", "MultiplicativeLR",
    "SequentialLR", "ChainedScheduler",
}  # fmt: skip
# Schedules of diffusers.optimization: stepped every batch, after a linear warm-up.
_WARMED = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
_STEPPED = ("OneCycleLR", "CyclicLR")
_LENGTHS = ("total_steps", "T_max", "total_iters")


class OptimizerConfig(Schema):
    """An optimizer of torch.optim; every further key is one of its arguments."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(default="AdamW", description="Class name in torch.optim.")
    lr: float = Field(default=5e-4, gt=0, description="Learning rate.")

    @model_validator(mode="after")
    def _known(self) -> Self:
        import torch

        known = _classes(torch.optim, torch.optim.Optimizer)
        _check_name(self.name, known, "optimizer")
        _check_arguments(known[self.name], self.model_extra or {}, taken=("params", "lr"))
        return self

    def build(self, parameters: Iterable[Parameter]) -> Optimizer:
        """The optimizer over `parameters`."""
        import torch

        kind = getattr(torch.optim, self.name)
        optimizer: Optimizer = kind(parameters, lr=self.lr, **(self.model_extra or {}))
        return optimizer


class SchedulerConfig(Schema):
    """A learning-rate schedule; every further key is one of its arguments.

    ``constant``, ``constant_with_warmup``, ``linear``, ``cosine`` and ``polynomial`` are those of
    diffusers.optimization; every other name is a class of torch.optim.lr_scheduler, whose length
    (``T_max``, ``total_steps``, ``total_iters``) is that of the training unless given.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(default="cosine", description="Name of the schedule.")
    warmup_steps: int = Field(
        default=100, ge=0, description="Steps of linear warm-up, at most a tenth of the training."
    )
    interval: Literal["auto", "step", "epoch"] = Field(
        default="auto", description="When a torch schedule steps; auto is what its paper does."
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = _schedulers()
        _check_name(self.name, [*_WARMED, *known], "schedule")
        extra = self.model_extra or {}
        if self.name in _WARMED:
            if extra:
                raise ValueError(f"{self.name} takes warmup_steps only, not {_listed(extra)}")
        else:
            _check_arguments(known[self.name], extra, taken=("optimizer", "last_epoch"))
        return self

    def build(self, optimizer: Optimizer, num_steps: int, num_epochs: int) -> dict[str, Any]:
        """Lightning's description of the schedule for a training of that length."""
        if self.name in _WARMED:
            from diffusers.optimization import get_scheduler

            warmup = min(self.warmup_steps, num_steps // 10)
            schedule: LRScheduler = get_scheduler(
                self.name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps
            )
            return {"scheduler": schedule, "interval": "step"}
        by_step = self.interval == "step" or (self.interval == "auto" and self.name in _STEPPED)
        kind = _schedulers()[self.name]
        arguments = dict(self.model_extra or {})
        for name in _LENGTHS:
            if name in inspect.signature(kind).parameters:
                arguments.setdefault(name, num_steps if by_step else num_epochs)
        interval = "step" if by_step else "epoch"
        return {
            "scheduler": kind(optimizer, **arguments),
            "interval": interval,
            "monitor": "validation/loss",
        }


def _schedulers() -> dict[str, Any]:
    from torch.optim import lr_scheduler

    known = _classes(lr_scheduler, lr_scheduler.LRScheduler)
    return known | {"ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau}


def _classes(module: Any, base: type) -> dict[str, Any]:
    found = {
        name: item
        for name, item in vars(module).items()
        if isinstance(item, type) and issubclass(item, base)
    }
    return {name: found[name] for name in sorted(found) if name not in _UNUSABLE and name[0] != "_"}


def _check_name(name: str, known: Iterable[str], what: str) -> None:
    known = list(known)
    if name in known:
        return
    folded = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    hint = f"; did you mean {folded[near[0]]}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} Known: {', '.join(known)}")


def _check_arguments(kind: Any, given: dict[str, Any], taken: tuple[str, ...]) -> None:
    allowed = [name for name in inspect.signature(kind).parameters if name not in taken]
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise ValueError(
            f"{kind.__name__} takes no argument {_listed(unknown)}; it takes {', '.join(allowed)}"
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
