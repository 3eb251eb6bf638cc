"""Checkpoint files, written in one step while the training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves, tree_map

from synthcube import reading, runtime
from synthcube.errors import ArtifactError
from synthcube.storage import link_or_copy, write_with
from synthcube.training.shortage import is_shortage

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
        if size < _SMALL_BYTES or size > _SHARE_OF_FREE * runtime.free_memory():
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
