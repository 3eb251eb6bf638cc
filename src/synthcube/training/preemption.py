"""Signals that stop a training early, with a checkpoint: the same command continues it.

A stopped training ends with exit code 75: see `PreemptedError.exit_code` in errors.py.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from synthcube import interruption
from synthcube.errors import PreemptedError

_AGAIN = "The same command goes on from there."


class Preemption:
    """Handles the signals that stop a task: at once, or in training after a checkpoint.

    Inside `deferred` a signal is only stored in `heard`, until a checkpoint is saved.
    """

    def __init__(self, signals: Sequence[str]) -> None:
        self.signals = [signal.Signals[name] for name in signals]
        self.heard: str | None = None
        self._deferred = False
        self._raised: PreemptedError | None = None
        self._repetition: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[Preemption]:
        """Handle the signals inside; the earlier handlers are restored afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # signals in a notebook or a server are not ours to handle
            return
        handlers = {number: signal.getsignal(number) for number in self.signals}
        report = sys.unraisablehook
        self.listen()
        interruption.release(set(interruption.PREEMPTING) - set(self.signals))
        sys.unraisablehook = lambda lost: None if self._is_repeated(lost) else report(lost)
        try:
            yield self
        except Exception as error:
            if self._raised:  # a library has wrapped our exception in its own
                raise self._raised from error
            raise
        finally:
            sys.unraisablehook = report
            if self._repetition:
                self._repetition.cancel()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            interruption.release(interruption.PREEMPTING)

    def listen(self) -> None:
        """Install the handlers, again where a library has replaced them."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._hear)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Store a signal inside instead of stopping at once."""
        before, self._deferred = self._deferred, True
        try:
            self.stop_if_heard()
            yield
        finally:
            self._deferred = before

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Leave the block at once when a signal comes: for work that can be dropped."""
        before, self._deferred = self._deferred, False
        try:
            if self.heard and not before:
                raise self._stopped()
            yield  # a deferred signal stops the caller after this block, which cannot be skipped
        except PreemptedError:
            if not before:
                raise
            self._raised = None
        finally:
            self._deferred = before

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.heard = self.heard, signal.Signals(number).name
        if again == self.heard == "SIGINT":
            raise KeyboardInterrupt  # Ctrl+C twice: stop now
        if not self._deferred:
            self._raised = self._stopped()
            raise self._raised

    def stop_if_heard(self) -> None:
        """Raise PreemptedError if a signal came and its error was deferred or swallowed."""
        if self.heard:
            raise self._stopped()

    def _stopped(self) -> PreemptedError:
        return PreemptedError(f"{self.heard} came between steps: nothing is lost. {_AGAIN}")

    def _is_repeated(self, lost: sys.UnraisableHookArgs) -> bool:
        """Whether Python drops our exception, as in a destructor; then sends the signal again."""
        if not isinstance(lost.exc_value, PreemptedError):
            return False
        number, self.heard = signal.Signals[str(self.heard)], None
        main = threading.main_thread().ident
        self._repetition = threading.Timer(0.01, signal.pthread_kill, [main, number])
        self._repetition.start()
        return True

    def stop(self, epoch: int, step: int, saved: Any) -> PreemptedError:
        """The error that ends a training once its checkpoint is saved."""
        return PreemptedError(
            f"{self.heard or 'A signal'} came in epoch {epoch + 1}, after step {step}. Saved as "
            f"{saved}. {_AGAIN}"
        )
