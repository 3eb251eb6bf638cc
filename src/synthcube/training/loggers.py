"""Loggers besides metrics.csv: TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from pydantic import Field, ValidationInfo, model_validator
from typing_extensions import Self

from synthcube import environment, plugins, reading
from synthcube.errors import ConfigError, OutputError, SynthCubeError
from synthcube.schema import Schema, flattened
from synthcube.storage import make_folder, write_json

log = logging.getLogger("synthcube")

FOLDER = "logs"
_RUNS = "runs.json"  # in FOLDER: each logger's id of the run, for resuming
_PICTURE = "samples"

# Allowed arguments of Lightning's loggers, TensorBoard's SummaryWriter and wandb.init. SynthCube
# sets the folder, resuming and what is shared; none of these opens or sends other files.
_ARGUMENTS = {
    "tensorboard": {"comment", "filename_suffix", "flush_secs", "max_queue", "prefix"},
    "wandb": {
        "entity", "group", "job_type", "name", "notes", "offline", "prefix", "project", "tags",
    },
    "mlflow": {
        "artifact_location", "experiment_name", "prefix", "run_name", "synchronous", "tags",
        "tracking_uri",
    },
}  # fmt: skip


class LoggerConfig(Schema):
    """A logger: its name alone, or its name and arguments."""

    name: Literal["tensorboard", "wandb", "mlflow"] = Field(
        description="What reports: TensorBoard, Weights & Biases or MLflow."
    )
    arguments: dict[str, Any] = Field(
        default={},
        description="Arguments of Lightning's logger of that name: wandb sends nothing unless "
        "{offline: false}, mlflow writes to a folder unless it is given a tracking_uri.",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _usable(self, info: ValidationInfo) -> Self:
        if plugins.is_needless(info):
            return self
        if importlib.util.find_spec(self.name) is None:
            raise ValueError(
                f"{self.name} is not installed here: pip install 'synthcube[{self.name}]', or "
                f"leave it out of training.loggers; metrics.csv is written without it"
            )
        known = _ARGUMENTS[self.name]
        if unknown := [name for name in self.arguments if name not in known]:
            raise ValueError(
                f"{self.name} takes no argument {', '.join(map(repr, unknown))}; it takes "
                f"{', '.join(sorted(known))}"
            )
        suffix = str(self.arguments.get("filename_suffix", ""))
        if {"/", "\\"} & set(suffix):
            raise ValueError(f"filename_suffix is {suffix!r}: the end of a name is needed, no path")
        if urlsplit(str(self.arguments.get("tracking_uri", ""))).password:
            raise ValueError(
                "tracking_uri holds a password, and the config is shared with the model: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class Report(Logger):
    """Wraps a logger: after its first error it warns once and logs nothing more.

    A server that is down, or a W&B process killed by a signal, must not end a training.
    """

    def __init__(self, inner: Logger, name: str) -> None:
        super().__init__()
        self.inner = inner
        self._name = name
        self.works = True

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the logger got the config when it was opened."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._attempt(lambda: self.inner.log_metrics(dict(metrics), step))

    def save(self) -> None:
        self._attempt(self.inner.save)

    def finalize(self, status: str) -> None:
        self._attempt(lambda: self.inner.finalize(status))

    def show_picture(self, path: Path, step: int) -> None:
        """Log a PNG of samples."""
        self._attempt(lambda: _show(self.inner, path, step))

    def close(self) -> None:
        """Finish a W&B run, which Lightning leaves open for the next training in this process."""
        if isinstance(self.inner, WandbLogger):
            run: Any = self.inner.experiment
            self._attempt(run.finish)
            if run.settings.mode == "offline":
                log.info(
                    "To send this run to Weights & Biases: wandb sync %s", run.settings.sync_dir
                )

    def _attempt(self, act: Callable[[], Any]) -> None:
        if not self.works:
            return
        try:
            act()
        except Exception as error:  # each library raises its own kinds
            self.works = False
            log.warning("%s logs no more of this training: %s", self._name, error)


def opened(
    configs: Sequence[LoggerConfig], run: Path, settings: Mapping[str, Any], steps: int | None
) -> list[Report]:
    """The configured loggers, which write under `run`/logs; call this in one process only.

    A resumed run continues in the same TensorBoard folder, W&B run and MLflow run.

    Args:
        settings: the resolved config, shown as hyperparameters.
        steps: steps of the resumed checkpoint, after which earlier rows are dropped if the logger
            can; None in a new training.
    """
    if not configs:
        return []
    environment.keep_loggers_local()
    folder = make_folder(run / FOLDER)
    recorded = folder / _RUNS
    known = reading.read_object(recorded, OutputError) if recorded.exists() else {}
    runs = {name: text for name, text in known.items() if isinstance(text, str)}
    reports: list[Report] = []
    for config in configs:
        try:
            logger, name = _OPEN[config.name](config.arguments, folder, runs, settings, steps)
        except Exception as error:  # each library raises its own kinds
            for report in reports:
                report.close()
            if isinstance(error, SynthCubeError):
                raise
            raise ConfigError(f"training.loggers {config.name}: {error}") from error
        reports.append(Report(logger, config.name))
        runs[config.name] = name
        write_json(recorded, runs)
    return reports


def log_row(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give every logger a row of numbers, with the epoch, which counts from 1."""
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": trainer.current_epoch + 1}, trainer.global_step)


def _show(logger: Logger, path: Path, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        import numpy as np
        import PIL.Image

        with PIL.Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        logger.experiment.add_image(_PICTURE, pixels, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(_PICTURE, [str(path)], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(path), _PICTURE)


def _tensorboard(
    arguments: Mapping[str, Any], folder: Path, runs: Mapping[str, str],
    settings: Mapping[str, Any], steps: int | None,
) -> tuple[Logger, str]:  # fmt: skip
    from torch.utils.tensorboard.summary import hparams

    is_known = "tensorboard" in runs
    purge: dict[str, Any] = {"purge_step": (steps or 0) + 1} if is_known else {}
    logger = TensorBoardLogger(folder, name="tensorboard", version="", **purge, **arguments)
    logger.log_hyperparams(dict(settings), metrics={})  # into hparams.yaml
    if not is_known:
        # Lightning would write them with a metric hp_metric of -1.
        for summary in hparams(_flat(settings), {"validation/loss": 0.0}):
            logger.experiment._get_file_writer().add_summary(summary)
    return logger, "tensorboard"


def _wandb(
    arguments: Mapping[str, Any], folder: Path, runs: Mapping[str, str],
    settings: Mapping[str, Any], steps: int | None,
) -> tuple[Logger, str]:  # fmt: skip
    import wandb

    options = {"project": "synthcube", "name": folder.resolve().parent.name, **arguments}
    offline, prefix = options.pop("offline", True), options.pop("prefix", "")
    # Lightning's logger would set offline mode in the environment, and join a run that is open in
    # this process.
    experiment = wandb.init(
        dir=folder, id=runs.get("wandb"), resume="allow", reinit="create_new",
        mode="offline" if offline else "online", config=dict(settings), allow_val_change=True,
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, disable_job_creation=True
        ),
        **options,
    )  # fmt: skip
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=experiment, prefix=prefix), str(experiment.id)


def _mlflow(
    arguments: Mapping[str, Any], folder: Path, runs: Mapping[str, str],
    settings: Mapping[str, Any], steps: int | None,
) -> tuple[Logger, str]:  # fmt: skip
    options = {
        "experiment_name": "synthcube",
        "run_name": folder.resolve().parent.name,
        "tracking_uri": (folder.resolve() / "mlflow").as_uri(),
        **arguments,
    }
    logger = MLFlowLogger(run_id=runs.get("mlflow"), **options)
    client, name = logger.experiment, str(logger.run_id)
    if "mlflow" in runs:  # parameters cannot be changed: config.json below has the new ones
        client.update_run(name, status="RUNNING")
    else:
        logger.log_hyperparams(_flat(settings))
    client.log_text(name, json.dumps(dict(settings), indent=2), "config.json")
    return logger, name


_OPEN: dict[str, Callable[..., tuple[Any, str]]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow,
}  # fmt: skip


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as section.key: value, with names and values that every logger accepts."""
    return {
        re.sub(r"[^\w/. -]", "_", name): value
        if isinstance(value, bool | int | float | str)
        else str(value)
        for name, value in flattened(settings).items()
    }
