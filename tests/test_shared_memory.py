"""Workers hand over their batches in shared memory, of which a container has little."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from synthcube import environment

BATCH = 10_000_000


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    def have(free_bytes: int) -> None:
        monkeypatch.setattr(
            environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_bytes)
        )

    return have


@pytest.mark.parametrize(
    ("free_bytes", "fitting"),
    [(1_000_000_000, 4), (90_000_000, 4), (89_000_000, 3), (64_000_000, 2), (30_000_000, 1),
     (29_000_000, 0), (0, 0)],
)  # fmt: skip
def test_workers_are_as_many_as_fit(free, tmp_path: Path, free_bytes: int, fitting: int) -> None:
    free(free_bytes)
    assert environment.workers_that_fit(4, BATCH, tmp_path) == fitting


def test_fewer_workers_are_told(free, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free(64_000_000)
    with caplog.at_level(logging.INFO, "synthcube"):
        environment.workers_that_fit(4, BATCH, tmp_path)
    assert "2 instead of 4 workers" in caplog.text
    assert "64.0 MB free, they need 90.0 MB" in caplog.text
    assert "--shm-size" in caplog.text


def test_enough_is_not_told(free, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free(1_000_000_000)
    with caplog.at_level(logging.INFO, "synthcube"):
        environment.workers_that_fit(4, BATCH, tmp_path)
    assert caplog.text == ""


def test_no_workers_and_no_shared_memory_change_nothing(tmp_path: Path) -> None:
    assert environment.workers_that_fit(0, BATCH, tmp_path) == 0
    assert environment.workers_that_fit(4, BATCH, tmp_path / "missing") == 4
