"""What a person is told while a command runs: the package's log, on standard error."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("synthcube")


def is_terminal() -> bool:
    """Whether a person watches: progress bars are for people, lines are for logs."""
    return sys.stderr.isatty()


def open_log(*, debug: bool = False) -> None:
    """Send the package's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if debug else logging.INFO)
