"""Which loggers a training reports to beside metrics.csv, and with which arguments."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, model_validator
from typing_extensions import Self

from synthcube import names
from synthcube.schema import Schema

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
        if names.is_needless(info):
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
