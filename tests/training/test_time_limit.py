"""A training that its time ends is annealed, and says so when it has learned too little."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from synthcube.models.optimizers import SchedulerConfig
from synthcube.tasks.train import train


def rates(shares: list[float], name: str = "cosine", steps: int = 1000) -> list[float]:
    """Learning rates, as parts of the full one, of steps at which a share of the time is spent."""
    spent = [0.0]
    optimizer = torch.optim.SGD([Parameter(torch.zeros(1))], lr=1.0)
    schedule = SchedulerConfig(name=name).build(optimizer, steps, 10, lambda: spent[0])["scheduler"]
    values = []
    for share in shares:
        values.append(optimizer.param_groups[0]["lr"])
        spent[0] = share
        optimizer.step()
        schedule.step()
    return [*values[1:], optimizer.param_groups[0]["lr"]]


def test_a_slow_training_is_annealed_when_its_time_is_up() -> None:
    """50 of 1,000 steps: warmed up in a tenth of the time, then the whole cosine."""
    shares = [(i + 1) / 50 for i in range(50)]
    values = rates(shares)
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    expected = [0.5 * (1 + math.cos(math.pi * (share - 0.1) / 0.9)) for share in shares[4:]]
    assert values[4:] == pytest.approx(expected, abs=1e-6)
    assert values[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup", "polynomial"])
def test_time_changes_nothing_for_a_training_that_its_epochs_end(name: str) -> None:
    fast = [i / 1_000_000 for i in range(1000)]
    assert rates(fast, name) == pytest.approx(rates([0.0] * 1000, name), abs=1e-12)


def test_the_rate_never_rises_again() -> None:
    """A machine whose speed changes: time leads, then steps lead."""
    shares = [*(i / 200 for i in range(60)), *([0.3] * 700), *(0.3 + i / 400 for i in range(280))]
    values = rates(shares)
    warm = values.index(max(values))
    assert all(after <= before for before, after in itertools.pairwise(values[warm:]))


def learning_rates(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]


def test_a_training_ends_with_a_small_rate_and_a_warning_of_noise(
    tiny_config, phantoms, tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO)
    train(tiny_config(), phantoms, tmp_path / "run", overrides=[
        "training.max_epochs=100000", "training.max_minutes=0.05", "training.log_every_n_steps=1",
        "training.sample_every_n_epochs=0", "training.validate_every_n_epochs=100",
        "model.optimizer.lr=1e-5",
    ])  # fmt: skip
    values = learning_rates(tmp_path / "run")
    assert max(values) > 0.9e-5
    assert values[-1] < 0.1 * max(values)
    assert "generated images will be mostly noise" in caplog.text
    assert "training.max_minutes" in caplog.text
    left = re.findall(r"(\d+):(\d\d):(\d\d) left", caplog.text)
    assert left
    assert set(left) <= {("0", "00", f"0{seconds}") for seconds in range(4)}, "not that of epochs"


def test_a_trial_of_a_few_steps_is_not_warned(
    tiny_config, phantoms, tmp_path: Path, caplog
) -> None:
    train(tiny_config(), phantoms, tmp_path / "run", overrides=["training.max_epochs=1"])
    assert "noise" not in caplog.text
