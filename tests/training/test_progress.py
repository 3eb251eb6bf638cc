"""Where the time of a training went, and the advice that follows from it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from synthcube import environment, plugins
from synthcube.errors import NonFiniteLossError
from synthcube.tasks.train import train
from synthcube.training import progress
from synthcube.training.config import TrainingConfig

SLOW = '''
import time
import torchio as tio

class Dreaming(tio.Transform):
    """A transform that waits 50 ms."""
    def apply_transform(self, subject):
        time.sleep(0.05)
        return subject
'''
PARTS = {"step", "data_wait", "data_start", "validation", "pictures", "saving", "rest"}


def account(run: Path) -> dict:
    return json.loads((run / "throughput.json").read_text())


@pytest.fixture
def slow_images(tmp_path: Path) -> str:
    """The override that makes every image take 50 ms."""
    (tmp_path / "dreams.py").write_text(SLOW)
    plugins.vouch([tmp_path])
    return 'data.augmentation=[{name: "dreams:Dreaming"}]'


def test_slow_images_are_noticed_and_what_to_change_is_said(
    tiny_config, phantoms: Path, tmp_path: Path, slow_images: str, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(environment, "num_cores", lambda: 8)
    run = tmp_path / "run"
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, run, overrides=[slow_images, "training.max_epochs=3"])
    (part,) = account(run)["parts"]
    seconds = part["seconds"]
    assert seconds["data_wait"] + seconds["data_start"] >= 6 * 4 * 0.05, "6 batches of 4 images"
    assert seconds["data_start"] >= 3 * 4 * 0.05, "the first batch of 3 epochs"
    assert part["data_wait_percent"] > 25, "or more, on a machine that does nothing else"
    assert "Waiting for data took" in caplog.text
    assert "data.num_workers=" in caplog.text
    assert "instead of 0; each training process has 8 cores" in caplog.text
    advice = r"cheaper data\.augmentation: it takes (\d+)\.\d ms per image, of which "
    advice += r"dreams:Dreaming takes (\d+)\.\d ms: remove it"
    costs = re.search(advice, caplog.text)
    assert costs
    assert all(int(number) >= 50 for number in costs.groups())


def test_fast_images_bring_no_advice(tiny_config, phantoms: Path, tmp_path: Path, caplog) -> None:
    began = time.monotonic()
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, tmp_path / "run",
              overrides=["training.sample_every_n_epochs=0", "training.max_epochs=4"])  # fmt: skip
    took = time.monotonic() - began
    (part,) = account(tmp_path / "run")["parts"]
    assert "Waiting for data" not in caplog.text
    assert "Where the time went" in caplog.text
    assert set(part["seconds"]) == PARTS
    assert part["seconds"]["step"] > 0
    assert part["seconds"]["validation"] > 0
    assert part["seconds"]["saving"] > 0
    assert part["seconds"]["pictures"] < 0.01
    assert sum(part["seconds"].values()) <= took, "each moment is booked once"


def test_a_resumed_run_adds_to_the_account(tiny_config, phantoms, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(), phantoms, run, overrides=["model.scheduler=null"])
    train(tiny_config(), phantoms, run, overrides=["model.scheduler=null", "training.max_epochs=3"])
    report = account(run)
    assert [part["steps"] for part in report["parts"]] == [4, 2]
    assert report["total"]["steps"] == 6
    for name in PARTS:
        parts = sum(part["seconds"][name] for part in report["parts"])
        assert report["total"]["seconds"][name] == pytest.approx(parts, abs=2e-3)


def test_an_interrupted_training_accounts_for_its_time(
    tiny_config, phantoms, tmp_path: Path, caplog
) -> None:
    stopped, failed = tmp_path / "stopped", tmp_path / "failed"
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, stopped, overrides=["training.max_minutes=0.0001"])
    assert account(stopped)["total"]["steps"] < 4
    assert "Where the time went" in caplog.text
    with pytest.raises(NonFiniteLossError):
        train(tiny_config(), phantoms, failed, overrides=[
            "model.optimizer.lr=1e6", "training.gradient_clip_norm=null",
            "training.max_epochs=20", "model.scheduler=null",
        ])  # fmt: skip
    assert account(failed)["total"]["steps"] > 0


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("pictures", "Sample pictures took 50% of the time: training.sample_every_n_epochs=100"),
        ("saving", "Saving checkpoints took 50% of the time: training.validate_every_n_epochs=20"),
        ("validation", ""),
    ],
)
def test_slow_pictures_and_checkpoints_are_noticed(part: str, text: str) -> None:
    seconds = {"step": 10.0, "pictures": 0.0, "saving": 0.0} | {part: 10.0}
    lines = progress.writing_advice(seconds, TrainingConfig())
    assert [line[: len(text)] for line in lines] == ([text] if text else [])


def test_the_innermost_part_gets_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each action that starts or stops, in the order of Lightning."""
    seconds = iter(range(100))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(seconds)))
    profiler = progress.TimeProfiler("Model", "SamplePictures")
    fetch = "[_TrainingEpochLoop].train_dataloader_next"
    profiler.start("run_training_epoch")
    for _ in range(2):
        profiler.start(fetch)
        profiler.stop(fetch)
        profiler.start("[Callback]Other.on_train_batch_start")  # not ours to count
    profiler.start("[LightningModule]Model.on_validation_model_zero_grad")
    profiler.stop("[LightningModule]Model.on_validation_model_zero_grad")
    profiler.stop("[LightningModule]Model.on_validation_end")
    profiler.stop("run_training_epoch")
    with profiler.profile("[Callback]SamplePictures.on_train_epoch_end"):
        pass
    with profiler.profile("save_checkpoint"):
        pass
    assert profiler.close() == 13
    assert profiler.seconds == {
        "rest": 4, "data_start": 2, "step": 3, "data_wait": 1, "validation": 1, "pictures": 1,
        "saving": 1,
    }  # fmt: skip


def test_processes_report_the_longest_wait() -> None:
    profiler = progress.TimeProfiler("Model", "SamplePictures")
    profiler.seconds |= {"step": 9.8, "data_wait": 0.2}
    assert profiler.data_share == pytest.approx(0.02)
    profiler.others_wait_more_s = 0.8
    assert profiler.data_share == pytest.approx(0.1)
