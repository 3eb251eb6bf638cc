"""Signals that end a training early, in good order, to be continued by the same command."""

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
    """Listens for signals: while nothing can be lost they stop the task at once.

    While steps are taken they are only remembered, in `heard`, until a checkpoint is saved.
    """

    def __init__(self, signals: Sequence[str]) -> None:
        self.signals = [signal.Signals[name] for name in signals]
        self.heard: str | None = None
        self._patient = False
        self._raised: PreemptedError | None = None
        self._repetition: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[Preemption]:
        """Handle the signals inside; outside they mean what they meant before."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # the signals of a notebook's or a server's thread are not ours
            return
        before = {each: signal.getsignal(each) for each in self.signals}
        report = sys.unraisablehook
        self.listen()
        interruption.release(set(interruption.PREEMPTING) - set(self.signals))
        sys.unraisablehook = lambda lost: None if self._is_repeated(lost) else report(lost)
        try:
            yield self
        except Exception as error:
            if self._raised:  # a library has made an error of its own of it
                raise self._raised from error
            raise
        finally:
            sys.unraisablehook = report
            if self._repetition:
                self._repetition.cancel()
            for each, handler in before.items():
                signal.signal(each, handler)
            interruption.release(interruption.PREEMPTING)

    def listen(self) -> None:
        """Take the signals, also back from somebody who took them from us."""
        if threading.current_thread() is threading.main_thread():
            for each in self.signals:
                signal.signal(each, self._hear)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, a signal is remembered instead of stopping at once."""
        before, self._patient = self._patient, True
        try:
            self.stop_if_heard()
            yield
        finally:
            self._patient = before

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Inside, a signal breaks off what is done, which nobody will miss."""
        before, self._patient = self._patient, False
        try:
            if self.heard:
                raise PreemptedError(f"{self.heard} came.")
            yield
        except PreemptedError:
            if not before:
                raise
            self._raised = None
        finally:
            self._patient = before

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.heard = self.heard, signal.Signals(number).name
        if again == self.heard == "SIGINT":
            raise KeyboardInterrupt  # a person who asks twice means now
        if not self._patient:
            self._raised = self._stopped()
            raise self._raised

    def stop_if_heard(self) -> None:
        """
        Raises:
            PreemptedError: a signal came, and was remembered only, or its error was swallowed.
        """
        if self.heard:
            raise self._stopped()

    def _stopped(self) -> PreemptedError:
        return PreemptedError(f"{self.heard} came between steps: nothing is lost. {_AGAIN}")

    def _is_repeated(self, lost: sys.UnraisableHookArgs) -> bool:
        """Whether Python drops our exception, as in a destructor: the signal is sent once more."""
        if not isinstance(lost.exc_value, PreemptedError):
            return False
        number, self.heard = signal.Signals[str(self.heard)], None
        main = threading.main_thread().ident
        self._repetition = threading.Timer(0.01, signal.pthread_kill, [main, number])
        self._repetition.start()
        return True

    def stop(self, epoch: int, step: int, saved: Any) -> PreemptedError:
        """The error with which a training ends whose checkpoint is saved."""
        return PreemptedError(
            f"{self.heard or 'A signal'} came in epoch {epoch + 1}, after step {step}. Saved as "
            f"{saved}. {_AGAIN}"
        )
