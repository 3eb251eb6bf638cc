"""Trainings that are killed or told to stop, at any step, and end as if nothing had been."""

from __future__ import annotations

import csv
import errno
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from synthcube.errors import ConfigError, OutputError, PreemptedError
from synthcube.models import registry
from synthcube.tasks.train import train
from synthcube.training import checkpoints, pictures
from synthcube.training.preemption import Preemption

# Eight images to train on: four steps in each of two epochs.
COMMON = ["training.batch_size=2", "training.checkpoint_every_n_minutes=1e-6"]
At = Callable[[Any, int], None]


def child(work: Callable[[], object]) -> int:
    """Do that in a process of its own; returns how it ended, as `os.waitstatus_to_exitcode`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        work()
        code = 0
    except PreemptedError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def signalled(number: signal.Signals, step: int) -> None:
    """From now on this process gets the signal once that many batches were trained on."""
    ended = checkpoints.MidEpochCheckpoint.on_train_batch_end

    def then(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == step and number != signal.SIGKILL:
            os.kill(os.getpid(), number)
        ended(self, trainer, *args)
        if trainer.fit_loop.total_batch_idx + 1 == step:
            os.kill(os.getpid(), number)

    checkpoints.MidEpochCheckpoint.on_train_batch_end = then  # type: ignore[method-assign]


def interrupted(
    config: Path, data: Path, run: Path, overrides: list[str], number: signal.Signals, step: int
) -> int:
    def work() -> None:
        signalled(number, step)
        train(config, data, run, overrides=overrides)

    return child(work)


def assert_equal(straight: Path, other: Path) -> None:
    """All that a training leaves is the same, to the bit."""
    states = [checkpoints.load(run / "checkpoints" / "last.ckpt") for run in (straight, other)]
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        _assert_same(states[0][key], states[1][key], key)
    assert states[0]["global_step"] == states[1]["global_step"]
    assert epochs(straight) == epochs(other)


def _assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def epochs(run: Path) -> list[tuple[str, str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [(row["step"], row.get("train/loss", ""), row.get("validation/loss", ""))
                for row in csv.DictReader(file)]  # fmt: skip
    return [row for row in rows if row[1] or row[2]]


@pytest.mark.slow
@pytest.mark.parametrize("family", registry.names())
def test_a_training_killed_within_epochs_ends_with_the_same_bits(
    family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config = tiny_config(family)
    train(config, phantoms, tmp_path / "straight", overrides=COMMON)
    for step in (3, 6):
        code = interrupted(config, phantoms, tmp_path / "run", COMMON, signal.SIGKILL, step)
        assert code == -signal.SIGKILL
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        assert checkpoints.reached(last)[0] == step // 4
    train(config, phantoms, tmp_path / "run", overrides=COMMON)
    assert_equal(tmp_path / "straight", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 9))
def test_a_signal_at_any_step_saves_and_ends_with_code_75(
    step: int, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """Steps 4 and 8 are the last of an epoch, whose validation is still to come."""
    overrides = ["training.batch_size=2"]
    config = tiny_config()
    train(config, phantoms, tmp_path / "straight", overrides=overrides)
    run = tmp_path / "run"
    assert interrupted(config, phantoms, run, overrides, signal.SIGUSR1, step) == 75
    last = run / "checkpoints" / "last.ckpt"
    assert checkpoints.reached(last) == ((step - 1) // 4, step)
    train(config, phantoms, run, overrides=overrides)
    assert_equal(tmp_path / "straight", run)


@pytest.mark.parametrize("family", ["rectified_flow", "dcgan"])
def test_a_signal_amid_an_accumulation_waits_for_its_end(
    family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    overrides = ["training.batch_size=2", "training.accumulate=2"]
    config, run = tiny_config(family), tmp_path / "run"
    train(config, phantoms, tmp_path / "straight", overrides=overrides)
    assert interrupted(config, phantoms, run, overrides, signal.SIGTERM, 3) == 75
    loops = checkpoints.load(run / "checkpoints" / "last.ckpt")["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["completed"] == 4
    train(config, phantoms, run, overrides=overrides)
    assert_equal(tmp_path / "straight", run)


@pytest.mark.slow
def test_a_signal_in_a_validation_does_not_wait_for_its_end(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    overrides = ["training.batch_size=2", "data.validation_fraction=0.4"]
    train(config, phantoms, tmp_path / "straight", overrides=overrides)

    def work() -> None:
        ended = checkpoints.MidEpochCheckpoint.on_validation_batch_end

        def then(self: Any, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            ended(self, *args)

        checkpoints.MidEpochCheckpoint.on_validation_batch_end = then  # type: ignore[method-assign]
        train(config, phantoms, run, overrides=overrides)

    assert child(work) == 75
    assert not epochs(run), "the validation was broken off"
    train(config, phantoms, run, overrides=overrides)
    assert_equal(tmp_path / "straight", run)


@pytest.mark.slow
def test_a_signal_breaks_off_a_picture_but_not_the_training_of_the_epoch(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    overrides = ["training.batch_size=2"]
    train(config, phantoms, tmp_path / "straight", overrides=overrides)

    def work() -> None:
        def drawing(self: Any, module: Any) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGUSR1)
            raise AssertionError("drew on")

        pictures.SamplePictures._columns = drawing  # type: ignore[method-assign]
        train(config, phantoms, run, overrides=overrides)

    assert child(work) == 75
    assert checkpoints.reached(run / "checkpoints" / "last.ckpt") == (1, 5)
    train(config, phantoms, run, overrides=overrides)
    assert_equal(tmp_path / "straight", run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["data.num_workers=1"],
        ["data.validation_fraction=0"],
        ["training.validate_every_n_epochs=2"],
        ["model.scheduler={name: reduce_on_plateau, patience: 0, threshold: 10.0}",
         "data.validation_fraction=0"],
        ["model.autoguidance_from=0.4"],
    ],
    ids=["workers", "no validation", "epochs without validation", "plateau", "autoguidance"],
)  # fmt: skip
@pytest.mark.parametrize("step", [2, 4])
def test_whatever_the_training_it_goes_on_exactly(
    overrides: list[str], step: int, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    overrides = [*overrides, "training.batch_size=2", "training.max_epochs=3"]
    train(config, phantoms, tmp_path / "straight", overrides=overrides)
    assert interrupted(config, phantoms, run, overrides, signal.SIGUSR1, step) == 75
    train(config, phantoms, run, overrides=overrides)
    assert_equal(tmp_path / "straight", run)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed from outside, at any moment: also while a checkpoint is being written."""
    config, run = tiny_config(), tmp_path / "run"
    overrides = [*COMMON, "training.max_epochs=40", "training.sample_every_n_epochs=20"]
    began = time.monotonic()
    train(config, phantoms, tmp_path / "straight", overrides=overrides)
    whole = time.monotonic() - began
    monkeypatch.setattr(checkpoints, "_SMALL_BYTES", 0)  # written by a thread
    moments = random.Random(0)
    kills = 0
    while kills < 20:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            try:
                train(config, phantoms, run, overrides=overrides)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.02, 0.12) * whole)
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            break
        kills += 1
    assert kills >= 10, "it was finished before it was killed"
    train(config, phantoms, run, overrides=overrides)
    assert_equal(tmp_path / "straight", run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_other_rates_are_taken_over_when_they_are_accepted(
    tiny_config, phantoms: Path, tmp_path: Path, caplog
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    constant = "model.scheduler={name: constant_with_warmup, warmup_steps: 0}"
    train(config, phantoms, run, overrides=[constant])
    more = [constant, "training.max_epochs=3", "model.optimizer.lr=0.0125"]
    with pytest.raises(ConfigError, match=r"or --accept_changes to go on with these"):
        train(config, phantoms, run, overrides=more)
    with caplog.at_level("WARNING", "synthcube"):
        train(config, phantoms, run, overrides=more, accept_changes=True)
    assert "Continuing with other values: model.optimizer.lr: was 0.002, is 0.0125" in caplog.text
    with (run / "metrics.csv").open(newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    assert rates == pytest.approx([0.002] * 4 + [0.0125] * 2)


def test_what_no_checkpoint_can_be_continued_with_is_refused(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    train(config, phantoms, run)
    for override, text in (
        ("model.optimizer={name: sgd, lr: 0.1}", r"another one, or the same values:"),
        ("model.channels=[16, 16]", r"does not fit .*last.ckpt:"),
    ):
        with pytest.raises(ConfigError, match=text):
            train(
                config, phantoms, run, accept_changes=True,
                overrides=[override, "training.max_epochs=3"],
            )  # fmt: skip


def test_a_signal_before_the_first_step_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with (
        pytest.raises(PreemptedError, match=r"^SIGUSR1 came between steps: nothing is lost"),
        Preemption(["SIGUSR1"]).listening(),
    ):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_processes_on_gpus_ask_each_other_now_and_then_whatever_is_accumulated(
    accumulate: int,
) -> None:
    """Not at every step, for they would wait; and not at the epoch's last one alone."""
    asked: list[int] = []
    trainer = SimpleNamespace(
        world_size=2, is_last_batch=False,
        strategy=SimpleNamespace(
            root_device=torch.device("meta"),
            reduce=lambda *_, **__: asked.append(1) or torch.zeros(2),
        ),
    )  # fmt: skip
    callback = checkpoints.MidEpochCheckpoint(
        Path("last.ckpt"), Preemption(()), accumulate=accumulate, every_n_minutes=None,
        restore_weights=lambda *_: None,
    )  # fmt: skip
    for batch_idx in range(60 * accumulate):
        callback.on_train_batch_end(trainer, None, None, None, batch_idx)
    assert len(asked) == 6


def test_who_presses_twice_is_heard_at_once() -> None:
    with Preemption(["SIGINT"]).listening() as preemption, preemption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.heard == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_last_checkpoint_is_of_the_last_validation_not_of_the_last_improvement(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    """Where nothing improves after the first epoch, as Lightning would keep that one alone."""
    run, reached = tmp_path / "run", []

    def note(self: Any, trainer: Any, module: Any) -> None:
        saved(self, trainer, module)
        reached.append(checkpoints.reached(run / "checkpoints" / "last.ckpt")[0])

    saved = checkpoints.BestAndLast.on_train_epoch_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.BestAndLast, "on_train_epoch_end", note)
        worst = ["training.max_epochs=3", "training.best={metric: validation/loss, mode: max}"]
        train(tiny_config(), phantoms, run, overrides=worst)
        assert checkpoints.reached(run / "checkpoints" / "best.ckpt")[0] == 1
        assert reached == [1, 2, 3]
        shutil.rmtree(run)
        reached.clear()
        train(
            tiny_config("dcgan"), phantoms, run,
            overrides=["training.max_epochs=3", "data.validation_fraction=0"],
        )  # fmt: skip
    assert reached == [1, 2, 3]
    assert not (run / "checkpoints" / "best.ckpt").exists()


def test_what_is_saved_is_what_it_was_when_the_training_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by a thread, from a copy; the same file twice where it is the best and the last."""
    monkeypatch.setattr(checkpoints, "_SMALL_BYTES", 0)
    first, second = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    weight, writer = torch.ones(1000, 1000), checkpoints.AtomicCheckpointIO()
    for number in range(3):
        weight.fill_(number)
        writer.save_checkpoint({"state_dict": {"weight": weight}}, first)
        writer.repeat(first, second)
        weight.fill_(-1)
        writer.finish()
        for path in (first, second):
            assert (checkpoints.load(path)["state_dict"]["weight"] == number).all()
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}
    writer.save_checkpoint({"state_dict": {"weight": weight}}, tmp_path / "gone" / "last.ckpt")
    writer.finish()
    monkeypatch.setattr(checkpoints.torch, "save", _full)
    writer.save_checkpoint({"state_dict": {"weight": weight}}, first)
    with pytest.raises(OutputError, match=r"best.ckpt: the disk is full\. What was there before"):
        writer.teardown()
    assert (checkpoints.load(first)["state_dict"]["weight"] == 2).all()


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_checkpoint_of_a_gpu_is_read_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lightning reads it to resume: several processes must not all fill the first GPU."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:7")
    torch.save({"weight": torch.ones(2)}, tmp_path / "gpu.ckpt")
    content = checkpoints.AtomicCheckpointIO().load_checkpoint(tmp_path / "gpu.ckpt")
    mapped = checkpoints.load(tmp_path / "gpu.ckpt", mapped=True)
    assert content["weight"].device.type == mapped["weight"].device.type == "cpu"
