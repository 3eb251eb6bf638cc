"""What TensorBoard, W&B and MLflow get of a training, read back as each of them stores it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import PIL.Image
import pytest
import yaml

from synthcube.errors import ConfigError
from synthcube.tasks.train import train
from synthcube.training import loggers as reports
from synthcube.training.config import TrainingConfig
from synthcube.training.loggers import LoggerConfig

EACH_RANK = Path(__file__).parents[1] / "each_rank.py"
LONGER = "training.max_epochs=3"


def logging_to(*names: str) -> list[str]:
    return [f"training.loggers=[{', '.join(names)}]", "model.scheduler=null"]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing may be written to the working directory, nor to the home."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []
    assert list(Path(os.environ["HOME"]).rglob("*")) == []


@pytest.fixture
def events():
    """Reads a TensorBoard folder with its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder: Path) -> EventAccumulator:
        return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()

    return read


def test_tensorboard_shows_curves_pictures_and_config(
    tiny_config, phantoms: Path, tmp_path: Path, events
) -> None:
    run = tmp_path / "run"
    train(tiny_config("dcgan"), phantoms, run, overrides=logging_to("tensorboard"))
    logged = events(run / "logs" / "tensorboard")
    for name in (
        "train/loss_now", "train/discriminator_loss_now", "lr/generator", "lr/discriminator",
        "images_per_second", "data_wait_percent", "memory_gb",
    ):  # fmt: skip
        assert [point.step for point in logged.Scalars(name)] == [1, 2, 3, 4], name
    assert len(logged.Scalars("validation/loss")) == 2
    assert [point.step for point in logged.Images("samples")] == [2, 4]
    with PIL.Image.open(run / "samples" / "epoch_0002.png") as picture:
        last = logged.Images("samples")[-1]
        assert (last.width, last.height) == picture.size
    shown = yaml.safe_load((run / "logs" / "tensorboard" / "hparams.yaml").read_text())
    assert shown["training"]["batch_size"] == 4
    assert "_hparams_/session_start_info" in logged.PluginTagToContent("hparams")


def test_a_resumed_run_goes_on_in_the_same_tensorboard_folder(
    tiny_config, phantoms: Path, tmp_path: Path, events
) -> None:
    """What a killed run logged after its last checkpoint is not there twice."""
    from torch.utils.tensorboard import SummaryWriter

    run, logging = tmp_path / "run", logging_to("tensorboard")
    train(tiny_config(), phantoms, run, overrides=logging)
    with SummaryWriter(str(run / "logs" / "tensorboard")) as killed:
        killed.add_scalar("train/loss_now", 99.0, 5)
    train(tiny_config(), phantoms, run, overrides=[*logging, LONGER])
    points = events(run / "logs" / "tensorboard").Scalars("train/loss_now")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
    assert max(point.value for point in points) < 99


@pytest.mark.slow
def test_wandb_writes_one_run_and_sends_nothing(
    tiny_config, phantoms: Path, tmp_path: Path, caplog
) -> None:
    import wandb

    run, logging = tmp_path / "run", logging_to("wandb")
    with caplog.at_level("INFO", "synthcube"):
        train(tiny_config(), phantoms, run, overrides=logging)
    (folder,) = (run / "logs" / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in caplog.text
    media = (folder / "files" / "media" / "images").glob("samples_*.png")
    ours = [picture.read_bytes() for picture in (run / "samples").glob("epoch_*.png")]
    assert sorted(picture.read_bytes() for picture in media) == sorted(ours)
    assert wandb.run is None, "the next training of this process has a run of its own"
    records = wandb_records(folder)
    rows = [record for record in records if "train/loss_now" in record]
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3, 4]
    train(tiny_config(), phantoms, run, overrides=[*logging, LONGER])
    folders = sorted((run / "logs" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.split("-")[-1] for folder in folders}) == 1, "both parts are one run"


def wandb_records(folder: Path) -> list[dict[str, float]]:
    """Rows of history in an offline run: messages of W&B in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    content, at, message, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record, message = wandb_internal_pb2.Record.FromString(message), b""
            items = record.history.item
            rows.append({item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.slow
def test_mlflow_keeps_one_run_in_a_folder(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run, logging = tmp_path / "run", logging_to("mlflow")
    train(tiny_config(), phantoms, run, overrides=logging)
    train(tiny_config(), phantoms, run, overrides=[*logging, LONGER])
    client = MlflowClient((run / "logs" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("synthcube")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["training.max_epochs"] == "2", "that it began with"
    history = client.get_metric_history(logged.info.run_id, "train/loss_now")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    config = json.loads(
        Path(client.download_artifacts(logged.info.run_id, "config.json")).read_text()
    )
    assert config["training"]["max_epochs"] == 3
    pictures = [entry.path for entry in client.list_artifacts(logged.info.run_id, "samples")]
    assert pictures == [f"samples/epoch_{i:04d}.png" for i in (1, 2, 3)]


def test_a_logger_that_is_not_installed_is_refused_with_its_extra(
    cli, tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "wandb" else find_spec(name, *a),
    )
    code, _, text = cli(
        "train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run",
        "--set", "training.loggers=[wandb]",
    )  # fmt: skip
    assert code == 2
    assert "training.loggers.0" in text
    assert "wandb is not installed here: pip install 'synthcube[wandb]'" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        (["tensorbord"], "'tensorboard', 'wandb' or 'mlflow'"),
        (["mlflow", "mlflow"], "mlflow is there more than once"),
        ([{"name": "tensorboard", "arguments": {"flush": 1}}],
         "no argument 'flush'; it takes .*flush_secs"),
        ([{"name": "tensorboard", "arguments": {"save_dir": "/tmp"}}], "no argument 'save_dir'"),
        ([{"name": "wandb", "arguments": {"projekt": "a"}}], "no argument 'projekt'; .*project"),
        ([{"name": "mlflow", "arguments": {"run_id": "a"}}], "no argument 'run_id'; .*run_name"),
        ([{"name": "wandb", "arguments": {"save_code": True}}], "no argument 'save_code'"),
        ([{"name": "tensorboard", "arguments": {"filename_suffix": "/../../a"}}],
         "filename_suffix is '/../../a': the end of a name is needed, no path"),
        (
            [{"name": "mlflow", "arguments": {"tracking_uri": "https://me:secret@host"}}],
            "holds a password",
        ),
    ],
)  # fmt: skip
def test_bad_loggers_are_refused(loggers: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.model_validate({"loggers": loggers})


def test_arguments_reach_the_logger(tiny_config, phantoms: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    store = (tmp_path / "store").as_uri()
    setting = f"{{name: mlflow, arguments: {{tracking_uri: '{store}', experiment_name: brains}}}}"
    train(tiny_config(), phantoms, tmp_path / "run", overrides=logging_to(setting))
    client = MlflowClient(store)
    (logged,) = client.search_runs([client.get_experiment_by_name("brains").experiment_id])
    assert logged.info.run_name == "run"


def test_a_logger_that_cannot_start_is_the_users_to_mend(
    tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    setting = "{name: mlflow, arguments: {tracking_uri: 'nowhere://x'}}"
    with pytest.raises(ConfigError, match=r"training\.loggers mlflow: .*nowhere"):
        train(tiny_config(), phantoms, tmp_path / "run", overrides=logging_to(setting))


def test_of_two_processes_one_reports(
    tiny_config, phantoms: Path, tmp_path: Path, events, forks
) -> None:
    run = tmp_path / "run"
    setting = "training.loggers=[tensorboard, mlflow, wandb]"
    said = forks.script_together(
        EACH_RANK, tiny_config("dcgan"), phantoms, run, "compute.num_devices=2", setting
    )
    assert len(list((run / "logs" / "tensorboard").glob("events.*"))) == 1
    assert len(list((run / "logs" / "wandb").glob("offline-run-*"))) == 1
    points = events(run / "logs" / "tensorboard").Scalars("train/loss_now")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert said.count("Where the time went") == 1
    assert json.loads((run / "throughput.json").read_text())["total"]["steps"] == 4


def test_a_logger_that_fails_on_the_way_does_not_end_the_training(tmp_path: Path, caplog) -> None:
    config = LoggerConfig.model_validate("mlflow")
    (report,) = reports.opened([config], tmp_path, {"seed": 0}, None)
    report.log_metrics({"loss": 1.0}, 1)
    shutil.rmtree(tmp_path / "logs" / "mlflow")
    for step in (2, 3):
        report.log_metrics({"loss": 1.0}, step)
    report.finalize("success")
    assert caplog.text.count("mlflow logs no more of this training:") == 1
