"""The benches run, and a missed bound is not passed over; their numbers are not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from synthcube.data.phantom import write_phantoms

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ("Row('a', 1.0, '', at_most=1.0)", 0),
        ("Row('a', 1.1, '', at_most=1.0)", 1),
        ("Row('a', 0.9, '', at_least=1.0)", 1),
        ("Row('a', 0.9, '', at_least=0.95, at_most=1.05)", 1),
        ("Row('a', float('nan'), '', at_most=1.0)", 1),
        ("Row('a', 9.0, '')", 0),
    ],
)
def test_a_missed_bound_is_an_error(row: str, code: int) -> None:
    script = f"from bench.report import *; raise SystemExit(exit_code([{row}], Options()))"
    assert run("-c", script).returncode == code


def test_an_unknown_bench_is_named() -> None:
    done = run("-m", "bench", "speed")
    assert done.returncode == 2
    assert "there is no bench speed" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("startup", "data_path"),
        ("train_step",),
        ("processes", "saving"),
        ("gan_step", "vqvae_step"),
        ("sampling", "memory"),
        ("evaluation",),
        ("runtimes",),
        ("manifest",),
    ],
)
def test_benches_run(names: tuple[str, ...]) -> None:
    done = run("-m", "bench", "--quick", *names)
    assert done.returncode == 0, done.stderr
    heading, rule, *rows = done.stdout.splitlines()
    assert heading == "| name | measured | bound | verdict |"
    assert set(rule) <= set("| -")
    assert len(rows) >= 2 or names == ("sampling", "memory")
    assert all(row.count("|") == 5 for row in rows)


@pytest.mark.slow
def test_the_curves_of_both_precisions_are_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    done = run("-m", "bench", "--quick", "precision", "--output", str(picture))
    assert done.returncode == 0, done.stderr
    assert "validation loss of each epoch, bf16, seed 0" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_recipes_are_trained_judged_and_kept(tmp_path: Path) -> None:
    """Two recipes of a few CPU-seconds; the second call repeats no trial."""
    pictures = tmp_path / "pictures"
    write_phantoms(pictures, num=60, size=(16, 16))
    (pictures / "manifest.csv").unlink()
    tiny = "model.channels=[8,8] model.num_norm_groups=2 model.num_sampling_steps=2"
    command = [
        "-m", "bench", "quality", "--data", str(pictures), "--work", str(tmp_path / "trials"),
        "--size", "16", "16", "--seconds", "4", "--images", "10",
        "--recipe", f"one: {tiny}", "--recipe", f"two: {tiny} training.batch_size=8",
    ]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    heading, _, *rows = done.stdout.strip().splitlines()[-5:]
    assert heading.startswith("| recipe | steps | loss | kernel distance | precision |")
    assert [row.split("|")[1].strip() for row in rows] == ["one", "two", "real images"]
    assert (tmp_path / "trials" / "sheet.png").exists()
    judge = (tmp_path / "trials" / "judge.csv").read_text().splitlines()
    trained = (tmp_path / "trials" / "train.csv").read_text().splitlines()
    assert len(judge) == 12 + 1
    assert not {*judge[1:]} & {*trained[1:]}
    kept = tmp_path / "trials" / "one-4s-seed0" / "result.json"
    before = kept.stat().st_mtime_ns
    assert run(*command).returncode == 0
    assert kept.stat().st_mtime_ns == before
