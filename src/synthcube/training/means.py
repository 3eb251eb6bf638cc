"""What an epoch came to: the means of a family's terms, logged at its end."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from synthcube.means import EpochMeans
from synthcube.training.processes import of_each

_KEY = "epoch_means"


class LogMeans(Callback):
    """Logs each term's mean over the epoch and over processes.

    Unlike Lightning's own means these are kept in a checkpoint, so that an epoch that was
    interrupted ends with the same numbers, and what depends on them is the same.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        _log(trainer, module, module.means["train"])

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        module.means["validation"].clear()  # of a validation that was interrupted

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        _log(trainer, module, module.means["validation"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_KEY] = of_each(module.means["train"].state(), trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint.get(_KEY, [])
        if len(states) == trainer.world_size:
            module.means["train"].load(states[trainer.global_rank], module.device)


def _log(trainer: pl.Trainer, module: pl.LightningModule, means: EpochMeans) -> None:
    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(trainer.strategy.reduce(values, reduce_op="sum"))

    found = means.take(summed)
    module.log_dict(found, on_step=False, on_epoch=True, prog_bar=True, logger=False, batch_size=1)
    # Now, and not by Lightning once the checkpoint is saved: a kill in between would lose the row.
    row = {name: float(value) for name, value in found.items()}
    for logger in trainer.loggers:
        logger.log_metrics({**row, "epoch": trainer.current_epoch}, trainer.global_step)
