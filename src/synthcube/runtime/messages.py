"""What a person is told while a command runs: the package's log, on standard error."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from synthcube.escapes import visible

T = TypeVar("T")

log = logging.getLogger("synthcube")


def is_terminal() -> bool:
    """Whether a person watches: progress bars are for people, lines are for logs."""
    return sys.stderr.isatty()


class _Visible(logging.Formatter):
    """Names of others in a line give no orders to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def told(items: Iterable[T], total: int, doing: str, seconds: float = 5.0) -> Iterator[T]:
    """The items, while the log is told every few seconds how many of them went by.

    Args:
        doing: what is being done, as "Reading FILE".
    """
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            log.info("%s: %d of %d ...", doing, number, total)
        yield item


def open_log(*, debug: bool = False) -> None:
    """Send the package's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.INFO)
