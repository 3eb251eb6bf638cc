"""Optimizers and learning-rate schedules by name; and three optimizers that PyTorch lacks.

Lion, AdEMAMix and ADOPT follow their papers. pytorch_optimizer has them too, but it clips and
decays in ADOPT otherwise, and takes any misspelt argument without an error.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, ValidationInfo, model_validator
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from typing_extensions import Self

from synthcube import plugins
from synthcube.environment import import_monai
from synthcube.errors import ConfigError
from synthcube.schema import Schema, StepNumber

_Tensors = list[torch.Tensor]


class _Grouped(Optimizer, ABC):
    """An optimizer that updates all weights of a group together and counts steps by group."""

    NUM_BETAS: ClassVar[int]

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        for name in ("lr", "eps", "weight_decay", "alpha"):
            if settings.get(name, 0) < 0:
                raise ValueError(f"{name} {settings[name]}: must not be negative")
        count, betas = self.NUM_BETAS, tuple(settings["betas"])
        if len(betas) != count or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {list(betas)}: {count} numbers from 0 to below 1 are needed")
        super().__init__(params, {**settings, "betas": betas, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The loss of `closure`, if there is one, after an update of all weights with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                group["step"] += 1
                self._move(group, weights, [weight.grad for weight in weights])
        return loss

    @abstractmethod
    def _move(self, group: dict[str, Any], weights: _Tensors, gradients: _Tensors) -> None:
        """Update the weights of a group by one step."""

    def _state(self, weights: _Tensors, name: str) -> _Tensors:
        """The state called `name` of each weight: tensors of its size, zero at first."""
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return [self.state[weight][name] for weight in weights]


class Lion(_Grouped):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023), algorithm 2.

    Every weight moves by `lr`, so `lr` is a third to a tenth of AdamW's. Decay is decoupled.
    """

    NUM_BETAS = 2

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def _move(self, group: dict[str, Any], weights: _Tensors, gradients: _Tensors) -> None:
        beta_1, beta_2 = group["betas"]
        mean = self._state(weights, "mean")
        direction = torch._foreach_lerp(mean, gradients, 1 - beta_1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, direction, alpha=-group["lr"])
        torch._foreach_lerp_(mean, gradients, 1 - beta_2)


class AdEMAMix(_Grouped):
    """Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older" (ICLR 2025).

    AdamW with a second, slow mean of the gradients that counts `alpha` times; `betas` are those
    of the fast mean, the squares and the slow mean. `num_warmup_steps` brings in the slow mean
    gradually (T_alpha = T_beta3 of the paper, which takes the whole training); 0: at once.
    """

    NUM_BETAS = 3

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), eps: float = 1e-8,
        weight_decay: float = 0.0, alpha: float = 5.0, num_warmup_steps: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, alpha=alpha,
            num_warmup_steps=num_warmup_steps,
        )  # fmt: skip

    def _move(self, group: dict[str, Any], weights: _Tensors, gradients: _Tensors) -> None:
        beta_1, beta_2, _ = group["betas"]
        alpha, beta_3 = self._slow(group)
        fast, slow, square = (self._state(weights, name) for name in ("fast", "slow", "square"))
        torch._foreach_lerp_(fast, gradients, 1 - beta_1)
        torch._foreach_lerp_(slow, gradients, 1 - beta_3)
        torch._foreach_mul_(square, beta_2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta_2)
        scale = torch._foreach_sqrt(square)
        torch._foreach_div_(scale, math.sqrt(1 - beta_2 ** group["step"]))
        torch._foreach_add_(scale, group["eps"])
        change = torch._foreach_div(fast, 1 - beta_1 ** group["step"])
        torch._foreach_add_(change, slow, alpha=alpha)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, change, scale, -group["lr"])

    @staticmethod
    def _slow(group: dict[str, Any]) -> tuple[float, float]:
        """alpha and beta_3 of this step; both grow, beta_3 linearly in the mean's half-life."""
        beta_1, _, beta_3 = group["betas"]
        alpha, length = group["alpha"], group["num_warmup_steps"]
        if group["step"] >= length or min(beta_1, beta_3) == 0:
            return alpha, beta_3
        share = group["step"] / length
        start, end = math.log(beta_1), math.log(beta_3)
        grown = math.exp(start * end / ((1 - share) * end + share * start))
        return share * alpha, min(grown, beta_3)


class ADOPT(_Grouped):
    """Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta_2" (NeurIPS 2024).

    The first step only measures the gradients. A later one divides its gradient by the scale of
    the steps before it, and clips the quotient at the fourth root of their number, as the paper's
    final version does. Decay is added to the gradient, or decoupled as in AdamW.
    """

    NUM_BETAS = 2

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6, weight_decay: float = 0.0, decouple: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decouple=decouple
        )

    def _move(self, group: dict[str, Any], weights: _Tensors, gradients: _Tensors) -> None:
        beta_1, beta_2 = group["betas"]
        decay = group["weight_decay"]
        if decay and not group["decouple"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        mean, square = (self._state(weights, name) for name in ("mean", "square"))
        number = group["step"] - 1
        if number > 0:
            if group["decouple"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * decay)
            scale = torch._foreach_sqrt(square)
            torch._foreach_clamp_min_(scale, group["eps"])
            change = torch._foreach_div(gradients, scale)
            torch._foreach_clamp_min_(change, -(number**0.25))
            torch._foreach_clamp_max_(change, number**0.25)
            torch._foreach_lerp_(mean, change, 1 - beta_1)
            torch._foreach_add_(weights, mean, alpha=-group["lr"])
            torch._foreach_mul_(square, beta_2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta_2 if number else 1)


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
    **dict.fromkeys(("warmupcosineschedule", "wcs"), "cosine"),
}
# Longest warm-up, as a share of the training.
_WARMUP_SHARE = 0.1
# What GaNDLF calls schedules of torch.optim.lr_scheduler.
_INHERITED = {
    **dict.fromkeys(("triangle", "triangle_modified", "triangular", "exp_range"), "CyclicLR"),
    **dict.fromkeys(("exp", "exponential"), "ExponentialLR"),
    "step": "StepLR",
    **dict.fromkeys(
        ("reduce_on_plateau", "reduce-on-plateau", "reduceonplateau", "plateau"),
        "ReduceLROnPlateau",
    ),
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
        if plugins.is_needless(info):
            return self
        kind = self._kind()
        plugins.check_arguments(kind, self.model_extra or {}, first=1, taken=["lr"])
        if not plugins.is_own(self.name):
            weight = Parameter(torch.zeros(1))
            plugins.attempt(lambda: self.build([weight]), plugins.called(kind))
        return self

    def build(self, parameters: Iterable[Parameter]) -> Optimizer:
        """The optimizer over `parameters`; ConfigError if a user's own is none."""
        settings = plugins.arguments(self.name, self.model_extra)
        optimizer = self._kind()(parameters, lr=self.lr, **settings)
        return plugins.checked(optimizer, Optimizer, self.name)

    def _kind(self) -> Any:
        return plugins.find(self.name, known_optimizers(), "optimizer", UNUSABLE_OPTIMIZERS)


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
    warmup_steps: StepNumber = Field(
        default=100, description="Steps of linear warm-up, at most a tenth of the training."
    )
    interval: Literal["auto", "step", "epoch"] = Field(
        default="auto", description="When a torch schedule steps; auto is what its paper does."
    )

    @model_validator(mode="after")
    def _can_be_built(self, info: ValidationInfo) -> Self:
        if plugins.is_needless(info):
            return self
        extra = self.model_extra or {}
        if self.name.lower() in _WARMED:
            if extra:
                unknown = plugins.listed(extra)
                raise ValueError(f"{self.name} takes warmup_steps only, not {unknown}")
            return self
        kind = self._kind()
        if self.follows_loss and self.interval == "step":
            raise ValueError("ReduceLROnPlateau follows the loss of an epoch: interval is epoch")
        optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
        plugins.check_arguments(
            kind, extra, first=1, taken=["last_epoch"], filled=self._fitted(optimizer, 100)
        )
        if not plugins.is_own(self.name):
            plugins.attempt(lambda: self._torch_schedule(optimizer, 100), plugins.called(kind))
        return self

    @property
    def follows_loss(self) -> bool:
        """Whether the learning rate depends on the loss."""
        is_warmed = self.name.lower() in _WARMED
        return not is_warmed and plugins.called(self._kind()) == "ReduceLROnPlateau"

    def build(
        self, optimizer: Optimizer, num_steps: int, num_epochs: int,
        time_share: Callable[[], float] = lambda: 0.0,
    ) -> dict[str, Any]:  # fmt: skip
        """Lightning's dictionary with the schedule for a training of that length.

        Raises ConfigError where it does not work with that optimizer, or is no schedule.

        Args:
            time_share: the share of a time limit that is spent, in [0, 1]. Schedules with a warm-up
                are as far as the steps or the time, whichever is further.
        """
        if warmed := _WARMED.get(self.name.lower()):
            from diffusers.optimization import get_scheduler

            warmup = min(self.warmup_steps, int(num_steps * _WARMUP_SHARE))
            schedule: Any = get_scheduler(
                warmed, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps
            )
            by_step = schedule.lr_lambdas[0]
            schedule.lr_lambdas = [
                lambda step: by_step(_position(step, time_share(), warmup, num_steps))
                for _ in optimizer.param_groups
            ]
            return {"scheduler": schedule, "interval": "step"}
        by_step = self.interval == "step" or (
            self.interval == "auto" and plugins.called(self._kind()) in _STEPPED
        )
        try:
            schedule = self._torch_schedule(optimizer, num_steps if by_step else num_epochs)
        except (TypeError, ValueError) as error:
            kind = type(optimizer).__name__
            message = f"model.scheduler {self.name} does not work with {kind}: {error}"
            raise ConfigError(message) from error
        described = {"scheduler": schedule, "interval": "step" if by_step else "epoch"}
        if self.follows_loss:
            described["monitor"] = "validation/loss"
        return described

    def _kind(self) -> Any:
        return plugins.find(self.name, known_schedules(), "schedule", UNUSABLE_SCHEDULES)

    def _torch_schedule(self, optimizer: Optimizer, length: int) -> Any:
        settings = plugins.arguments(self.name, self.model_extra)
        schedule = self._kind()(optimizer, **(self._fitted(optimizer, length) | settings))
        return plugins.checked(schedule, lr_scheduler.LRScheduler, self.name)

    def _fitted(self, optimizer: Optimizer, length: int) -> dict[str, Any]:
        """Arguments that fit the schedule to a training of `length` steps (or epochs)."""
        kind = self._kind()
        taken = inspect.signature(kind).parameters
        fitted = _fitted(optimizer, max(1, length))
        return {
            **{name: length for name in _LENGTHS if name in taken},
            **fitted.get(plugins.called(kind), {}),
            **fitted.get(self.name.lower(), {}),
        }


def _position(step: int, time_share: float, warmup: int, num_steps: int) -> float:
    """The step at which a schedule of `num_steps` is, after `step` steps and a share of the time.

    The warm-up is over after `warmup` steps, or after the same tenth of the time at most.
    """
    if time_share == 0.0:
        return step
    warmed = max(step / warmup, time_share / _WARMUP_SHARE) if warmup else 1.0
    if warmed < 1:
        return warmed * warmup
    return min(max(step, time_share * num_steps, warmup), num_steps)


def known_optimizers() -> dict[str, Any]:
    """All known optimizer classes by name."""
    import_monai()
    from monai.optimizers import Novograd

    extra = {kind.__name__: kind for kind in (ADOPT, AdEMAMix, Lion, Novograd)}
    return extra | plugins.classes(torch.optim, _OPTIMIZERS)


def known_schedules() -> dict[str, Any]:
    """All known schedule classes by name; None for those of diffusers with a warm-up."""
    known = plugins.classes(lr_scheduler, _SCHEDULES)
    inherited = {name: known[stands_for] for name, stands_for in _INHERITED.items()}
    return dict.fromkeys(_WARMED) | known | inherited


def _fitted(optimizer: Optimizer, length: int) -> dict[str, dict[str, Any]]:
    """Arguments for a training of `length` steps or epochs, by the schedule's name."""
    lr = optimizer.param_groups[0]["lr"]
    low = lr / 1000
    # Four cycles; momentum stays, because few optimizers have one that can be cycled.
    cycles = {"step_size_up": max(1.0, length / 8), "cycle_momentum": False}
    cycles_momentum = bool({"momentum", "betas"} & optimizer.defaults.keys())
    down_and_up = {"base_lr": lr, "max_lr": low}
    return {
        "CyclicLR": {**cycles, "base_lr": low, "max_lr": lr},
        "triangle": down_and_up,
        "triangle_modified": down_and_up,
        "exp_range": {"mode": "exp_range", "gamma": 0.1 ** (1 / length)},
        "OneCycleLR": {"max_lr": lr, "cycle_momentum": cycles_momentum},
        "ExponentialLR": {"gamma": 0.01 ** (1 / length)},
        "StepLR": {"step_size": -(-length // 3)},
        "MultiStepLR": {"milestones": [-(-length // 2), -(-length * 3 // 4)]},
        "CosineAnnealingWarmRestarts": {"T_0": -(-length // 2)},
    }
