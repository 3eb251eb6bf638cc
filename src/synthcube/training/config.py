"""How long and how to train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from synthcube.schema import Schema

StopSignal = Literal["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP", "SIGQUIT"]


class EMAConfig(Schema):
    """Moving average of the weights: what is validated, sampled and shared."""

    decay: float = Field(
        default=0.999, gt=0, lt=1, description="Decay; ramped up as (1 + n) / (10 + n) at step n."
    )


class TrainingConfig(Schema):
    """Length, batches, averaging and what is written on the way."""

    max_epochs: int = Field(default=100, ge=1, description="Passes over the training images.")
    max_minutes: float | None = Field(
        default=None, gt=0, description="Stop after this long, whatever the epoch; null: never."
    )
    batch_size: int = Field(default=16, ge=1, description="Images in a batch.")
    accumulate: int = Field(
        default=1, ge=1, description="Batches whose gradients are added up for one step."
    )
    gradient_clip_norm: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        default="auto",
        description="Largest norm of a gradient; null: not clipped; auto: 1.0, but not clipped "
        "against a discriminator.",
    )
    ema: EMAConfig | None = Field(
        default=EMAConfig(), description="Moving average of the weights; null: none."
    )
    validate_every_n_epochs: int = Field(
        default=1, ge=1, description="Epochs between validations and checkpoints."
    )
    checkpoint_every_n_minutes: float | None = Field(
        default=15.0,
        gt=0,
        description="Minutes between checkpoints within an epoch; null: at validations only.",
    )
    stop_signals: tuple[StopSignal, ...] = Field(
        default=("SIGTERM", "SIGUSR1", "SIGINT"),
        description="Signals after which a checkpoint is saved and the training ends with exit "
        "code 75, to be continued.",
    )
    sample_every_n_epochs: int = Field(
        default=5, ge=0, description="Epochs between sample pictures; 0: none."
    )
    num_sample_images: int = Field(default=8, ge=1, description="Images in a sample picture.")
    log_every_n_steps: int = Field(
        default=50, ge=1, description="Steps between lines in the log and in metrics.csv."
    )

    def clip_norm(self, *, by_hand: bool) -> float | None:
        """Largest norm of a gradient, for a family that optimizes by hand or for another."""
        if self.gradient_clip_norm == "auto":
            # A discriminator's gradients are a hundred times that, and learn half as fast at it.
            return None if by_hand else 1.0
        return self.gradient_clip_norm
