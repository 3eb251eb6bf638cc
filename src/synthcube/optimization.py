"""Optimizers and learning-rate schedules by name, with their arguments checked at start."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, model_validator
from typing_extensions import Self

from synthcube import names
from synthcube.errors import ConfigError
from synthcube.runtime import import_monai
from synthcube.schema import MAX_COUNT, Schema

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

# Classes of torch.optim and torch.optim.lr_scheduler that were looked at one by one.
_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
)  # fmt: skip
_SCHEDULES = (
    "ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR",
    "LinearLR", "MultiStepLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "StepLR",
)  # fmt: skip
UNUSABLE_OPTIMIZERS = {
    "LBFGS": "it takes the loss several times a step, and the noise is another each time",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it takes matrices only, and a network has other weights too",
}
UNUSABLE_SCHEDULES = {
    "LambdaLR": "it takes a function",
    "MultiplicativeLR": "it takes a function",
    "SequentialLR": "it takes other schedules",
    "ChainedScheduler": "it takes other schedules",
}
# Schedules of diffusers.optimization: stepped every batch, after a linear warm-up.
_WARMED = {
    "constant": "constant",
    "constant_with_warmup": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "polynomial": "polynomial",
    "warmupcosineschedule": "cosine",
    "wcs": "cosine",
}
# What GaNDLF calls schedules of torch.optim.lr_scheduler.
_INHERITED = {
    "triangle": "CyclicLR",
    "triangle_modified": "CyclicLR",
    "triangular": "CyclicLR",
    "exp_range": "CyclicLR",
    "exp": "ExponentialLR",
    "exponential": "ExponentialLR",
    "step": "StepLR",
    "reduce_on_plateau": "ReduceLROnPlateau",
    "reduce-on-plateau": "ReduceLROnPlateau",
    "reduceonplateau": "ReduceLROnPlateau",
    "plateau": "ReduceLROnPlateau",
    "cosineannealing": "CosineAnnealingWarmRestarts",
}
_STEPPED = ("OneCycleLR", "CyclicLR")
_LENGTHS = ("total_steps", "T_max", "total_iters")


class OptimizerConfig(Schema):
    """An optimizer by name; every further key is one of its arguments.

    It is a class of torch.optim that docs/names.md lists, in any case; ``Novograd`` of MONAI;
    ``AdEMAMix``, ``ADOPT`` or ``Lion``; or a user's own ``package.module:MyOptimizer``, called with
    the weights and `lr`.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        default="AdamW",
        description="Name of the optimizer (docs/names.md), or package.module:MyOptimizer.",
    )
    lr: float = Field(default=5e-4, gt=0, le=1e6, description="Learning rate.")

    @model_validator(mode="after")
    def _can_be_built(self, info: ValidationInfo) -> Self:
        if names.is_needless(info):
            return self
        kind = self._kind()
        names.check_arguments(kind, self.model_extra or {}, first=1, taken=["lr"])
        if not names.is_own(self.name):
            import torch

            weight = torch.nn.Parameter(torch.zeros(1))
            names.attempt(lambda: self.build([weight]), names.called(kind))
        return self

    def build(self, parameters: Iterable[Parameter]) -> Optimizer:
        """The optimizer over `parameters`.

        Raises:
            ConfigError: a user's own is no optimizer.
        """
        import torch

        given = names.arguments(self.name, self.model_extra)
        made = self._kind()(parameters, lr=self.lr, **given)
        return names.checked(made, torch.optim.Optimizer, self.name)

    def _kind(self) -> Any:
        return names.find(self.name, known_optimizers(), "optimizer", UNUSABLE_OPTIMIZERS)


class SchedulerConfig(Schema):
    """A learning-rate schedule by name; every further key is one of its arguments.

    ``constant``, ``constant_with_warmup``, ``linear``, ``cosine`` and ``polynomial`` are those of
    diffusers.optimization; others are classes of torch.optim.lr_scheduler (docs/names.md), in any
    case, what GaNDLF calls one, or a user's own ``package.module:MySchedule``. Arguments that
    depend on the training (``T_max``, ``total_steps``, ``step_size``, ``max_lr`` and others)
    follow from its length and learning rate unless given.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        default="cosine",
        description="Name of the schedule (docs/names.md), or package.module:MySchedule.",
    )
    warmup_steps: int = Field(
        default=100,
        ge=0,
        le=MAX_COUNT,
        description="Steps of linear warm-up, at most a tenth of the training.",
    )
    interval: Literal["auto", "step", "epoch"] = Field(
        default="auto", description="When a torch schedule steps; auto is what its paper does."
    )

    @model_validator(mode="after")
    def _can_be_built(self, info: ValidationInfo) -> Self:
        if names.is_needless(info):
            return self
        extra = self.model_extra or {}
        if self.name.lower() in _WARMED:
            if extra:
                raise ValueError(f"{self.name} takes warmup_steps only, not {names.listed(extra)}")
            return self
        kind = self._kind()
        if names.called(kind) == "ReduceLROnPlateau" and self.interval == "step":
            raise ValueError("ReduceLROnPlateau follows the loss of an epoch: interval is epoch")
        import torch

        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
        names.check_arguments(
            kind, extra, first=1, taken=["last_epoch"], filled=self._fitted(optimizer, 100)
        )
        if not names.is_own(self.name):
            names.attempt(lambda: self._torch_schedule(optimizer, 100), names.called(kind))
        return self

    def build(self, optimizer: Optimizer, num_steps: int, num_epochs: int) -> dict[str, Any]:
        """Lightning's description of the schedule for a training of that length.

        Raises:
            ConfigError: the schedule does not work with that optimizer, or a user's own is none.
        """
        if warmed := _WARMED.get(self.name.lower()):
            from diffusers.optimization import get_scheduler

            schedule: Any = get_scheduler(
                warmed,
                optimizer,
                num_warmup_steps=min(self.warmup_steps, num_steps // 10),
                num_training_steps=num_steps,
            )
            return {"scheduler": schedule, "interval": "step"}
        by_step = self.interval == "step" or (
            self.interval == "auto" and names.called(self._kind()) in _STEPPED
        )
        try:
            schedule = self._torch_schedule(optimizer, num_steps if by_step else num_epochs)
        except (TypeError, ValueError) as error:
            kind = type(optimizer).__name__
            raise ConfigError(
                f"model.scheduler {self.name} does not work with {kind}: {error}"
            ) from error
        described = {"scheduler": schedule, "interval": "step" if by_step else "epoch"}
        if names.called(self._kind()) == "ReduceLROnPlateau":
            described["monitor"] = "validation/loss"
        return described

    def _kind(self) -> Any:
        return names.find(self.name, known_schedules(), "schedule", UNUSABLE_SCHEDULES)

    def _torch_schedule(self, optimizer: Optimizer, length: int) -> Any:
        from torch.optim.lr_scheduler import LRScheduler

        given = names.arguments(self.name, self.model_extra)
        made = self._kind()(optimizer, **{**self._fitted(optimizer, length), **given})
        return names.checked(made, LRScheduler, self.name)

    def _fitted(self, optimizer: Optimizer, length: int) -> dict[str, Any]:
        """Arguments that fit the schedule to a training of `length` steps (or epochs)."""
        kind = self._kind()
        taken = inspect.signature(kind).parameters
        fitted = _fitted(optimizer, max(1, length))
        return {
            **{name: length for name in _LENGTHS if name in taken},
            **fitted.get(names.called(kind), {}),
            **fitted.get(self.name.lower(), {}),
        }


def known_optimizers() -> dict[str, Any]:
    """Every optimizer that has a name, by it."""
    import torch

    import_monai()
    from monai.optimizers import Novograd

    from synthcube.optimizers import ADOPT, AdEMAMix, Lion

    own = {kind.__name__: kind for kind in (ADOPT, AdEMAMix, Lion, Novograd)}
    return own | names.classes(torch.optim, _OPTIMIZERS)


def known_schedules() -> dict[str, Any]:
    """Every schedule that has a name, by it; those with a warm-up are None."""
    from torch.optim import lr_scheduler

    known = names.classes(lr_scheduler, _SCHEDULES)
    inherited = {name: known[stands_for] for name, stands_for in _INHERITED.items()}
    return dict.fromkeys(_WARMED) | known | inherited


def _fitted(optimizer: Optimizer, length: int) -> dict[str, dict[str, Any]]:
    """The same by schedule, as PyTorch or GaNDLF calls it."""
    lr = optimizer.param_groups[0]["lr"]
    low = lr / 1000
    # Four cycles; momentum stays, because few optimizers have one that can be cycled.
    cycles = {"step_size_up": max(1.0, length / 8), "cycle_momentum": False}
    down_and_up = {"base_lr": lr, "max_lr": low}
    return {
        "CyclicLR": {**cycles, "base_lr": low, "max_lr": lr},
        "triangle": down_and_up,
        "triangle_modified": down_and_up,
        "exp_range": {"mode": "exp_range", "gamma": 0.1 ** (1 / length)},
        "OneCycleLR": {
            "max_lr": lr,
            "cycle_momentum": bool({"momentum", "betas"} & optimizer.defaults.keys()),
        },
        "ExponentialLR": {"gamma": 0.01 ** (1 / length)},
        "StepLR": {"step_size": -(-length // 3)},
        "MultiStepLR": {"milestones": [-(-length // 2), -(-length * 3 // 4)]},
        "CosineAnnealingWarmRestarts": {"T_0": -(-length // 2)},
    }
