"""What a person sees of long work: a live bar on a terminal, now and then a line in a log.

Nothing else draws, and nothing else colours. Only the first of several processes shows anything:
the others log warnings alone. rich finds out what the terminal can do (TERM, NO_COLOR); it is
imported only where there is one.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, TypeVar

from synthcube import interruption

if TYPE_CHECKING:
    import rich.console
    import rich.progress

log = logging.getLogger("synthcube")

T = TypeVar("T")

_REDRAW_S = 0.1
_FIRST_LINE_S = 5.0
_LINE_EVERY_SHARE = 0.2
"""Lines in a log come every 5 s at first, later after each 20% of the time so far."""

_TABLE_WIDTH = 110  # where there is no terminal

_open: list[Progress] = []  # work in progress; the last, innermost one is on the screen


class Progress:
    """How far a piece of work is, shown inside a `with` block; inside another, in place of it.

    There is no thread that redraws: forked loader processes must not inherit its locks.

    Args:
        title: what is done, as in "Reading images".
        total: how many there are to do; None: not known yet, see :meth:`begin`.
        unit: what is counted, in the singular.
        bar_after_s: seconds until the bar appears.
        has_lines: whether it logs how far it is where there is no terminal.
        in_notebook: whether a notebook counts as a terminal.
    """

    def __init__(
        self, title: str, total: int | None = None, unit: str = "image", *,
        bar_after_s: float = 0.0, has_lines: bool = True, in_notebook: bool = False,
    ) -> None:  # fmt: skip
        self.title, self.unit, self.facts = title, unit, ""
        self.done, self.total = 0, total
        self._bar_after_s, self._has_lines = bar_after_s, has_lines
        self._in_notebook = in_notebook and "ipykernel" in sys.modules
        self._bar: rich.progress.Progress | None = None
        self.draws = False
        """Whether there is a terminal to draw on."""
        self.ends_at: float | None = None
        """When the work ends at the latest, as `time.monotonic` counts; None: when it is done."""
        self._logs = False
        self.begin(0, total)

    def begin(self, done: int, total: int | None) -> None:
        """Count from `done` on; what an earlier process has done counts for no speed."""
        self.done = self._done_before = done
        self.total = total
        self._start = self._last = time.monotonic()
        self._next_line = self._start + _FIRST_LINE_S

    def __enter__(self) -> Progress:
        is_first = log.level <= logging.INFO  # the others log only warnings
        self.draws = is_first and (self._in_notebook or can_draw())
        self._logs = is_first and self._has_lines and not self.draws
        self.begin(self.done, self.total)
        if _open:
            _open[-1]._hide()
        _open.append(self)
        if self.total is not None:
            self.draw()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, number: int = 1) -> None:
        """Count `number` more as done."""
        self.done += number
        now = time.monotonic()
        if self.draws and now - self._last >= _REDRAW_S:
            self.draw()
        elif self._logs and now >= self._next_line:
            self._next_line = now + max(_FIRST_LINE_S, _LINE_EVERY_SHARE * (now - self._start))
            log.info("%s: %s", self.title, ", ".join([self.share, self.speed, *self.time_left()]))

    def draw(self) -> None:
        """Draw the bar now, where there is one."""
        now = time.monotonic()
        is_innermost = bool(_open) and _open[-1] is self
        if not (self.draws and is_innermost) or now - self._start < self._bar_after_s:
            return
        self._last = now
        facts = "  ".join(filter(None, [self.share, *self.time_left(), self.facts or self.speed]))
        bar = self._bar or self._opened(facts)
        bar.update(
            bar.task_ids[0], completed=self.done, total=self.total, description=self.title,
            facts=facts,
        )  # fmt: skip
        bar.refresh()

    def close(self) -> None:
        """Remove the bar from the screen."""
        self.draws = self._logs = False
        self._hide()
        if self in _open:
            _open.remove(self)

    def _hide(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar, interruption.bar_eraser = None, b""

    @property
    def share(self) -> str:
        """How much is done, as in "40 of 100"."""
        return f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"

    @property
    def speed(self) -> str:
        """The mean speed since the beginning; empty until something is done."""
        per_s = (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)
        if not per_s:
            return ""
        return f"{1 / per_s:.1f} s/{self.unit}" if per_s < 1 else f"{per_s:.1f} {self.unit}s/s"

    def time_left(self) -> list[str]:
        """The time that the rest takes at this speed, as in ["0:03:20 left"]; [] if unknown."""
        since = self.done - self._done_before
        if self.total is None or not since:
            return []
        now = time.monotonic()
        left_s = (now - self._start) / since * max(0, self.total - self.done)
        if self.ends_at is not None:
            left_s = min(left_s, max(0.0, self.ends_at - now))
        return [f"{clock(left_s)} left"]

    def _opened(self, facts: str) -> rich.progress.Progress:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        texts = ("{task.description}", "{task.fields[facts]}")
        title, right = (TextColumn(text, markup=False) for text in texts)
        console = _console(sys.stderr, is_terminal=self._in_notebook)
        bar = Bar(
            title, BarColumn(bar_width=None), right,
            console=console, auto_refresh=False, transient=True, expand=True,
        )  # fmt: skip
        bar.add_task(self.title, total=self.total, facts=facts)
        self._bar = bar  # before it is on the screen: Ctrl-C may come in between
        interruption.bar_eraser = b"\r\x1b[2K"
        bar.start()
        console.show_cursor(True)  # whatever ends this process, the cursor is there
        return bar

    @property
    def console(self) -> rich.console.Console | None:
        """Where the bar is, if it is on the screen."""
        return self._bar.console if self._bar else None


def followed(
    items: Iterable[T], total: int, title: str, unit: str = "image", **options: Any
) -> Iterator[T]:
    """The items one by one, while a bar or lines in the log show how far they are."""
    with Progress(title, total, unit, **options) as progress:
        for item in items:
            yield item
            progress.advance()


def clear() -> None:
    """Remove the bars of work that was left, as by an exception that still holds its frame."""
    while _open:
        _open[-1].close()


def print_line(text: str, style: str = "", *, to_stderr: bool = False, end: str = "\n") -> None:
    """Print a text, in a colour or style where the terminal has it; above the bar, if there is one.

    Args:
        text: without control characters.
        style: of rich, as in "red" or "bold".
    """
    stream = sys.stderr if to_stderr else sys.stdout
    console = _open[-1].console if _open else None
    if console is None and not (style and stream.isatty()):
        print(text, end=end, file=stream, flush=True)
        return
    from rich.text import Text

    (console or _console(stream)).print(Text(text, style), end=end, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose last column is wrapped; text without control characters."""
    from rich.table import Table
    from rich.text import Text

    console = _console(sys.stdout)
    if not sys.stdout.isatty():
        console.width = _TABLE_WIDTH  # in a file no line is lost to a narrow terminal
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


class LogHandler(logging.StreamHandler[IO[str]]):
    """Writes the log to standard error: warnings yellow, errors red, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.closed:
            return
        if not self.stream.isatty():
            super().emit(record)
            return
        style = "red" if record.levelno >= logging.ERROR else "yellow"
        try:
            text = self.format(record)
            print_line(text, style if record.levelno >= logging.WARNING else "", to_stderr=True)
        except Exception:
            self.handleError(record)


def can_draw() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    return sys.stderr.isatty() and not _console(sys.stderr).is_dumb_terminal


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, as in "1:02:03"."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _console(stream: IO[str], *, is_terminal: bool = False) -> rich.console.Console:
    from rich.console import Console

    # In a notebook rich would draw with ipywidgets, and warn where they are not installed.
    return Console(
        file=stream, force_jupyter=False, force_terminal=is_terminal or None, highlight=False
    )
