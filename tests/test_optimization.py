"""Optimizers and schedules by name: each one builds, steps, resumes, and says what is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from synthcube import plugins
from synthcube.errors import ConfigError
from synthcube.models.optimizers import (
    UNUSABLE_OPTIMIZERS,
    UNUSABLE_SCHEDULES,
    OptimizerConfig,
    SchedulerConfig,
    known_optimizers,
    known_schedules,
)

EPOCHS, STEPS = 10, 40
INHERITED = [
    "sgd", "asgd", "adam", "adamw", "adamax", "rprop", "adadelta", "adagrad", "rmsprop", "radam",
    "novograd", "nadam", "ademamix", "lion", "adopt",
]  # fmt: skip
FLAT = {"constant": 1.0, "ConstantLR": 1 / 3}
PLATEAU = ("ReduceLROnPlateau", "reduce_on_plateau", "reduce-on-plateau", "reduceonplateau",
           "plateau")  # fmt: skip


def train(optimizer: Any, model: torch.nn.Module, num_steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, generator=generator)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1)


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, read without running anything in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


@pytest.mark.parametrize("name", [*known_optimizers(), *INHERITED])
def test_every_optimizer_learns_and_resumes(name: str) -> None:
    config = OptimizerConfig(name=name, lr=1e-2)
    straight, resumed = model(), model()
    optimizer = config.build(straight.parameters())
    losses = train(optimizer, straight, 20)
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == 1e-2

    first = config.build(resumed.parameters())
    assert train(first, resumed, 10) == losses[:10]
    second = config.build(resumed.parameters())
    second.load_state_dict(reloaded(first.state_dict()))
    assert train(second, resumed, 10) == losses[10:]


@pytest.mark.parametrize("name", known_optimizers())
def test_optimizers_are_found_in_any_case(name: str) -> None:
    for spelt in (name.lower(), name.upper(), name.swapcase()):
        optimizer = OptimizerConfig(name=spelt).build(model().parameters())
        assert type(optimizer).__name__ == name


def rates(name: str, epochs: int, steps: int, **arguments: Any) -> list[float]:
    """Learning rates, as multiples of that of the optimizer, over a training of that length."""
    optimizer = OptimizerConfig(lr=0.5).build(model().parameters())
    described = SchedulerConfig(name=name, **arguments).build(optimizer, steps, epochs)
    schedule, passed = described["scheduler"], []
    for _ in range(steps if described["interval"] == "step" else epochs):
        passed.append(optimizer.param_groups[0]["lr"] / 0.5)
        optimizer.step()
        schedule.step(*[1.0] if "monitor" in described else [])
    return passed


@pytest.mark.parametrize("name", known_schedules())
@pytest.mark.parametrize(("epochs", "steps"), [(EPOCHS, STEPS), (1, 1), (2, 3), (100, 1000)])
def test_every_schedule_changes_the_rate(name: str, epochs: int, steps: int) -> None:
    arguments = {"patience": 0} if name in PLATEAU else {}
    passed = rates(name, epochs, steps, **arguments)
    assert all(0 <= rate <= 1 + 1e-9 for rate in passed)
    if name in FLAT:
        assert passed == pytest.approx([FLAT[name]] * len(passed))
    elif epochs >= EPOCHS:
        assert max(passed) > 1.5 * min(passed)
    if epochs == 100 and name not in FLAT and name != "exp_range":
        assert max(passed) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("name", known_schedules())
def test_every_schedule_resumes(name: str) -> None:
    def build() -> tuple[Any, Any]:
        optimizer = OptimizerConfig(lr=0.5).build(model().parameters())
        return optimizer, SchedulerConfig(name=name).build(optimizer, STEPS, EPOCHS)["scheduler"]

    def run(optimizer: Any, schedule: Any) -> list[float]:
        passed = []
        for _ in range(4):
            optimizer.step()
            schedule.step(*[1.0] if name in PLATEAU else [])
            passed.append(optimizer.param_groups[0]["lr"])
        return passed

    first, again = build(), build()
    run(*first)
    for one, other in zip(first, again, strict=True):
        other.load_state_dict(reloaded(one.state_dict()))
    assert run(*again) == run(*first)


@pytest.mark.parametrize("name", known_schedules())
def test_schedules_are_found_in_any_case(name: str) -> None:
    assert rates(name.swapcase(), 4, 16) == rates(name, 4, 16)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("triangular", "CyclicLR"),
        ("exp", "ExponentialLR"),
        ("exponential", "ExponentialLR"),
        ("step", "StepLR"),
        ("cosineannealing", "CosineAnnealingWarmRestarts"),
        ("warmupcosineschedule", "cosine"),
        ("wcs", "cosine"),
        ("triangle_modified", "triangle"),
    ],
)
def test_inherited_schedules_are_what_they_were(name: str, same: str) -> None:
    assert rates(name, EPOCHS, STEPS) == rates(same, EPOCHS, STEPS)


def test_triangles_begin_where_they_did() -> None:
    down, up = rates("triangle", EPOCHS, STEPS), rates("triangular", EPOCHS, STEPS)
    assert down[:6] == pytest.approx([1, 0.8002, 0.6004, 0.4006, 0.2008, 0.001])
    assert up[:6] == pytest.approx([0.001, 0.2008, 0.4006, 0.6004, 0.8002, 1])
    shrinking = rates("exp_range", EPOCHS, STEPS)
    assert shrinking[35] == pytest.approx(0.1 ** (35 / 40), abs=2e-3)


def test_what_is_given_wins_over_what_is_derived() -> None:
    assert rates("step", 4, 4, step_size=1, gamma=0.5) == pytest.approx([1, 0.5, 0.25, 0.125])
    assert rates("CyclicLR", 1, 4, base_lr=0.25, step_size_up=2)[:3] == [0.5, 0.75, 1]
    assert rates("StepLR", 2, 3, interval="step", step_size=1) == pytest.approx([1, 0.1, 0.01])


def test_momentum_is_cycled_only_where_there_is_one() -> None:
    for name, moved in (("AdamW", True), ("SGD", True), ("Adagrad", False)):
        optimizer = OptimizerConfig(name=name).build(model().parameters())
        SchedulerConfig(name="OneCycleLR").build(optimizer, STEPS, EPOCHS)
        assert ("max_momentum" in optimizer.param_groups[0]) is moved
        SchedulerConfig(name="triangular").build(optimizer, STEPS, EPOCHS)
    with pytest.raises(ConfigError, match=r"CyclicLR does not work with Adagrad: optimizer must"):
        SchedulerConfig(name="CyclicLR", cycle_momentum=True).build(optimizer, STEPS, EPOCHS)


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (OptimizerConfig, {"name": "novogard"}, "unknown optimizer 'novogard'; did you mean Novo"),
        (OptimizerConfig, {"name": "Lion", "eps": 1}, "Lion takes no argument 'eps'; it takes be"),
        (OptimizerConfig, {"name": "adam", "betas": [2, 0]}, "Adam does not take these arguments"),
        (OptimizerConfig, {"name": "lion", "betas": [0.9]}, "Lion does not take these arguments: "),
        (OptimizerConfig, {"name": "no.such:One"}, "no.such:One is code that does not belong to "),
        (
            SchedulerConfig,
            {"name": "trianguler"},
            "unknown schedule 'trianguler'; did you mean triangular",
        ),
        (SchedulerConfig, {"name": "wcs", "T_0": 1}, "wcs takes warmup_steps only, not 'T_0'"),
        (SchedulerConfig, {"name": "step", "size": 1}, "StepLR takes no argument 'size'; it takes"),
        (SchedulerConfig, {"name": "cosineannealing", "T_0": 0}, "does not take these arguments: "),
        (SchedulerConfig, {"name": "plateau", "interval": "step"}, "interval is epoch"),
    ],
)
def test_faults_are_found_at_start(kind: Any, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**arguments)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(OptimizerConfig, name) for name in UNUSABLE_OPTIMIZERS]
    + [(SchedulerConfig, name) for name in UNUSABLE_SCHEDULES],
)
def test_what_cannot_be_used_is_refused_with_its_reason(kind: Any, name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} cannot be used by name: it takes "):
        kind(name=name)


OWN = """
import torch

class Fixed(torch.optim.SGD):
    def __init__(self, weights, lr, pull=0.0):
        super().__init__(weights, lr=lr, weight_decay=pull)

class Halved(torch.optim.lr_scheduler.StepLR):
    def __init__(self, optimizer, every):
        super().__init__(optimizer, every, gamma=0.5)

def waved(optimizer, total_iters):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / total_iters)

def nothing(optimizer):
    return None
"""


def test_a_users_own_optimizer_and_schedules(tmp_path: Path) -> None:
    (tmp_path / "own_steps.py").write_text(OWN)
    plugins.vouch([tmp_path])
    optimizer = OptimizerConfig(name="own_steps:Fixed", lr=0.5, pull=0.1).build(
        model().parameters()
    )
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert rates("own_steps:Halved", 3, 9, every=1) == pytest.approx([1, 0.5, 0.25])
    assert rates("own_steps:waved", 4, 9) == pytest.approx([0, 0.25, 0.5, 0.75])
    with pytest.raises(ValidationError, match="Fixed takes no argument 'momentum'; it takes pull"):
        OptimizerConfig(name="own_steps:Fixed", momentum=0.9)
    with pytest.raises(ValidationError, match="Halved needs 'every'"):
        SchedulerConfig(name="own_steps:Halved")
    with pytest.raises(ConfigError, match="'own_steps:nothing' makes a NoneType, not a LRSchedul"):
        rates("own_steps:nothing", 3, 9)
