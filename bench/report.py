"""What every bench takes and gives: options in, rows of one table out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    quick: bool = False  # tiny numbers that prove nothing but that the bench runs
    output: Path | None = None  # a picture, for the benches that draw one


@dataclass(frozen=True)
class Row:
    """One measurement, and the bound it is held to where there is one."""

    name: str
    value: float
    shown: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        low, high = self.at_least, self.at_most
        if low is not None and high is not None:
            return f"{low:g} to {high:g}"
        if high is not None:
            return f"<= {high:g}"
        return f">= {low:g}" if low is not None else ""

    @property
    def is_met(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


def table(rows: Sequence[Row], options: Options) -> str:
    """The rows as a Markdown table."""
    lines = ["| name | measured | bound | verdict |", "| --- | --- | --- | --- |"]
    for row in rows:
        verdict = "" if options.quick or not row.bound else "met" if row.is_met else "MISSED"
        lines.append(f"| {row.name} | {row.shown} | {row.bound} | {verdict} |")
    return "\n".join(lines)


def exit_code(rows: Sequence[Row], options: Options) -> int:
    """1 where a bound is missed and the numbers mean something."""
    return int(not options.quick and not all(row.is_met for row in rows))
