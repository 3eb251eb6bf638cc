"""The section `training` of the config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from synthcube.schema import MAX_BATCH, MAX_COUNT, List, Schema
from synthcube.training.loggers import LoggerConfig

MAX_MINUTES = 5_256_000  # ten years
Mode = Literal["min", "max"]
StopSignal = Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGQUIT"]


class EMAConfig(Schema):
    """Moving average of the weights, which is validated, sampled and exported."""

    decay: float = Field(
        default=0.999, gt=0, lt=1, description="Decay; ramped up as (1 + n) / (10 + n) at step n."
    )


class BestConfig(Schema):
    """The metric that chooses the best checkpoint."""

    metric: str = Field(
        default="validation/loss",
        description="Name of a column of metrics.csv that is logged once an epoch.",
    )
    mode: Mode = Field(default="min", description="Whether less is better, or more (max).")


COPIES = "validation/copies"
"""Share of drawn images that are copies of training images; computed where it ends a training."""

_MOST_COPIES = 0.1


class EarlyStopConfig(BestConfig):
    """When a training stops because a metric no longer improves, or is too bad."""

    metric: str = Field(
        default="validation/loss",
        description="Name of a column of metrics.csv that is logged once an epoch; or copies: "
        "images are drawn at each validation, and those counted that are copies of training images "
        "(the column validation/copies).",
    )

    patience: int = Field(
        default=10, ge=1, le=MAX_COUNT,
        description="Validations without an improvement before it stops.",
    )  # fmt: skip
    min_change: float = Field(
        default=0.0, ge=0, le=1e30,
        description="Least change that is an improvement, in the metric's unit.",
    )  # fmt: skip
    limit: float | None = Field(
        default=None, ge=-1e30, le=1e30,
        description="Stop at once where the metric is worse than this. null: only when it no "
        "longer improves; for copies, which are a share from 0 to 1 and need no patience: 0.1.",
    )  # fmt: skip
    num_images: int = Field(
        default=32, ge=2, le=MAX_COUNT,
        description="Images that are drawn at each validation to look for copies.",
    )  # fmt: skip

    @field_validator("metric")
    @classmethod
    def _in_full(cls, metric: str) -> str:
        return COPIES if metric == "copies" else metric

    @model_validator(mode="after")
    def _fewer_copies_are_better(self) -> Self:
        if self.metric == COPIES and self.mode == "max":
            raise ValueError("metric: copies: fewer are better; leave out mode: max")
        return self

    @property
    def worst(self) -> float | None:
        """The value beyond which it stops at once."""
        return _MOST_COPIES if self.metric == COPIES and self.limit is None else self.limit


class PrivacyConfig(Schema):
    """A training that is differentially private, with a subject as the unit."""

    epsilon: Annotated[float, Field(ge=0.1, le=20)] = Field(
        default=8.0,
        description="Most that the whole training may tell of one subject: 1 is a strong promise, "
        "above 10 is little of one. The noise follows from it.",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Probability that the promise does not hold; null: a tenth of one over the "
        "number of training subjects.",
    )
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = Field(
        default=1.0, description="Largest norm of the gradient of one subject."
    )
    draws: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=8,
        description="Draws of noise and time for each image, averaged before its gradient is "
        "clipped: better gradients for more time, at no cost in privacy.",
    )
    images_at_once: Annotated[int, Field(ge=1, le=MAX_BATCH)] = Field(
        default=4, description="Images whose gradients are in memory at once."
    )


class TrainingConfig(Schema):
    """Length, batches, moving average, checkpoints, pictures and loggers of a training."""

    max_epochs: int = Field(
        default=100, ge=1, le=MAX_COUNT, description="Passes over the training images."
    )
    max_minutes: float | None = Field(
        default=None, gt=0, le=MAX_MINUTES,
        description="Stop after this long, whatever the epoch; null: never.",
    )  # fmt: skip
    batch_size: int = Field(default=16, ge=1, le=MAX_BATCH, description="Images in a batch.")
    accumulate: int = Field(
        default=1, ge=1, le=MAX_COUNT,
        description="Batches whose gradients are added up for one step.",
    )  # fmt: skip
    gradient_clip_norm: Annotated[float, Field(gt=0, le=1e6)] | Literal["auto"] | None = Field(
        default="auto",
        description="Largest norm of a gradient; null: not clipped; auto: 1.0, but not clipped "
        "against a discriminator.",
    )
    ema: EMAConfig | None = Field(
        default=EMAConfig(), description="Moving average of the weights; null: none."
    )
    validate_every_n_epochs: int = Field(
        default=1, ge=1, le=MAX_COUNT, description="Epochs between validations and checkpoints."
    )
    checkpoint_every_n_minutes: float | None = Field(
        default=15.0, gt=0, le=MAX_MINUTES,
        description="Minutes between checkpoints within an epoch; null: at validations only.",
    )  # fmt: skip
    stop_signals: List[StopSignal] = Field(
        default=("SIGTERM", "SIGUSR1", "SIGINT"),
        description="Signals after which a checkpoint is saved and the training ends with exit "
        "code 75, to be continued.",
    )
    sample_every_n_epochs: int = Field(
        default=5, ge=0, le=MAX_COUNT, description="Epochs between sample pictures; 0: none."
    )
    num_sample_images: int = Field(
        default=8, ge=1, le=10000, description="Images in a sample picture."
    )
    log_every_n_steps: int = Field(
        default=50, ge=1, le=MAX_COUNT,
        description="Steps between lines in the log and in metrics.csv.",
    )  # fmt: skip
    loggers: List[LoggerConfig] = Field(
        default=(),
        description="Loggers beside metrics.csv: tensorboard, wandb, mlflow; with arguments as "
        "{name: wandb, arguments: {project: brains}}.",
    )

    best: BestConfig | None = Field(
        default=None,
        description="Metric by which the best model is chosen; null: the validation loss, or the "
        "training loss where nothing is validated.",
    )
    early_stop: EarlyStopConfig | None = Field(
        default=None, description="Stop when a metric no longer improves; null: never."
    )
    start_from: str | None = Field(
        default=None,
        description="Run or artifact of the same family, or hf://owner/name[@revision], whose "
        "weights the training starts from; train writes the commit.",
    )
    start_from_sha256: str = Field(
        default="", description="Hash of these weights; written by train, checked where given."
    )
    start_anew: List[str] = Field(
        default=(),
        description="Patterns of the names of weights that are not taken from `start_from`, such "
        'as "network.class_embedding.*" for other classes.',
    )
    freeze: List[str] = Field(
        default=(),
        description="Patterns of the names of weights that stay as in `start_from`, such as "
        '"network.encoder.*".',
    )

    privacy: PrivacyConfig | None = Field(
        default=None,
        description="Train with differential privacy: {epsilon: 8, delta: null, clip_norm: 1.0, "
        "draws: 8, images_at_once: 4}; needs the extra synthcube[privacy]. null: without.",
    )

    @field_validator("loggers")
    @classmethod
    def _no_duplicates(cls, loggers: tuple[LoggerConfig, ...]) -> tuple[LoggerConfig, ...]:
        names = [logger.name for logger in loggers]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"{', '.join(twice)} is there more than once: name each logger once")
        return loggers

    @model_validator(mode="after")
    def _copies_are_no_merit(self) -> Self:
        if self.best and self.best.metric == COPIES:
            raise ValueError(
                f"best.metric is {COPIES}: a model that has learned nothing has none; name a loss "
                "here, and copies in early_stop"
            )
        return self

    @model_validator(mode="after")
    def _start_is_named(self) -> Self:
        start = self.start_from
        if start is None:
            if keys := [name for name in ("start_anew", "freeze") if getattr(self, name)]:
                raise ValueError(f"{' and '.join(keys)} without start_from: name a trained model")
        elif not start.strip():
            raise ValueError(
                f"start_from is {start!r}; give the folder of a run or of an artifact, or the "
                "address of a model on a Hub: hf://owner/name"
            )
        return self

    def clip_norm(self, *, by_hand: bool) -> float | None:
        """Largest gradient norm; `by_hand`: for a family with several optimizers."""
        if self.privacy:
            return None  # the gradient of each subject is clipped, before the noise
        if self.gradient_clip_norm == "auto":
            # Gradients against a discriminator are about 100 times larger; clipping slows them.
            return None if by_hand else 1.0
        return self.gradient_clip_norm
