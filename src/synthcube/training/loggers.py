"""Which loggers a training reports to beside metrics.csv, and with which arguments."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from pydantic import Field, ValidationInfo, model_validator
from typing_extensions import Self

from synthcube import environment, plugins, reading
from synthcube.errors import ConfigError, OutputError, SynthCubeError
from synthcube.schema import Schema
from synthcube.storage import make_folder, write_json

# Of Lightning's loggers, TensorBoard's SummaryWriter and wandb.init. The place in the run folder,
# the way to resume and what is shared SynthCube decides; nothing here sends or opens other files.
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
    """A logger by name, with its arguments; a name alone will do."""

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


log = logging.getLogger("synthcube")

FOLDER = "logs"
_RUNS = "runs.json"  # in FOLDER: what the run is called there, so that a resumed one goes on
_PICTURE = "samples"


class Report(Logger):
    """A logger that says it once when it fails, and is silent from then on.

    A server that is down, or a process of W&B that a signal has ended, must not end a training.
    """

    def __init__(self, inner: Logger, called: str) -> None:
        super().__init__()
        self.inner = inner
        self.called = called
        self.works = True

    @property
    def name(self) -> str:
        return self.called

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is there since the logger was opened."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._attempt(lambda: self.inner.log_metrics(dict(metrics), step))

    def save(self) -> None:
        self._attempt(self.inner.save)

    def finalize(self, status: str) -> None:
        self._attempt(lambda: self.inner.finalize(status))

    def show_picture(self, path: Path, step: int) -> None:
        """Show a PNG of samples."""
        self._attempt(lambda: _show(self.inner, path, step))

    def close(self) -> None:
        """End what Lightning leaves open, so that the next training here starts its own."""
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
            log.warning("%s gets no more of this training: %s", self.called, error)


def opened(
    configs: Sequence[LoggerConfig], run: Path, settings: Mapping[str, Any], steps: int | None
) -> list[Report]:
    """The loggers, ready to write under `run`/logs; to be called in one process.

    A run that was logged before goes on in the same TensorBoard folder, W&B run and MLflow run.

    Args:
        settings: the resolved config, shown as hyperparameters.
        steps: what was logged after this step is to be forgotten, where the logger can; None in a
            new training.

    Raises:
        ConfigError: a logger refuses its arguments, or cannot reach where it is to send.
    """
    if not configs:
        return []
    environment.keep_loggers_local()
    folder = make_folder(run / FOLDER)
    runs = _known_runs(folder)
    reports: list[Report] = []
    for config in configs:
        try:
            logger, name = _OPEN[config.name](config.arguments, folder, runs, settings, steps)
        except Exception as error:  # as above
            for report in reports:
                report.close()
            if isinstance(error, SynthCubeError):
                raise
            raise ConfigError(f"training.loggers {config.name}: {error}") from error
        reports.append(Report(logger, config.name))
        runs[config.name] = name
        write_json(folder / _RUNS, runs)
    return reports


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
    forgets: dict[str, Any] = {"purge_step": (steps or 0) + 1} if is_known else {}
    logger = TensorBoardLogger(folder, name="tensorboard", version="", **forgets, **arguments)
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

    given = {"project": "synthcube", "name": folder.resolve().parent.name, **arguments}
    offline, prefix = given.pop("offline", True), given.pop("prefix", "")
    # Not by Lightning's logger: its way to be offline stays in the environment, and it joins
    # whatever run this process has open.
    experiment = wandb.init(
        dir=folder, id=runs.get("wandb"), resume="allow", reinit="create_new",
        mode="offline" if offline else "online", config=dict(settings), allow_val_change=True,
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, disable_job_creation=True
        ),
        **given,
    )  # fmt: skip
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(experiment=experiment, prefix=prefix), str(experiment.id)


def _mlflow(
    arguments: Mapping[str, Any], folder: Path, runs: Mapping[str, str],
    settings: Mapping[str, Any], steps: int | None,
) -> tuple[Logger, str]:  # fmt: skip
    given = {
        "experiment_name": "synthcube",
        "run_name": folder.resolve().parent.name,
        "tracking_uri": (folder.resolve() / "mlflow").as_uri(),
        **arguments,
    }
    logger = MLFlowLogger(run_id=runs.get("mlflow"), **given)
    client, name = logger.experiment, str(logger.run_id)
    if "mlflow" in runs:  # parameters of a run cannot be changed: config.yaml below has the new
        client.update_run(name, status="RUNNING")
    else:
        logger.log_hyperparams(_flat(settings))
    client.log_text(name, json.dumps(dict(settings), indent=2), "config.json")
    return logger, name


_OPEN: dict[str, Callable[..., tuple[Any, str]]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow,
}  # fmt: skip


def _known_runs(folder: Path) -> dict[str, str]:
    path = folder / _RUNS
    known = reading.read_object(path, OutputError) if path.exists() else {}
    return {name: text for name, text in known.items() if isinstance(text, str)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as section.key: value, with values that every logger can show."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w/. -]", "_", str(key))
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
