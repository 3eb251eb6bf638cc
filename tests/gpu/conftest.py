"""Tests that need an NVIDIA GPU; `--gpu-tests-on cpu` runs them on the CPU to test the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

LIMIT_S = 500


@pytest.fixture(scope="session")
def accelerator(pytestconfig: pytest.Config) -> str:
    """The value of compute.accelerator for these tests."""
    name: str = pytestconfig.getoption("--gpu-tests-on")
    if name == "gpu" and not torch.cuda.is_available():
        pytest.skip("PyTorch sees no NVIDIA GPU (torch.cuda.is_available() is false)")
    return name


@pytest.fixture(scope="session")
def device(accelerator: str) -> torch.device:
    return torch.device("cuda" if accelerator == "gpu" else "cpu")


@pytest.fixture
def train_here(accelerator: str, phantoms: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains in this process, on one device; returns the run folder of that name.

    On one, because Lightning would start the others as copies of this process, which is pytest.
    """
    from synthcube.tasks.train import train

    def run(config: Path, name: str, *overrides: str) -> Path:
        place = [f"compute.accelerator={accelerator}", "compute.num_devices=1"]
        train(config, phantoms, tmp_path / name, overrides=[*place, *overrides])
        return tmp_path / name

    return run


@pytest.fixture
def train_apart(accelerator: str, phantoms: Path, tmp_path: Path):
    """Trains in a process of its own, for what changes a process for good; returns how it ended.

    Args of what it returns: those of `train_here`, and code to run before the training.
    """

    def run(
        config: Path, name: str, *overrides: str, before: str = ""
    ) -> subprocess.CompletedProcess[str]:
        words = [f"compute.accelerator={accelerator}", *overrides]
        options = [part for word in words for part in ("--set", word)]
        # Lightning starts further processes with -m again, which it cannot do with -c.
        code = f"{before}\nfrom synthcube.__main__ import main\nmain()"
        start = ["-c", code] if before else ["-m", "synthcube"]
        return subprocess.run(
            [sys.executable, *start, "train", "-c", str(config), "-d", str(phantoms),
             "-o", str(tmp_path / name), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=LIMIT_S,
        )  # fmt: skip

    return run
