"""What a run is continued with: its own checkpoint, config and images, or a sentence why not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube.errors import ConfigError
from synthcube.models import artifact
from synthcube.tasks.train import train
from synthcube.training import checkpoints

CONSTANT = "model.scheduler={name: constant_with_warmup, warmup_steps: 0}"
CHANGES = ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree")


def killed_after_last_checkpoint(work: Callable[[], object], epochs: int, operation: int) -> bool:
    """Whether that was killed, at this change of the folder after its last checkpoint is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        written, changes = 0, 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal written, changes
            if event == "os.kill":
                return
            if written == epochs:
                changes += event in CHANGES
            elif event == "os.rename" and str(arguments[1]).endswith("last.ckpt"):
                written += 1
            if changes > operation:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def two_epochs(tiny_config, phantoms: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains a family for two epochs."""

    def trained(family: str) -> Path:
        run = tmp_path / "begun"
        train(tiny_config(family), phantoms, run, overrides=[CONSTANT])
        return run

    return trained


def assert_of_one_training(run: Path) -> None:
    """The artifact is of the best checkpoint of the run, or else its last, and of its config."""
    best, last = (run / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    expected = checkpoints.weights(best if best.exists() else last)
    weights = load_file(run / "artifact" / "weights.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert (run / "artifact" / "config.yaml").read_text() == (run / "config.yaml").read_text()
    artifact.load(run)


# dcgan keeps no best checkpoint
@pytest.mark.parametrize(
    ("family", "operations"),
    [pytest.param("rectified_flow", (0, 4, 9), marks=pytest.mark.slow), ("dcgan", (0, 7))],
)
def test_a_kill_after_the_last_checkpoint_leaves_no_stale_model(
    family: str, operations: tuple[int, ...], two_epochs, tiny_config, phantoms, tmp_path: Path
) -> None:
    begun, run, config = two_epochs(family), tmp_path / "run", tiny_config(family)
    for operation in operations:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(begun, run)

        def again() -> None:
            train(config, phantoms, run, overrides=[CONSTANT, "training.max_epochs=4"])

        assert killed_after_last_checkpoint(again, 2, operation)
        again()
        assert checkpoints.reached(run / "checkpoints" / "last.ckpt")[0] == 4
        assert_of_one_training(run)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rectified_flow", "dcgan"])
def test_no_kill_after_the_last_checkpoint_leaves_a_stale_model(
    family: str, two_epochs, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """One training is copied before each change; a copy is what a kill there leaves behind.

    Kills that leave the same files behind are tried once.
    """
    run, config, kills = two_epochs(family), tiny_config(family), tmp_path / "kills"
    kills.mkdir()

    def files(folder: Path) -> dict[Path, bytes | None]:
        return {path.relative_to(folder): path.read_bytes() if path.is_file() else None
                for path in folder.rglob("*")}  # fmt: skip

    def again() -> None:
        train(config, phantoms, run, overrides=[CONSTANT, "training.max_epochs=4"])

    def copied() -> None:
        written, is_copying = 0, False

        def copy(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal written, is_copying
            if is_copying or event not in CHANGES:
                return
            if written == 2:
                is_copying = True
                shutil.copytree(run, kills / f"{len(list(kills.iterdir())):03d}")
                is_copying = False
            elif event == "os.rename" and str(arguments[1]).endswith("last.ckpt"):
                written += 1

        sys.addaudithook(copy)
        again()
        (kills / "end").mkdir()

    assert not killed_after_last_checkpoint(copied, 2, sys.maxsize)
    (kills / "end").rmdir()
    copies = sorted(kills.iterdir())
    assert len(copies) >= 10
    tried: list[dict[Path, bytes | None]] = []
    for killed in copies:
        if files(killed) in tried:
            continue
        tried.append(files(killed))
        shutil.rmtree(run)
        killed.rename(run)
        again()
        assert checkpoints.reached(run / "checkpoints" / "last.ckpt")[0] == 4
        assert_of_one_training(run)


def test_a_complete_run_gets_the_artifact_of_its_config(
    two_epochs, tiny_config, phantoms: Path
) -> None:
    run = two_epochs("rectified_flow")
    train(tiny_config(), phantoms, run, overrides=[CONSTANT, "sampling.num_images=3"])
    assert "num_images: 3" in (run / "artifact" / "config.yaml").read_text()
    assert_of_one_training(run)


def test_a_fingerprint_reads_no_weights(tmp_path: Path) -> None:
    """It knows content from the check sums in the file, not from its name or its time."""
    one, same, other = (tmp_path / f"{name}.ckpt" for name in ("one", "same", "other"))
    torch.save({"weight": torch.ones(1000), "step": 1}, one)
    torch.save({"weight": torch.ones(1000), "step": 1}, same)
    torch.save({"weight": torch.zeros(1000), "step": 1}, other)
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(same)
    assert checkpoints.fingerprint(one) != checkpoints.fingerprint(other)
    os.truncate(tmp_path / "one.ckpt", one.stat().st_size)  # unchanged
    start = one.read_bytes().index(torch.ones(1000).numpy().tobytes())
    with one.open("r+b") as file:
        file.seek(start)
        file.write(b"\0" * 4000)
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(same)


# -- --resume PATH -----------------------------------------------------------------------------


def test_what_is_no_checkpoint_to_continue_is_called_by_its_name(
    two_epochs, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run, out = two_epochs("rectified_flow"), tmp_path / "out"
    state = checkpoints.weights(run / "checkpoints" / "last.ckpt")
    torch.save(state, tmp_path / "state.pt")
    torch.save({"state_dict": state}, tmp_path / "wrapped.ckpt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "text.ckpt").write_text("not at all")
    for path, what in (
        (run / "artifact" / "weights.safetensors", "these are weights alone, without the state"),
        (tmp_path / "state.pt", "it holds weights, or something else, without the state"),
        (tmp_path / "wrapped.ckpt", "it holds weights, or something else, without the state"),
        (tmp_path / "old.pth", "this is not a file of PyTorch"),
        (tmp_path / "text.ckpt", "this is not a file of PyTorch"),
    ):
        with pytest.raises(ConfigError, match=rf"^--resume {path}: {what}") as caught:
            train(tiny_config(), phantoms, out, overrides=[CONSTANT], resume=str(path))
        assert "training.start_from" in str(caught.value)
        assert "damaged" not in str(caught.value)
    assert not out.exists()


def test_a_complete_checkpoint_of_another_run_is_called_complete(
    two_epochs, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run, out = two_epochs("rectified_flow"), tmp_path / "out"
    last = run / "checkpoints" / "last.ckpt"
    with pytest.raises(
        ConfigError, match=r"last.ckpt: its training is complete; raise training.max_epochs"
    ):
        train(tiny_config(), phantoms, out, overrides=[CONSTANT], resume=str(last))
    assert not out.exists()
    more = [CONSTANT, "training.max_epochs=3"]
    train(tiny_config(), phantoms, out, overrides=more, resume=str(last))
    assert checkpoints.reached(out / "checkpoints" / "last.ckpt")[0] == 3
    assert train(tiny_config(), phantoms, run, overrides=[CONSTANT], resume=str(last))


# -- images ------------------------------------------------------------------------------------


def test_a_run_is_not_continued_on_changed_images(
    two_epochs, tiny_config, phantoms: Path, tmp_path: Path, caplog
) -> None:
    run, more = two_epochs("rectified_flow"), [CONSTANT, "training.max_epochs=3"]
    images = sorted(phantoms.rglob("*.png"))
    before = {path: path.read_bytes() for path in (run).rglob("*") if path.is_file()}
    original = images[3].read_bytes()
    shutil.copyfile(images[4], images[3])
    with pytest.raises(ConfigError, match=r"^1 image has changed since output_path") as caught:
        train(tiny_config(), phantoms, run, overrides=more)
    assert caught.value.faults == (str(images[3]),)
    assert before == {path: path.read_bytes() for path in (run).rglob("*") if path.is_file()}
    with caplog.at_level("WARNING", "synthcube"):
        train(tiny_config(), phantoms, run, overrides=more, accept_changes=True)
    assert f"Continuing on changed images: {images[3]}" in caplog.text
    train(tiny_config(), phantoms, run, overrides=[CONSTANT, "training.max_epochs=4"])
    images[3].write_bytes(original)
    with pytest.raises(ConfigError, match="1 image has changed"):
        train(tiny_config(), phantoms, run, overrides=[CONSTANT, "training.max_epochs=5"])


@pytest.mark.slow
def test_images_may_move_and_an_older_run_knows_no_digests(
    two_epochs, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = two_epochs("rectified_flow")
    moved = phantoms.rename(tmp_path / "moved")
    train(tiny_config(), moved, run, overrides=[CONSTANT, "training.max_epochs=3"])
    digests = json.loads((run / "images.json").read_text())
    assert len(digests) == len(set(digests)) == 12
    (run / "images.json").unlink()
    train(tiny_config(), moved, run, overrides=[CONSTANT, "training.max_epochs=4"])
    assert json.loads((run / "images.json").read_text()) == digests
