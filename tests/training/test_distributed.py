"""Two real processes that train together (gloo), against one that trains alone."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube.data.module import EpochBatches
from synthcube.models import registry

SCRIPT = Path(__file__).parents[1] / "each_rank.py"
LIMIT_S = 240
TWO = "compute.num_devices=2"


def launched(config: Path, data: Path, run: Path, *overrides: str) -> None:
    """Train with two processes, of which Lightning starts the second."""
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, (config, data, run)), TWO, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["validation/loss"]) for row in csv.DictReader(file)
                if row["validation/loss"]]  # fmt: skip


@pytest.mark.parametrize("family", registry.names())
def test_two_processes_end_with_the_same_weights_to_the_bit(
    family: str, tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    run = tmp_path / "run"
    log = forks.script_together(SCRIPT, tiny_config(family), phantoms, run, TWO)
    first, second = (load_file(tmp_path / "run" / f"rank_{i}.safetensors") for i in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    artifact = load_file(tmp_path / "run" / "artifact" / "weights.safetensors")
    assert all(torch.isfinite(each).all() for each in artifact.values())
    assert log.count("epoch 1/2  step") == 2, "one process speaks"


def test_two_processes_learn_what_one_does(
    tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    """A family without noise: the same global batches give the same weights but for rounding."""
    config = tiny_config("vqvae")
    same = ("model.revive_below=0", "training.max_epochs=3")
    launched(config, phantoms, tmp_path / "two", *same)
    forks.script_together(SCRIPT, config, phantoms, tmp_path / "one", *same, processes=1)
    one, two = (load_file(tmp_path / name / "rank_0.safetensors") for name in ("one", "two"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-3, atol=1e-5, msg=name)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_killed_training_of_two_goes_on(
    tiny_config, phantoms: Path, tmp_path: Path, forks
) -> None:
    config = tiny_config("rectified_flow")

    def train(name: str, num_epochs: int) -> str:
        return forks.script_together(
            SCRIPT, config, phantoms, tmp_path / name, TWO, f"training.max_epochs={num_epochs}",
            "model.scheduler=null",
        )  # fmt: skip

    train("straight", 3)
    train("resumed", 2)
    assert train("resumed", 3).count("Continuing after epoch 2") == 1
    straight, resumed = (
        load_file(tmp_path / name / "rank_1.safetensors") for name in ("straight", "resumed")
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_bad_loss_in_one_process_is_said_once_with_its_files(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "synthcube", "train", "-c", str(tiny_config()), "-d", str(phantoms),
         "-o", str(tmp_path / "run"), "--set", "compute.num_devices=2",
         "--set", "model.optimizer.lr=1e30", "--set", "training.gradient_clip_norm=null",
         "--set", "training.max_epochs=20", "--set", "model.scheduler=null"],
        capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("The loss became") == 1
    assert "Traceback" not in ended.stderr
    assert str(phantoms) in ended.stderr


def test_a_batch_that_processes_cannot_share_is_refused(
    cli, tiny_config, phantoms, tmp_path
) -> None:
    code, _, text = cli(
        "train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run",
        "--set", "compute.num_devices=3",
    )  # fmt: skip
    assert code == 2
    assert "training.batch_size is 4, which 3 processes" in text
    assert "use 3 or 6" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 10, 13])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_each_batch_without_gap_or_overlap(rows: int, shuffle: bool) -> None:
    alone = list(EpochBatches(range(rows), 4, 7, shuffle=shuffle))
    shares = [list(EpochBatches(range(rows), 4, 7, (rank, 2), shuffle=shuffle)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    seen = sorted(row for share in shares for batch in share for _, row in batch)
    if shuffle:
        assert len(set(seen)) == len(seen)
        assert all(len(a) == len(b) for a, b in zip(*shares, strict=True))
        if rows >= 4:
            assert seen == sorted(row for batch in alone for _, row in batch)
    else:
        assert seen == list(range(rows)), "every image is validated once"
