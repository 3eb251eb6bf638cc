"""The benches run, and a missed bound is not passed over; their numbers are not judged here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.federation import ARMS
from synthcube.data.manifest import read_manifest
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
        ("processes", "saving", "profile"),
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
def test_the_bench_of_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    words = ("-m", "bench", "gpu", "--device", "cpu", "--quick", "--output", str(page))
    done = run(*words)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text == done.stdout
    assert "failed" not in text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    settings = [(row[1], row[3]) for row in rows if len(row) == 12 and row[1].endswith("tiny")]
    assert settings == [
        ("2D tiny", "bf16"), ("2D tiny", "bf16, channels last"), ("2D tiny", "bf16, compiled"),
        ("3D tiny", "bf16"), ("3D tiny", "bf16, channels last"),
    ]  # fmt: skip
    assert all(float(row[7]) > 0.05 for row in rows if len(row) == 12 and row[2] in "12")
    assert [row[1] for row in rows if len(row) == 6 and row[1].endswith("tiny")] == [
        "2D tiny", "3D tiny",
    ]  # fmt: skip


def test_rows_of_the_bench_of_a_gpu_are_left_out_when_the_time_is_up() -> None:
    script = "from bench.gpu import *; print(*measured(ROWS, None, 0.0, quick=False)[1], sep='; ')"
    left_out = run("-c", script).stdout
    assert left_out.startswith("2D default, 64x64, bf16; 2D default, 256x256, bf16; ")
    assert left_out.count("; ") == 6 * 5 - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_bench_of_a_gpu_says_that_there_is_none() -> None:
    done = run("-m", "bench", "gpu")
    assert done.returncode == 2
    assert "PyTorch sees no NVIDIA GPU here; --device cpu runs it on the CPU" in done.stderr


@pytest.mark.slow
def test_the_curves_of_both_precisions_are_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    done = run("-m", "bench", "--quick", "precision", "--output", str(picture))
    assert done.returncode == 0, done.stderr
    assert "validation loss of each epoch, bf16, seed 0" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def write_classes(folder: Path, *names: str, num: int, side: int) -> None:
    """Write `num` pictures into a folder of each class, below `folder` / data."""
    for seed, name in enumerate(names):
        write_phantoms(folder / name, num=num, size=(side, side), seed=seed)
        (folder / "data" / name).mkdir(parents=True)
        for path in (folder / name).rglob("*.png"):
            path.rename(folder / "data" / name / path.name)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["--seconds", "--steps"])
def test_recipes_are_trained_judged_and_kept(budget: str, tmp_path: Path) -> None:
    """Two recipes of a few CPU-seconds or steps; the second call repeats no trial."""
    pictures = tmp_path / "pictures"
    write_phantoms(pictures, num=60, size=(16, 16))
    (pictures / "manifest.csv").unlink()
    tiny = "model.channels=[8,8] model.num_norm_groups=2 model.num_sampling_steps=2"
    command = [
        "-m", "bench", "quality", "--data", str(pictures), "--work", str(tmp_path / "trials"),
        "--size", "16", "16", budget, "4", "--images", "10",
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
    ending = {"--seconds": "4s", "--steps": "4steps"}[budget]
    kept = tmp_path / "trials" / f"one-{ending}-seed0" / "result.json"
    before = kept.stat().st_mtime_ns
    assert run(*command).returncode == 0
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_classes_that_recipes_draw_are_recognised(tmp_path: Path) -> None:
    write_classes(tmp_path, "a", "b", num=40, side=16)
    done = run(
        "-m", "bench", "quality", "--data", str(tmp_path / "data"), "--paradigm", "custom",
        "--work", str(tmp_path / "trials"), "--size", "16", "16", "--seconds", "4",
        "--images", "20", "--recipe",
        "one: model.channels=[8,8] model.num_norm_groups=2 model.num_sampling_steps=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    heading, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in done.stdout.strip().splitlines()[-4:]
    )
    for row in rows:
        shares = [float(row[heading.index(f"recognised, {name}")]) for name in ("mean", "worst")]
        assert 0 <= shares[1] <= shares[0] <= 1


@pytest.mark.slow
def test_a_federation_of_unlike_sites_is_compared_with_a_training_on_all(tmp_path: Path) -> None:
    write_classes(tmp_path, "a", "b", num=30, side=16)
    done = run(
        "-m", "bench", "federation", "--data", str(tmp_path / "data"), "--epochs", "4",
        "--work", str(tmp_path / "trials"), "--images", "12", "--number", "30",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.strip().splitlines()[-5:]]
    assert rows == [*ARMS, "real images"]
    for name, count in (("alike-averaged-each-epoch", 2), ("a-class-each-averaged-each-epoch", 1)):
        sites = tmp_path / "trials" / name / "run" / "sites"
        assert sorted(path.name for path in sites.iterdir()) == ["site-1", "site-2"]
        for site in sites.iterdir():
            rows = read_manifest(site / "data.csv").rows
            assert len({row.label_name for row in rows}) == count


@pytest.mark.slow
def test_passes_until_the_first_copies_are_counted(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "data", num=120, size=(16, 16))
    (tmp_path / "data" / "manifest.csv").unlink()
    done = run(
        "-m", "bench", "memorisation", "--data", str(tmp_path / "data"), "--numbers", "16",
        "--work", str(tmp_path / "trials"), "--most_steps", "20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number, steps, passes, copies, *_ = done.stdout.strip().splitlines()[-1].strip("| ").split("|")
    assert [int(number), int(steps), int(passes)] == [16, 20, 10]
    assert 0 <= float(copies) <= 1


@pytest.mark.slow
def test_privacy_is_compared_epsilon_by_epsilon(tmp_path: Path) -> None:
    write_classes(tmp_path, "private", "public", num=60, side=32)
    done = run(
        "-m", "bench", "privacy", "--data", str(tmp_path / "data"), "--private", "private",
        "--work", str(tmp_path / "trials"), "--epochs", "1", "--public_epochs", "1",
        "--images", "12",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:4] for line in done.stdout.strip().splitlines()[-7:]]
    sigma = {name.strip(): cell.strip() for name, cell, _ in rows}
    assert [sigma[name] for name in ("public start", "few weights, not private")] == ["-", "-"]
    noise = [float(sigma[f"few weights, epsilon {epsilon}"]) for epsilon in (10, 3, 1)]
    assert noise == sorted(noise)
    assert noise[0] < noise[2]


@pytest.mark.slow
def test_a_plan_is_held_to_what_it_said(tmp_path: Path) -> None:
    done = run(
        "-m", "bench", "plan", "--pictures", str(tmp_path), "--volumes", str(tmp_path),
        "--work", str(tmp_path / "trials"), "--minutes", "0.1", "--sets", "four channels",
        "--images", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, _, seconds, _, memory, *_ = (
        cell.strip() for cell in done.stdout.strip().splitlines()[-1].strip("|").split("|")
    )
    assert name == "four channels"
    assert all(float(part.split()[0]) > 0 for part in [*seconds.split(","), *memory.split(",")])
