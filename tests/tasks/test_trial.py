"""`train --debug`: everything is tried in a small way, and nothing of it is left."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from synthcube.models import registry
from synthcube.storage import sha256


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("family", registry.names())
def test_every_family_is_tried_and_nothing_is_kept(
    family: str, cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, out, err = cli("train", "-c", tiny_config(family), "-d", phantoms, "-o", run, "--debug")
    assert code == 0, err
    assert "training.batch_size=2" in out.splitlines()[0]
    assert "All of it works; nothing of it is kept." in out.splitlines()[-1]
    assert "made " in out
    assert not run.exists()


def test_a_real_run_stays_as_it_is_and_is_not_continued_from_a_trial(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, run, straight = tiny_config(), tmp_path / "run", tmp_path / "straight"
    assert cli("train", "-c", config, "-d", phantoms, "-o", run)[0] == 0
    before = digests(run)
    assert cli("train", "-c", config, "-d", phantoms, "-o", run, "--debug")[0] == 0
    assert digests(run) == before
    assert cli("train", "-c", config, "-d", phantoms, "-o", straight, "--debug")[0] == 0
    _, _, err = cli("train", "-c", config, "-d", phantoms, "-o", straight)
    assert "Continuing" not in err
    weights = "artifact/weights.safetensors"
    assert sha256(straight / weights) == sha256(run / weights)


def test_what_the_run_would_fail_at_fails_in_the_trial(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    words = ("train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run", "--debug")
    code, _, err = cli(
        *words, "--set", "model.optimizer.lr=1e6", "--set", "training.gradient_clip_norm=null"
    )
    assert (code, " became " in err) == (2, True)
    for faulty in ("model.speed=1", "data.conditions={Age: number}"):
        code, _, err = cli(*words, "--set", faulty)
        assert code == 2, err
    assert not (tmp_path / "run").exists()


def test_conditions_of_few_images_are_those_of_all(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """Ages that hardly any image differs in, classes, empty cells, and splits of the user's own."""
    with (phantoms / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row |= {"Age": "40" if i else "", "Site": f"s{i % 3}", "Split": "train"}
    rows[7]["Age"] = "41"
    rows[9]["Split"], rows[11]["Split"] = "validation", "test"
    with (phantoms / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    code, _, err = cli(
        "train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run", "--debug",
        "--set", "data.conditions={Age: number, Site: class}", "--set", "training.batch_size=1",
    )  # fmt: skip
    assert code == 0, err
    assert "and 1 validation images" in err


@pytest.mark.slow
def test_two_processes_try_together(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "synthcube", "train", "-c", str(tiny_config()), "-d", str(phantoms),
         "-o", str(tmp_path / "run"), "--debug", "--set", "compute.num_devices=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("All of it works") == 1
    assert not (tmp_path / "run").exists()
