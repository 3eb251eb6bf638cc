"""The end of a training whose metric no longer improves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping

from synthcube.training.checkpoint_io import load
from synthcube.training.config import EarlyStopConfig, TrainingConfig


class EarlyStop(EarlyStopping):
    """Lightning's, whose patience counts validations whatever the metric, and may be raised.

    A metric that is not finite counts as one that did not improve.
    """

    def __init__(self, config: EarlyStopConfig, every_n_epochs: int) -> None:
        super().__init__(
            monitor=config.metric,
            min_delta=config.min_change,
            patience=config.patience,
            mode=config.mode,
            check_finite=False,
            # After a validation, at whose end alone there are new values of it.
            check_on_train_epoch_end=not config.metric.startswith("validation/"),
        )
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning would take the patience back to what it was.
        super().load_state_dict({**state_dict, "patience": self.patience})


def stopped_early(checkpoint: Path, training: TrainingConfig) -> str:
    """Why the training of a checkpoint needs no more steps; empty where it may go on."""
    config = training.early_stop
    if config is None:
        return ""
    key = EarlyStop(config, training.validate_every_n_epochs).state_key
    state = load(checkpoint, mapped=True)["callbacks"].get(key, {})
    waited = int(state.get("wait_count", 0))
    if waited < config.patience:
        return ""
    return (
        f"{config.metric} has not improved on {float(state['best_score']):.6g} in {waited} "
        f"validations (training.early_stop.patience is {config.patience})"
    )
