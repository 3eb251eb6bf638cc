"""Signals that come before a task begins: they end the process at once, without a traceback.

An exception would not do: imports swallow some (in callbacks, around optional packages), and what
is half imported has nothing to lose.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import NoReturn

from synthcube.errors import PreemptedError

INTERRUPTED = 128 + signal.SIGINT  # as shells say it
PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)

bar_eraser = b""
"""What removes the bar from the terminal, while terminal.py shows one."""


def guard_start(words: Sequence[str]) -> None:
    """Take the signals of a command line until its task does; those ignored stay ignored.

    A training ends with exit code 75 at the signals that preempt it; other commands end by them as
    every program does. `words` are those of the command line, without its name.
    """
    command = next((word for word in words if not word.startswith("-")), "")
    for number in (signal.SIGINT, *(PREEMPTING if command == "train" else ())):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt if number == signal.SIGINT else _preempt)


def release(numbers: Iterable[int] = (signal.SIGINT, *PREEMPTING)) -> None:
    """Let guarded signals end the process again, as the system has them do."""
    for number in numbers:
        if signal.getsignal(number) in (_interrupt, _preempt):
            signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):
        _leave(INTERRUPTED, "stopped: Ctrl-C came while SynthCube was starting.")
    raise KeyboardInterrupt


def _preempt(number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    _leave(
        PreemptedError.exit_code,
        f"stopped: {name} came before the training began. The same command starts it again.",
    )


def _leave(code: int, text: str) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, bar_eraser + f"{text}\n".encode())
    os._exit(code)


def _is_importing(frame: FrameType | None) -> bool:
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
