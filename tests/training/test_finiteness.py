"""Gradients: their norms in the log, and the end where one is not finite."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from synthcube.errors import NonFiniteLossError
from synthcube.models.families import rectified_flow
from synthcube.tasks.train import train
from synthcube.training import checkpoints
from synthcube.training.finiteness import _SKIPPED_IN_A_ROW, FiniteGuard

BROKEN = "network.out.2.conv.weight"


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


class _Breaks(torch.autograd.Function):
    """A finite loss whose gradient is none, as that of a square root at zero."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


@pytest.fixture
def broken_at(monkeypatch: pytest.MonkeyPatch):
    """Makes the gradient of one weight NaN at one step, while the loss stays finite."""
    plain = rectified_flow.RectifiedFlow.loss

    def breaks(step: int) -> None:
        def loss(self: Any, batch: Any) -> dict[str, torch.Tensor]:
            terms = plain(self, batch)
            if self.training and self.global_step + 1 == step:
                terms["loss"] = terms["loss"] + 0 * _Breaks.apply(self.get_parameter(BROKEN)).sum()
            return terms

        monkeypatch.setattr(rectified_flow.RectifiedFlow, "loss", loss)

    return breaks


def test_the_norm_of_the_gradient_is_logged_before_it_is_clipped(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    for name, clip in (("free", "null"), ("clipped", "0.001")):
        overrides = [f"training.gradient_clip_norm={clip}", "training.max_epochs=1"]
        train(tiny_config(), phantoms, tmp_path / name, overrides=overrides)
    free, clipped = (column(tmp_path / name, "gradient_norm") for name in ("free", "clipped"))
    assert len(free) == len(clipped) == 2
    assert free[0] == pytest.approx(clipped[0], rel=1e-5)
    assert clipped[0] > 0.01


def test_the_norm_is_that_of_the_gradient(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    plain = FiniteGuard.on_before_optimizer_step

    def look(self: FiniteGuard, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [
            weight.grad.flatten() for weight in module.parameters() if weight.grad is not None
        ]
        seen.append(float(torch.cat(gradients).double().norm()))
        plain(self, trainer, module, optimizer)

    monkeypatch.setattr(FiniteGuard, "on_before_optimizer_step", look)
    train(tiny_config(), phantoms, tmp_path / "run")
    assert column(tmp_path / "run", "gradient_norm") == pytest.approx(seen, rel=1e-5)


def test_each_optimizer_has_a_norm_with_its_name(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    train(tiny_config("dcgan"), phantoms, tmp_path / "run")
    for name in ("generator", "discriminator"):
        assert len(column(tmp_path / "run", f"gradient_norm/{name}")) == 4


def test_a_bad_gradient_names_the_weights_the_step_and_the_files(
    tiny_config, phantoms: Path, tmp_path: Path, broken_at
) -> None:
    broken_at(4)
    run = tmp_path / "run"
    with pytest.raises(NonFiniteLossError, match="at step 4") as caught:
        train(tiny_config(), phantoms, run)
    assert f"The gradient became NaN or infinite in {BROKEN} (of " in caught.value.headline
    assert str(run / "checkpoints" / "last.ckpt") in caught.value.headline
    assert len(caught.value.faults) == 4
    assert all(Path(fault).is_file() for fault in caught.value.faults)
    assert checkpoints.reached(run / "checkpoints" / "last.ckpt") == (1, 2)
    assert not (run / "artifact").exists()


def test_files_of_all_batches_of_an_accumulated_step_are_named(
    tiny_config, phantoms: Path, tmp_path: Path, broken_at
) -> None:
    broken_at(1)
    with pytest.raises(NonFiniteLossError, match="at step 1") as caught:
        train(tiny_config(), phantoms, tmp_path / "run", overrides=["training.accumulate=2"])
    assert len(caught.value.faults) == 8


class _Trainer:
    """What the guard asks a trainer for, on a device at which it looks only now and then."""

    world_size, is_global_zero, global_step = 1, True, 0

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: object) -> None:
        self.optimizers = [optimizer]
        self.strategy = self
        self.precision_plugin = type("Plugin", (), {"scaler": scaler})()

    def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:  # noqa: A002
        return decision


@pytest.mark.parametrize("scaled", [True, False])
def test_steps_that_a_scaler_skips_are_no_fault_unless_it_never_stops(scaled: bool) -> None:
    """A real float16 training needs a GPU: here the guard is fed what such a one would have."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight])
    trainer: Any = _Trainer(optimizer, object() if scaled else None)
    guard = FiniteGuard(lambda rows: [str(row) for row in rows], lambda: "none", 50)
    module: Any = torch.nn.Module()
    module.weight, module.device = weight, torch.device("cpu")
    guard.on_train_start(trainer, module)

    def step(gradient: float) -> None:
        guard.on_train_batch_start(trainer, module, {"index": torch.tensor([3])}, 0)
        guard.on_before_backward(trainer, module, torch.tensor(1.0))
        weight.grad = torch.tensor([gradient, 1.0])
        guard.on_before_optimizer_step(trainer, module, optimizer)
        trainer.global_step += 1

    step(1.0)
    if not scaled:
        with pytest.raises(NonFiniteLossError, match="The gradients of all 1"):
            step(float("inf"))
        return
    for _ in range(3):
        for _ in range(_SKIPPED_IN_A_ROW - 1):
            step(float("inf"))
        step(1.0)
    for _ in range(_SKIPPED_IN_A_ROW - 1):
        step(float("nan"))
    with pytest.raises(NonFiniteLossError, match="NaN or infinite at step"):
        step(float("nan"))


PROCESS = """
import sys, torch
from pathlib import Path
from synthcube import environment
from synthcube.errors import SynthCubeError
from synthcube.models.families.rectified_flow import RectifiedFlow
from synthcube.tasks.train import train

class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")

plain = RectifiedFlow.loss
def loss(self, batch):
    terms = plain(self, batch)
    if self.training and self.global_step == 1 and self.global_rank == 1:
        terms["loss"] = terms["loss"] + 0 * Breaks.apply(self.get_parameter(sys.argv[4])).sum()
    return terms
RectifiedFlow.loss = loss
environment.open_log()
try:
    train(*map(Path, sys.argv[1:4]), overrides=["compute.num_devices=2"])
except SynthCubeError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.slow
def test_a_bad_gradient_in_one_process_is_said_once_with_the_files_of_both(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, str(script), str(tiny_config()), str(phantoms), str(tmp_path / "run"),
         BROKEN],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("The gradient became NaN or infinite in") == 1
    assert "at step 2" in ended.stderr
    assert ended.stderr.count(str(phantoms)) == 4
    assert "Traceback" not in ended.stderr
