"""A training takes the threads with which its steps are fastest, and no more than it has cores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from synthcube import compute, environment
from synthcube.models import registry
from synthcube.schema import ImageSpec
from synthcube.tasks.train import train
from synthcube.training import threads
from synthcube.training.threads import choose_threads, fastest

IMAGE = ImageSpec(
    size=(16, 16),
    channels=1,
    spacing_mm=(1.0, 1.0, 1.0),
    affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
    intensity_range=((0.0, 255.0),),
    file_format="png",
)


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({2: 3.4, 1: 1.4}, 1),  # as measured on a machine that was busy with other work
        ({2: 0.9, 1: 1.4}, 2),
        ({2: 1.0, 1: 0.98}, 2),
        ({8: 1.0, 4: 0.6, 1: 0.9}, 4),
        ({1: 1.0}, 1),
    ],
)
def test_fewer_threads_are_taken_where_they_are_clearly_faster(
    seconds: dict[int, float], expected: int
) -> None:
    assert fastest(seconds) == expected


def cgroup(root: Path, name: str, text: str) -> Path:
    path = root / "sys/fs/cgroup" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_the_quota_of_a_container_counts(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        cgroup(tmp_path, name, text)
    assert environment.num_cores(tmp_path) == expected


def test_torch_gets_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setattr(environment, "num_cores", lambda: 2)
    compute.device("cpu")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("family", ["rectified_flow", "dcgan", "vqvae"])
def test_real_steps_are_measured_and_nothing_else_changes(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "synthcube")
    monkeypatch.setattr(environment, "num_cores", lambda: 4)
    state = torch.get_rng_state()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choose_threads(registry.find(family).tiny(), IMAGE, 2, mixed=False)
    assert torch.get_num_threads() in (1, 2, 4)
    assert torch.equal(torch.get_rng_state(), state), "the weights of the training stay the same"
    assert "of 4 threads (a short step on 4: " in caplog.text


@pytest.mark.parametrize(("variable", "deterministic"), [("3", False), ("", True)])
def test_nothing_is_measured_where_the_number_is_decided(
    variable: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(environment, "num_cores", lambda: 4)
    monkeypatch.setattr(threads, "_measure", lambda *_: pytest.fail("measured"))
    before = torch.get_num_threads()
    choose_threads(
        registry.find("rectified_flow").tiny(), IMAGE, 2, mixed=False, deterministic=deterministic
    )
    assert torch.get_num_threads() == before


def test_a_continued_run_keeps_its_threads(
    tiny_config, phantoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recorded = tmp_path / "run", []
    monkeypatch.setattr(
        threads, "choose_threads", lambda *_, **named: recorded.append(named["recorded"])
    )
    train(tiny_config(), phantoms, run, overrides=["training.max_epochs=1"])
    record = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(record | {"threads": 3}))
    train(tiny_config(), phantoms, run, overrides=["training.max_epochs=2"])
    assert recorded == [None, 3]


def test_recorded_threads_are_set_as_far_as_there_are_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "num_cores", lambda: 2)
    monkeypatch.setattr(threads, "_measure", lambda *_: pytest.fail("measured"))
    choose_threads(registry.find("rectified_flow").tiny(), IMAGE, 2, mixed=False, recorded=3)
    assert torch.get_num_threads() == 2


def test_help_needs_no_torch() -> None:
    code = "import sys, synthcube.compute; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
