"""Checkpoints of a run, also within an epoch: written in one step, for resuming only."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch.utils._pytree import tree_leaves, tree_map

from synthcube import environment, reading
from synthcube.errors import ArtifactError, ConfigError, first_faults
from synthcube.models.family import Family
from synthcube.storage import link_or_copy, write_with
from synthcube.training.config import TrainingConfig
from synthcube.training.memory import is_shortage
from synthcube.training.preemption import Preemption
from synthcube.training.strategies import is_one_file

# What a disk takes in a moment is not worth a copy in memory.
_SMALL_BYTES = 16_000_000
_SHARE_OF_FREE = 0.5


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and moves it there, and never unpickles code.

    What is to be saved is copied in memory and written by a thread, where half of what is free is
    enough for the copy; a disk may need seconds for each gigabyte. The next save waits for the one
    before, as does the end of a training, where a failure is raised at the latest.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """
        Raises:
            OutputError: this or the save before could not be written.
        """
        self.finish()
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        size = _bytes(checkpoint)
        if size < _SMALL_BYTES or size > _SHARE_OF_FREE * environment.free_memory():
            _write(checkpoint, target)
            return
        copied = tree_map(_copied, checkpoint)
        self._pending.append(self._pool.submit(_write, copied, target))

    def repeat(self, path: str | Path, target: str | Path) -> None:
        """Let `target` be the same as the checkpoint that was just saved as `path`."""
        if self._pending:
            self._pending.append(self._pool.submit(_repeat, Path(path), Path(target)))
        else:
            _repeat(Path(path), Path(target))

    def finish(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            OutputError: it could not be written.
        """
        pending, self._pending = self._pending, []
        for each in pending:
            each.result()

    def teardown(self) -> None:
        self.finish()
        self._pool.shutdown()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        self.finish()
        return load(Path(path), map_location)


def load(path: Path, map_location: Any = "cpu", *, mapped: bool = False) -> dict[str, Any]:
    """The content of a checkpoint: tensors and plain values only.

    Args:
        mapped: read tensors when they are looked at; the file stays open as long as they live.

    Raises:
        ArtifactError: it cannot be read.
    """
    reading.check_checkpoint(path, ArtifactError)
    try:
        content: dict[str, Any] = torch.load(
            path, map_location=map_location, weights_only=True, mmap=mapped
        )
    except Exception as error:  # torch raises many kinds for a damaged file
        if is_shortage(error):
            raise
        raise ArtifactError(
            f"The checkpoint {path} cannot be read: it is damaged or not a checkpoint of "
            f"SynthCube ({type(error).__name__}). Remove it to start from the other one in its "
            "folder, or train into a new folder."
        ) from error
    return content


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    write_with(target, lambda temporary: torch.save(checkpoint, temporary))


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _repeat(source: Path, target: Path) -> None:
    write_with(target, partial(link_or_copy, source))


def _bytes(content: Any) -> int:
    return sum(each.nbytes for each in tree_leaves(content) if isinstance(each, torch.Tensor))


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
        shown = first_faults(faults, _SHOWN)
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


# Processes on GPUs ask each other only so often, for none of them should wait for the others.
_STEPS_BETWEEN_QUESTIONS = 10


class Continuation(Checkpoint):
    """Saves when its time has come, and when a signal did, after which the training ends.

    Args:
        path: of the checkpoint.
        accumulate: batches whose gradients make a step; in between nothing can be saved.
        every_n_minutes: between checkpoints; None: only for a signal.
        restored: puts trained weights back where averaged ones stand in for a validation.
    """

    def __init__(
        self,
        path: Path,
        preemption: Preemption,
        *,
        accumulate: int,
        every_n_minutes: float | None,
        restored: Callable[[pl.Trainer, Any], None],
    ) -> None:
        self.path = path
        self.preemption = preemption
        self.accumulate = accumulate
        self.seconds = 60 * every_n_minutes if every_n_minutes else float("inf")
        self.restored = restored
        self._saved_at = time.monotonic()
        self._saves: str | None = None

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._saved_at = time.monotonic()
        self.preemption.listen()  # a logger may have taken one
        # It would have the processes ask each other at every step whether that came; we do below.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, _: Any, __: Any, batch_idx: int
    ) -> None:
        is_last = trainer.is_last_batch
        if (batch_idx + 1) % self.accumulate and not is_last:
            return
        number = (batch_idx + 1) // self.accumulate
        late, stops = self._asked(trainer, number, always=is_last)
        if stops or (late and not is_last):  # the epoch's end saves anyway
            self._save(trainer, "validation" if is_last and _validates(trainer) else "batch")
        if stops:
            self._stop(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, _: Any, __: Any, batch_idx: int, *___: Any
    ) -> None:
        if self._asked(trainer, batch_idx, always=False)[1]:
            self.restored(trainer, module)
            self._save(trainer, "validation")
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._saved_at = time.monotonic()
        # Lightning leaves schedules that follow a metric alone where an epoch was interrupted,
        # for it forgets the metric; we do not.
        trainer.fit_loop.restarting = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if self._saves:
            _set_progress(checkpoint["loops"]["fit_loop"], before=self._saves)

    def _asked(self, trainer: pl.Trainer, number: int, *, always: bool) -> tuple[bool, bool]:
        """Whether to save, and whether to stop: all processes do the same.

        Args:
            number: of the step, or of the batch in a validation.
            always: ask the others now, not only every so often.
        """
        late = time.monotonic() - self._saved_at > self.seconds
        stops = self.preemption.heard is not None
        if trainer.world_size == 1:
            return late, stops
        device = trainer.strategy.root_device
        if device.type != "cpu" and number % _STEPS_BETWEEN_QUESTIONS and not always:
            return False, False
        asked = torch.tensor([float(late), float(stops)], device=device)
        answer: Any = trainer.strategy.reduce(asked, reduce_op="max")
        late, stops = (bool(each) for each in answer.tolist())
        return late, stops

    def _save(self, trainer: pl.Trainer, before: str) -> None:
        self._saves = before
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self._saves = None
        self._saved_at = time.monotonic()

    def _stop(self, trainer: pl.Trainer) -> None:
        writer: Any = trainer.strategy.checkpoint_io
        writer.finish()
        stop = self.preemption.stop(trainer.current_epoch, trainer.global_step, self.path)
        if trainer.is_global_zero:
            raise stop
        raise SystemExit(stop.exit_code)  # the first process says it for all


def _validates(trainer: pl.Trainer) -> bool:
    every = trainer.check_val_every_n_epoch or 1
    return trainer.enable_validation and (trainer.current_epoch + 1) % every == 0


def _set_progress(loops: dict[str, Any], *, before: str) -> None:
    """Let Lightning's counters say that a batch is over, or that the validation is to come.

    Lightning counts a batch as completed after the callbacks that save have run, and takes one
    that is not for one to be repeated, or an epoch's last one for a reason not to validate.
    """
    batches = loops["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"]
    if before == "batch":
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        return
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        # what it looks like when the first batch is about to be validated
        validation[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False


class NewHyperparameters(Callback):
    """Lets the optimizers of a continued run have what the config says now.

    A checkpoint holds the hyperparameters of its time. A schedule goes on from where it was, in
    proportion to the new learning rate.
    """

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._wanted = [
            [
                {name: group[name] for name in group if name != "params"}
                for group in each.param_groups
            ]
            for each in trainer.optimizers
        ]

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for optimizer, groups in zip(trainer.optimizers, self._wanted, strict=True):
            for group, wanted in zip(optimizer.param_groups, groups, strict=True):
                start = "initial_lr" if "initial_lr" in group else "lr"
                group |= {**wanted, "lr": group["lr"] * (wanted[start] / group[start])}
        for each in trainer.lr_scheduler_configs:
            if hasattr(each.scheduler, "base_lrs"):
                groups = each.scheduler.optimizer.param_groups
                each.scheduler.base_lrs = [group["initial_lr"] for group in groups]
