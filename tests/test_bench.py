"""The benches run, and a missed bound is not passed over; their numbers are not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
