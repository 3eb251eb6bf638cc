"""A disk that is really full: a small tmpfs, where this machine lets us mount one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from synthcube.errors import OutputError
from synthcube.models import artifact
from synthcube.tasks import run_folder
from synthcube.tasks.export import export
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train
from synthcube.training import checkpoints


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # errors keep files mapped


def fill(disk: Path) -> None:
    try:
        with (disk / "filler").open("wb") as file:
            while True:
                file.write(b"0" * 4096)
                file.flush()
    except OSError:
        pass


@pytest.mark.slow
def test_wherever_a_training_fills_the_disk_it_says_so(
    small_disk: Path, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """torch, the table, the split and the pictures each fail in their own way."""
    whole = tmp_path / "whole"
    train(tiny_config(), phantoms, whole)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    blamed = set()
    for number in range(6):
        run = small_disk / "run"
        fill(small_disk)
        with (small_disk / "filler").open("r+b") as file:
            file.truncate(file.seek(0, 2) - size * number // 6)
        with pytest.raises(OutputError, match=r"Cannot write .*: the disk is full\.") as raised:
            train(tiny_config(), phantoms, run)
        blamed.add(Path(str(raised.value).split("Cannot write ")[1].split(": ")[0]).suffix)
        (small_disk / "filler").unlink()
        left = [path.name for path in run.rglob(".synthcube-*")]
        assert not left
        assert train(tiny_config(), phantoms, run)
        shutil.rmtree(run)
    assert {".ckpt"} < blamed, blamed


def test_a_full_disk_leaves_the_last_good_state(
    small_disk: Path, tiny_config, phantoms: Path
) -> None:
    run = small_disk / "run"
    train(tiny_config(), phantoms, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fill(small_disk)
    with pytest.raises(OutputError, match=r"Cannot write .*: the disk is full\."):
        train(tiny_config(), phantoms, run, overrides=["training.max_epochs=4"])
    kept = {path for path in before if path.name not in ("metrics.csv", "config.yaml")}
    assert all(path.read_bytes() == before[path] for path in kept)
    left = [path.name for path in run.rglob(".*") if path.is_file()]
    assert left == [run_folder.LOCK], "half-written files are left"
    assert artifact.load(run)
    for task in (
        lambda out: export(run, out),
        lambda out: infer(InferRequest(run, out, num_images=2)),
    ):
        with pytest.raises(OutputError, match="the disk is full"):
            task(small_disk / "out")
    (small_disk / "filler").unlink()
    train(tiny_config(), phantoms, run, overrides=["training.max_epochs=4"])
    assert checkpoints.reached(run / "checkpoints" / "last.ckpt")[0] == 4
    assert load_file(run / "artifact" / "weights.safetensors")
