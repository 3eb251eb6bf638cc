"""The SIF: sealed as MedPerf seals it, and as a cluster runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from synthcube import __version__

SEALED = ("-eC", "--net", "--network", "none")


@pytest.fixture
def as_root() -> None:
    if os.getuid():
        pytest.skip("singularity gives a network of its own to root alone")


def test_plain(run_tasks, singularity) -> None:
    run_tasks(singularity)


def test_sealed(run_tasks, singularity, as_root) -> None:
    run_tasks(singularity, flags=SEALED, read_only=True)


def test_a_pythonpath_of_the_host_does_not_get_in(
    singularity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit('the library of the host')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = singularity(["families"], {tmp_path: str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_it_tests_itself(sif: Path) -> None:
    done = subprocess.run(["singularity", "test", "-eC", str(sif)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_labels_help_and_size(sif: Path) -> None:
    shown = subprocess.run(
        ["singularity", "inspect", "--json", "--labels", "--helpfile", str(sif)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    attributes = json.loads(shown.stdout)["data"]["attributes"]
    assert attributes["labels"]["org.opencontainers.image.version"] == __version__
    assert "singularity run" in attributes["helpfile"]
    assert sif.stat().st_size <= 700_000_000
