"""Checkpoints of a run: written atomically, also within an epoch, and read to resume."""

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
from torch.utils._pytree import tree_leaves, tree_map_only

from synthcube import environment, reading
from synthcube.errors import ArtifactError, ConfigError, MemoryShortageError, first_faults
from synthcube.models.family import Family
from synthcube.storage import link_or_copy, write_with
from synthcube.training.config import TrainingConfig
from synthcube.training.memory import is_shortage
from synthcube.training.preemption import Preemption
from synthcube.training.strategies import is_one_file

LAST, BEST = "last.ckpt", "best.ckpt"
_FAULTS_SHOWN = 10
# Smaller checkpoints are written at once, without a copy in memory.
_SMALL_BYTES = 16_000_000
_SHARE_OF_FREE = 0.5
# Steps between synchronizations of processes on GPUs, which cost a wait.
_STEPS_BETWEEN_SYNCS = 10


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it; loads without unpickling code.

    A large checkpoint is copied in memory and written by a thread, if the copy fits into half of
    the free memory: a disk may need seconds per gigabyte. The next save and the end of the
    training wait for the thread and raise its errors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Save now or in a thread; raise OutputError if this or the previous save failed."""
        self.finish()
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
        size = sum(tensor.nbytes for tensor in tensors)
        if size < _SMALL_BYTES or size > _SHARE_OF_FREE * environment.free_memory():
            _write(checkpoint, target)
            return
        copied = tree_map_only(
            torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint
        )
        self._pending.append(self._pool.submit(_write, copied, target))

    def repeat(self, path: str | Path, target: str | Path) -> None:
        """Link or copy the checkpoint just saved as `path` to `target`."""
        write = partial(write_with, Path(target), partial(link_or_copy, Path(path)))
        if self._pending:
            self._pending.append(self._pool.submit(write))
        else:
            write()

    def finish(self) -> None:
        """Wait until all saves are on the disk; raise OutputError if one failed."""
        pending, self._pending = self._pending, []
        for save in pending:
            save.result()

    def teardown(self) -> None:
        self.finish()
        self._pool.shutdown()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        # To the CPU: the device that wrote it may be missing, or that of another process.
        self.finish()
        return load(Path(path), map_location)


def load(path: Path, map_location: Any = "cpu", *, mapped: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, which is only tensors and plain values.

    Raises ArtifactError if it cannot be read.

    Args:
        mapped: memory-map the tensors; the file stays open as long as they live.
    """
    reading.check_checkpoint(path, ArtifactError)
    try:
        content: dict[str, Any] = torch.load(
            path, map_location=map_location, weights_only=True, mmap=mapped
        )
    except Exception as error:  # torch raises many kinds for a damaged file
        if is_shortage(error):
            raise MemoryShortageError(
                f"Out of memory while reading the checkpoint {path}, which is intact: free memory, "
                "or raise the limit of this process or container."
            ) from error
        raise ArtifactError(
            f"The checkpoint {path} cannot be read: it is damaged or not a checkpoint of "
            f"SynthCube ({type(error).__name__}). Remove it to resume from the other checkpoint "
            "in its folder, or train into a new folder."
        ) from error
    return content


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    write_with(target, lambda temporary: torch.save(checkpoint, temporary))


class BestAndLast(ModelCheckpoint):
    """Saves last.ckpt after every validation, and best.ckpt if the monitored metric is best."""

    def __init__(
        self, folder: Path, monitor: str | None, every_n_epochs: int, mode: Literal["min", "max"]
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
        # Unlike Lightning's, which saves the last only together with the best.
        epoch = trainer.current_epoch + 1
        # A time limit sets Lightning's interval to 1 for its last epoch.
        is_validated = epoch % (trainer.check_val_every_n_epoch or 1) == 0
        saved = self._last_checkpoint_saved, self._last_global_step_saved
        if is_validated:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        # The training may end between two validations.
        if not (is_validated or trainer.should_stop or epoch == trainer.max_epochs):
            return
        is_best = saved != (self._last_checkpoint_saved, self._last_global_step_saved)
        last = Path(str(self.dirpath)) / LAST
        if not (is_best and is_one_file(trainer.strategy)):
            trainer.save_checkpoint(last)
        elif trainer.is_global_zero:
            writer: Any = trainer.strategy.checkpoint_io
            writer.repeat(last.with_name(BEST), last)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: the averaged weights have replaced the trained ones by now."""


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint; with a moving average, the averaged ones."""
    state: dict[str, torch.Tensor] = load(path, mapped=True)["state_dict"]
    return state


def reached(path: Path) -> tuple[int, int]:
    """Epochs completed and steps taken at a checkpoint."""
    content = load(path, mapped=True)
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return int(epochs), int(content["global_step"])


def lack(path: Path) -> str:
    """Why a training cannot resume from a file; empty if it can."""
    if path.suffix == ".safetensors":
        return "these are weights alone, without the state of a training"
    if not zipfile.is_zipfile(path):
        return "this is not a file of PyTorch, or it is cut short"
    content: object = load(path, mapped=True)
    if isinstance(content, dict) and {"loops", "callbacks", "global_step"} <= content.keys():
        return ""
    return "it holds weights, or something else, without the state of a training"


def fingerprint(path: Path) -> str:
    """A digest of a checkpoint, from the sizes and CRCs in its ZIP directory; fast for any size."""
    with zipfile.ZipFile(path) as file:
        # The top folder has the name of a temporary file.
        records = [
            (record.filename.partition("/")[2], record.file_size, record.CRC)
            for record in file.infolist()
        ]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


def position(path: Path) -> tuple[int, int]:
    """The epoch of a checkpoint, from 0, and the number of its batches that were trained on."""
    loops = load(path, mapped=True)["loops"]["fit_loop"]
    epoch = loops["epoch_progress"]["current"]
    taken = loops["epoch_loop.batch_progress"]["current"]["completed"]
    return int(epoch["processed"]), taken if epoch["started"] > epoch["processed"] else 0


def check_fits(path: Path, family: Family) -> None:
    """Raise ConfigError unless a checkpoint's weights have the model's names and shapes."""
    saved = {name: tuple(value.shape) for name, value in weights(path).items()}
    needed = {name: tuple(value.shape) for name, value in family.state_dict().items()}
    faults = [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {needed.get(name, 'absent')} in "
        "the model"
        for name in sorted({*saved, *needed})
        if saved.get(name) != needed.get(name)
    ]
    if faults:
        shown = first_faults(faults, _FAULTS_SHOWN)
        raise ConfigError(f"The config's model does not fit {path}:", shown)


def is_complete(path: Path, training: TrainingConfig) -> bool:
    """Whether a checkpoint has reached `max_epochs` or `max_minutes`."""
    timer = load(path, mapped=True)["callbacks"].get("Timer", {})
    spent = timer.get("time_elapsed", {}).get("train", 0.0)
    in_time = training.max_minutes is None or spent < 60 * training.max_minutes
    return not in_time or reached(path)[0] >= training.max_epochs


def monitored(path: Path) -> dict[str, float]:
    """Name and value of the metric for which a checkpoint was kept; empty if not recorded."""
    for name, state in load(path, mapped=True)["callbacks"].items():
        if name.startswith(BestAndLast.__name__) and state.get("current_score") is not None:
            return {str(state["monitor"]): float(state["current_score"])}
    return {}


class MidEpochCheckpoint(Checkpoint):
    """Saves a checkpoint every N minutes, and after a signal, which then ends the training.

    Args:
        path: of the checkpoint.
        accumulate: number of batches of a step; nothing can be saved between them.
        every_n_minutes: between checkpoints; None: only after a signal.
        restore_weights: puts the trained weights back if a validation uses averaged ones.
    """

    def __init__(
        self,
        path: Path,
        preemption: Preemption,
        *,
        accumulate: int,
        every_n_minutes: float | None,
        restore_weights: Callable[[pl.Trainer, Any], None],
    ) -> None:
        self.path = path
        self.preemption = preemption
        self.accumulate = accumulate
        self.seconds = 60 * every_n_minutes if every_n_minutes else float("inf")
        self.restore_weights = restore_weights
        self._saved_at = time.monotonic()
        self._saves: str | None = None

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._saved_at = time.monotonic()
        self.preemption.listen()  # a logger may have taken one
        # Lightning would synchronize the processes at every step to share SIGTERM; we do it below.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, _: Any, __: Any, batch_idx: int
    ) -> None:
        is_last = trainer.is_last_batch
        if (batch_idx + 1) % self.accumulate and not is_last:
            return
        number = (batch_idx + 1) // self.accumulate
        late, stops = self._decide(trainer, number, always=is_last)
        if stops or (late and not is_last):  # the epoch's end saves anyway
            self._save(trainer, "validation" if is_last and _validates(trainer) else "batch")
        if stops:
            self._stop(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, _: Any, __: Any, batch_idx: int, *___: Any
    ) -> None:
        if self._decide(trainer, batch_idx, always=False)[1]:
            self.restore_weights(trainer, module)
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

    def _decide(self, trainer: pl.Trainer, number: int, *, always: bool) -> tuple[bool, bool]:
        """Whether to save and whether to stop, the same in all processes.

        Args:
            number: of the step, or of the batch in a validation.
            always: synchronize now, not only every `_STEPS_BETWEEN_SYNCS`.
        """
        late = time.monotonic() - self._saved_at > self.seconds
        stops = self.preemption.heard is not None
        if trainer.world_size == 1:
            return late, stops
        device = trainer.strategy.root_device
        if device.type != "cpu" and number % _STEPS_BETWEEN_SYNCS and not always:
            return False, False
        flags = torch.tensor([float(late), float(stops)], device=device)
        reduced: Any = trainer.strategy.reduce(flags, reduce_op="max")
        late, stops = (bool(flag) for flag in reduced.tolist())
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
        raise SystemExit(stop.exit_code)  # the first process prints the message


def _validates(trainer: pl.Trainer) -> bool:
    every = trainer.check_val_every_n_epoch or 1
    return trainer.enable_validation and (trainer.current_epoch + 1) % every == 0


def _set_progress(loops: dict[str, Any], *, before: str) -> None:
    """Set Lightning's counters to "batch completed", or to "validation comes next".

    Lightning counts a batch as completed only after the callbacks that save. It would repeat the
    batch, or skip the validation after the last batch of an epoch.
    """
    batches = loops["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        batches[part]["completed"] = batches[part]["processed"]
    if before == "batch":
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
        return
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        # as before the first batch of a validation
        validation[part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False


class NewHyperparameters(Callback):
    """Gives the optimizers of a resumed run the hyperparameters of the current config.

    A checkpoint contains the earlier ones. A learning-rate schedule continues from its position,
    scaled to the new learning rate.
    """

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._configured = [
            [
                {key: group[key] for key in group if key != "params"}
                for group in optimizer.param_groups
            ]
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for optimizer, groups in zip(trainer.optimizers, self._configured, strict=True):
            for group, configured in zip(optimizer.param_groups, groups, strict=True):
                start = "initial_lr" if "initial_lr" in group else "lr"
                group |= {**configured, "lr": group["lr"] * (configured[start] / group[start])}
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                groups = config.scheduler.optimizer.param_groups
                config.scheduler.base_lrs = [group["initial_lr"] for group in groups]
