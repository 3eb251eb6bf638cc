"""Where a training reports to beside metrics.csv: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube import runtime
from synthcube.errors import ConfigError
from synthcube.schema import Schema
from synthcube.storage import make_folder, write_json

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger("synthcube")

FOLDER = "logs"
_RUNS = "runs.json"  # in FOLDER: what the run is called there, so that a resumed one goes on
_PICTURE = "samples"
# What SynthCube sets itself: the place in the run folder, the way to resume, what is shared.
_OURS = {
    "self", "kwargs", "save_dir", "root_dir", "log_dir", "dir", "version", "sub_dir", "id",
    "run_id", "resume", "resume_from", "fork_from", "reinit", "force", "mode", "settings",
    "experiment", "anonymous", "log_model", "log_graph", "checkpoint_name", "add_file_policy",
    "purge_step", "config", "config_exclude_keys", "config_include_keys", "allow_val_change",
    "monitor_gym", "tensorboard", "sync_tensorboard", "default_hp_metric",
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
    def _usable(self) -> Self:
        if importlib.util.find_spec(self.name) is None:
            raise ValueError(
                f"{self.name} is not installed here: pip install 'synthcube[{self.name}]', or "
                f"leave it out of training.loggers; metrics.csv is written without it"
            )
        if self.arguments:
            known = {name for kind in _takers(self.name) for name in _arguments(kind)} - _OURS
            known |= {"offline", "prefix"} if self.name == "wandb" else set()
            known -= {"name"} if self.name == "tensorboard" else set()
            unknown = [name for name in self.arguments if name not in known]
            if unknown:
                raise ValueError(
                    f"{self.name} takes no argument {', '.join(map(repr, unknown))}; it takes "
                    f"{', '.join(sorted(known))}"
                )
        if urlsplit(str(self.arguments.get("tracking_uri", ""))).password:
            raise ValueError(
                "tracking_uri holds a password, and the config is shared with the model: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


def opened(
    configs: Sequence[LoggerConfig], run: Path, settings: Mapping[str, Any], steps: int | None
) -> list[Logger]:
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
    runtime.keep_loggers_local()
    folder = make_folder(run / FOLDER)
    runs = _known_runs(folder)
    loggers = []
    for config in configs:
        try:
            logger, name = _OPEN[config.name](config.arguments, folder, runs, settings, steps)
        except Exception as error:  # each library raises its own kinds
            raise ConfigError(f"training.loggers {config.name}: {error}") from error
        loggers.append(logger)
        runs[config.name] = name
        write_json(folder / _RUNS, runs)
    return loggers


def show_picture(loggers: Sequence[Logger], path: Path, step: int) -> None:
    """Hand a PNG of samples to every logger that shows pictures."""
    import numpy as np
    import PIL.Image
    from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            with PIL.Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(_PICTURE, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(_PICTURE, [str(path)], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), _PICTURE)


def close(loggers: Sequence[Logger]) -> None:
    """End what Lightning leaves open, so that the next training of this process starts its own."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            run: Any = logger.experiment
            run.finish()
            if run.settings.mode == "offline":
                log.info(
                    "To send this run to Weights & Biases: wandb sync %s", run.settings.sync_dir
                )


def _tensorboard(
    arguments: Mapping[str, Any], folder: Path, runs: Mapping[str, str],
    settings: Mapping[str, Any], steps: int | None,
) -> tuple[Logger, str]:  # fmt: skip
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.tensorboard.summary import hparams

    forgets: dict[str, Any] = {} if steps is None else {"purge_step": steps + 1}
    logger = TensorBoardLogger(folder, name="tensorboard", version="", **forgets, **arguments)
    logger.log_hyperparams(dict(settings), metrics={})  # into hparams.yaml
    if "tensorboard" not in runs:
        # Lightning would write them with a metric hp_metric of -1.
        for summary in hparams(_flat(settings), {"validation/loss": 0.0}):
            logger.experiment._get_file_writer().add_summary(summary)
    return logger, "tensorboard"


def _wandb(
    arguments: Mapping[str, Any], folder: Path, runs: Mapping[str, str],
    settings: Mapping[str, Any], steps: int | None,
) -> tuple[Logger, str]:  # fmt: skip
    import wandb
    from lightning.pytorch.loggers import WandbLogger

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
    from lightning.pytorch.loggers import MLFlowLogger

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


def _takers(name: str) -> tuple[Callable[..., Any], ...]:
    """What gets the arguments: Lightning's logger, and what it hands them on to."""
    runtime.keep_loggers_local()
    from lightning.pytorch import loggers

    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return loggers.TensorBoardLogger, SummaryWriter
    if name == "wandb":
        import wandb

        return (wandb.init,)
    return (loggers.MLFlowLogger,)


def _arguments(kind: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _known_runs(folder: Path) -> dict[str, str]:
    path = folder / _RUNS
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return known


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
