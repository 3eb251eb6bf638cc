"""Checkpoints of a run: written in one step, the best and the last kept, for resuming only."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.training.checkpoint_io import load
from synthcube.training.config import TrainingConfig
from synthcube.training.strategies import is_one_file

LAST, BEST = "last.ckpt", "best.ckpt"
_SHOWN = 10


class BestAndLast(ModelCheckpoint):
    """last.ckpt after every validation, best.ckpt where the monitored metric, if any, is best."""

    def __init__(
        self,
        folder: Path,
        monitor: str | None,
        every_n_epochs: int,
        mode: Literal["min", "max"],
    ) -> None:
        super().__init__(
            dirpath=folder,
            filename=Path(BEST).stem,
            monitor=monitor,
            mode=mode,
            save_top_k=1 if monitor else 0,
            save_last=True,
            enable_version_counter=False,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
        )
        self.CHECKPOINT_NAME_LAST = Path(LAST).stem

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not Lightning's, which saves the last only where the best is saved as well.
        epoch = trainer.current_epoch + 1
        is_validated = epoch % (self.every_n_epochs or 1) == 0
        saved = self._last_checkpoint_saved, self._last_global_step_saved
        if is_validated:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        # The end may be between two validations: what was learned since must not be lost.
        if not (is_validated or trainer.should_stop or epoch == trainer.max_epochs):
            return
        is_best = saved != (self._last_checkpoint_saved, self._last_global_step_saved)
        self._save_last(trainer, is_best=is_best)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: by now the averaged weights stand in the place of those that are trained."""

    def _save_last(self, trainer: pl.Trainer, *, is_best: bool) -> None:
        last = Path(str(self.dirpath)) / LAST
        if not (is_best and is_one_file(trainer.strategy)):
            trainer.save_checkpoint(last)
        elif trainer.is_global_zero:
            writer: Any = trainer.strategy.checkpoint_io
            writer.repeat(last.with_name(BEST), last)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint: the averaged ones where there are any."""
    state: dict[str, torch.Tensor] = load(path, mapped=True)["state_dict"]
    return state


def reached(path: Path) -> tuple[int, int]:
    """Epochs completed and steps taken at a checkpoint."""
    content = load(path, mapped=True)
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return int(epochs), int(content["global_step"])


def lack(path: Path) -> str:
    """Why a file is no checkpoint to continue a training from; empty where it is one."""
    if path.suffix == ".safetensors":
        return "these are weights alone, without the state of a training"
    if not zipfile.is_zipfile(path):
        return "this is not a file of PyTorch, or it is cut short"
    content: object = load(path, mapped=True)
    if isinstance(content, dict) and {"loops", "callbacks", "global_step"} <= content.keys():
        return ""
    return "it holds weights, or something else, without the state of a training"


def fingerprint(path: Path) -> str:
    """A digest of a checkpoint, of the sizes and check sums that its own directory lists.

    Gigabytes of weights are not read for it.
    """
    with zipfile.ZipFile(path) as file:
        # The folder that all are in is named after the temporary file that was written.
        records = [
            (record.filename.partition("/")[2], record.file_size, record.CRC)
            for record in file.infolist()
        ]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def position(path: Path) -> tuple[int, int]:
    """The epoch that a checkpoint is in, from 0, and the batches of it that were taken."""
    loops = load(path, mapped=True)["loops"]["fit_loop"]
    epoch = loops["epoch_progress"]["current"]
    taken = loops["epoch_loop.batch_progress"]["current"]["completed"]
    return int(epoch["processed"]), taken if epoch["started"] > epoch["processed"] else 0


def is_within_epoch(path: Path) -> bool:
    """Whether a checkpoint was written before its epoch was over."""
    return position(path)[1] > 0


def check_fits(path: Path, family: Family) -> None:
    """Compare names and shapes of the weights.

    Raises:
        ConfigError: they are not those of the model.
    """
    saved = {name: tuple(value.shape) for name, value in weights(path).items()}
    needed = {name: tuple(value.shape) for name, value in family.state_dict().items()}
    faults = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {needed.get(name, 'absent')} in "
        "the model"
        for name in sorted({*saved, *needed})
        if saved.get(name) != needed.get(name)
    ]
    if faults:
        shown = [*faults[:_SHOWN], *([f"and {len(faults) - _SHOWN} more"] * (len(faults) > _SHOWN))]
        raise ConfigError(f"The model that is described does not fit {path}:", shown)


def is_complete(path: Path, training: TrainingConfig) -> bool:
    """Whether a checkpoint has the epochs or the minutes that are asked for."""
    spent = (
        load(path, mapped=True)["callbacks"]
        .get("Timer", {})
        .get("time_elapsed", {})
        .get("train", 0.0)
    )
    in_time = training.max_minutes is None or spent < 60 * training.max_minutes
    return not in_time or reached(path)[0] >= training.max_epochs


def monitored(path: Path) -> dict[str, float]:
    """The loss for which a checkpoint was kept, by name; empty where none was recorded."""
    for name, state in load(path, mapped=True)["callbacks"].items():
        if name.startswith(BestAndLast.__name__) and state.get("current_score") is not None:
            return {str(state["monitor"]): float(state["current_score"])}
    return {}
