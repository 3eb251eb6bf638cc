"""Checkpoints of a run: written in one step, the best and the last kept, for resuming only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from synthcube.errors import ArtifactError, ConfigError
from synthcube.family import Family
from synthcube.storage import write_with
from synthcube.training.config import TrainingConfig

LAST, BEST = "last.ckpt", "best.ckpt"
_SHOWN = 10


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and moves it there, and never unpickles code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_with(target, lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load(Path(path), map_location)


class BestAndLast(ModelCheckpoint):
    """last.ckpt after every validation, best.ckpt where the monitored loss, if any, is lowest."""

    def __init__(self, folder: Path, monitor: str | None, every_n_epochs: int) -> None:
        super().__init__(
            dirpath=folder,
            filename=Path(BEST).stem,
            monitor=monitor,
            mode="min",
            save_top_k=1 if monitor else 0,
            save_last=True,
            enable_version_counter=False,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
        )
        self.CHECKPOINT_NAME_LAST = Path(LAST).stem

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if is_last and self._last_global_step_saved != trainer.global_step:
            # The end is between two validations: what was learned since must not be lost.
            trainer.save_checkpoint(Path(str(self.dirpath)) / LAST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: by now the averaged weights stand in the place of those that are trained."""


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed training was writing."""
    for name in (LAST, BEST):
        for path in folder.glob(f".{Path(name).stem}-*{Path(name).suffix}"):
            path.unlink(missing_ok=True)


def load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values only.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(
            path, map_location=map_location, weights_only=True, mmap=True
        )
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ArtifactError(
            f"The checkpoint {path} cannot be read: it is damaged or not a checkpoint of "
            f"SynthCube ({type(error).__name__}). Remove it to start from the other one in its "
            "folder, or train into a new folder."
        ) from error
    return content


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint: the averaged ones where there are any."""
    state: dict[str, torch.Tensor] = load(path)["state_dict"]
    return state


def reached(path: Path) -> tuple[int, int]:
    """Epochs completed and steps taken at a checkpoint."""
    content = load(path)
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return int(epochs), int(content["global_step"])


def position(path: Path) -> tuple[int, int]:
    """The epoch that a checkpoint is in, from 0, and the batches of it that were taken."""
    loops = load(path)["loops"]["fit_loop"]
    taken = loops["epoch_loop.batch_progress"]["current"]["completed"]
    return reached(path)[0], taken if is_within_epoch(path) else 0


def is_within_epoch(path: Path) -> bool:
    """Whether a checkpoint was written before its epoch was over."""
    epoch = load(path)["loops"]["fit_loop"]["epoch_progress"]["current"]
    return bool(epoch["started"] > epoch["processed"])


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
    spent = load(path)["callbacks"].get("Timer", {}).get("time_elapsed", {}).get("train", 0.0)
    in_time = training.max_minutes is None or spent < 60 * training.max_minutes
    return not in_time or reached(path)[0] >= training.max_epochs


def monitored(path: Path) -> dict[str, float]:
    """The loss for which a checkpoint was kept, by name; empty where none was recorded."""
    for name, state in load(path)["callbacks"].items():
        if name.startswith(BestAndLast.__name__) and state.get("current_score") is not None:
            return {str(state["monitor"]): float(state["current_score"])}
    return {}
