"""Kills a process before its n-th change of the file system, for every n."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FORK = multiprocessing.get_context("fork")
_CHANGES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.truncate",
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Kill:
    """To be armed in a fork, which counts its changes below `root` and dies before one of them.

    Args:
        before: the number of that change, from 0; -1 for none.
    """

    def __init__(self, root: Path, before: int = -1) -> None:
        self.root, self.before = str(root.resolve()), before
        self._seen = _FORK.Value("i", 0)

    @property
    def seen(self) -> int:
        """How many changes the fork has made, or was about to make."""
        return int(self._seen.value)

    def arm(self) -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if not self._is_change(event, arguments):
                return
            if self._seen.value == self.before:
                os.kill(os.getpid(), signal.SIGKILL)
            self._seen.value += 1

        sys.addaudithook(hook)

    def _is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            return bool(flags & _WRITING) and self._is_below(path)
        # shutil.rmtree names what it removes relative to an open folder
        return event in _CHANGES and (self._is_below(arguments[0]) or arguments[-1] not in (-1, ""))

    def _is_below(self, path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return isinstance(path, str | Path) and str(Path(path).absolute()).startswith(self.root)


def killed_before(number: int, root: Path, work: Callable[[], object]) -> bool:
    """Whether `work`, in a fork, made so few changes below `root` that it came to its end."""
    kill = Kill(root, number)

    def child() -> None:
        kill.arm()
        work()

    process = _FORK.Process(target=child)
    with warnings.catch_warnings():  # newer Pythons fear for threads, of which we use none
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0
