"""The audit by canaries: its bound, and that it catches a training that is not private."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from synthcube.data.phantom import write_phantoms
from synthcube.evaluation.canaries import Audit, audit, audited_epsilon, write_canaries
from synthcube.models import artifact
from synthcube.tasks.train import train


@pytest.mark.parametrize(
    ("guesses", "right", "epsilon"),
    # Where delta is 0, q ** n = 0.05 for n right guesses of n: the bound is log(q / (1 - q)).
    [(n, n, math.log(0.05 ** (1 / n) / (1 - 0.05 ** (1 / n)))) for n in (8, 32, 100)]
    + [(32, 16, 0.0), (32, 0, 0.0)],
)
def test_the_bound_is_that_of_the_binomial_tail(guesses: int, right: int, epsilon: float) -> None:
    assert audited_epsilon(2 * guesses, guesses, right, 0.0) == pytest.approx(epsilon, abs=2e-3)


def test_delta_makes_the_bound_smaller() -> None:
    bounds = [audited_epsilon(64, 32, 32, delta) for delta in (0.0, 1e-4, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] > 1  # so that a promise of 1 can fail


def test_coins_decide_which_canaries_are_in(tmp_path: Path) -> None:
    parts = write_canaries(tmp_path, 40, (8, 8), seed=1)
    sizes = []
    for path in parts:
        with path.open(newline="") as file:
            sizes.append(len(list(csv.DictReader(file))))
    assert sum(sizes) == 40
    assert 10 < sizes[0] < 30


CONFIG = {
    "model": {"name": "rectified_flow", "channels": [8, 16], "scheduler": None,
              "optimizer": {"lr": 2e-3}},
    "data": {"intensity_range": [0, 255], "validation_fraction": 0.0, "num_workers": 0},
    "training": {"batch_size": 24, "max_epochs": 375, "sample_every_n_epochs": 0,
                 "validate_every_n_epochs": 375, "checkpoint_every_n_minutes": None},
    "compute": {"accelerator": "cpu", "precision": "32"},
}  # fmt: skip
STEPS = 750
PRIVATE = "training.privacy={epsilon: 1, draws: 1, images_at_once: 64, delta: 0.001}"


def audited(folder: Path, overrides: list[str]) -> Audit:
    """Train on 16 shapes and on about half of 64 random patterns, in 750 steps."""
    included, left_out = write_canaries(folder / "canaries", 64, (16, 16), seed=0)
    write_phantoms(folder / "shapes", num=16, size=(16, 16))
    with (folder / "shapes" / "manifest.csv").open(newline="") as file:
        rows = [
            {"SubjectID": row["SubjectID"], "Channel_0": f"shapes/{row['Channel_0']}"}
            for row in csv.DictReader(file)
        ]
    with included.open(newline="") as file:
        rows += [
            {"SubjectID": row["SubjectID"], "Channel_0": f"canaries/{row['Channel_0']}"}
            for row in csv.DictReader(file)
        ]
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["SubjectID", "Channel_0"])
        writer.writeheader()
        writer.writerows(rows)
    train(CONFIG, folder / "train.csv", folder / "run", overrides=overrides)
    trained = artifact.load(folder / "run")
    return audit(trained, included, left_out, delta=0.001)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a machine that is shared
def test_plain_training_is_caught(tmp_path: Path) -> None:
    audit = audited(tmp_path, [])
    assert audit.canaries == 64
    assert artifact.load(tmp_path / "run").metrics["steps"] == STEPS
    assert audit.area > 0.9
    assert audit.epsilon > 1  # the promise of the test below would be disproved


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a machine that is shared
def test_as_many_private_steps_are_not(tmp_path: Path) -> None:
    audit = audited(tmp_path, [PRIVATE])
    assert artifact.load(tmp_path / "run").metrics["steps"] == STEPS
    assert audit.epsilon <= 1
    assert audit.area < 0.8
