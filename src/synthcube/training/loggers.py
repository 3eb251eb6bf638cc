"""Which loggers a training reports to beside metrics.csv, and with which arguments."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, model_validator
from typing_extensions import Self

from synthcube import names, runtime
from synthcube.schema import Schema

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
    def _usable(self, info: ValidationInfo) -> Self:
        if names.is_needless(info):
            return self
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
