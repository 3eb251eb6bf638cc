"""metrics.csv: one row for each thing logged, continued when a run resumes."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from synthcube import reading
from synthcube.errors import OutputError
from synthcube.storage import explained, write_with

FIRST = ("epoch", "step")


class MetricsTable(Logger):
    """Appends rows of epoch, step and named numbers; a new name rewrites the header."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = list(FIRST)
        if path.exists():
            self.columns = next(self._lines(), self.columns)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: f"{value:.8g}" for name, value in metrics.items() if name != "epoch"}
        row |= {"epoch": f"{int(metrics.get('epoch', 0))}", "step": str(step)}
        new = [name for name in row if name not in self.columns]
        if new or not self.path.exists():
            rows = self._read()
            self.columns += new
            self._rewrite(rows)
        with explained(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def drop_after(self, step: int, *, within_epoch: bool) -> None:
        """Forget what a killed run logged after the checkpoint that it resumes from.

        Args:
            within_epoch: the checkpoint is older than what that epoch came to.
        """
        if self.path.exists():
            last_epoch_row = step - 1 if within_epoch else step
            kept = [
                row
                for row in self._read()
                if int(row["step"]) <= (last_epoch_row if _is_of_epoch(row) else step)
            ]
            self._rewrite(kept)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        lines = self._lines()
        header = next(lines, [])
        # of a killed run the last row may be short
        rows = [dict(itertools.zip_longest(header, line[: len(header)])) for line in lines]
        rows = [{name: cell or "" for name, cell in row.items() if name} for row in rows]
        return [row for row in rows if _is_step(row.get("step", ""))]

    def _lines(self) -> Iterator[list[str]]:
        text = reading.read_text(self.path, OutputError, limit=reading.MAX_LIST_BYTES)
        try:
            yield from csv.reader(io.StringIO(text, newline=""))
        except csv.Error as error:
            raise OutputError(f"{self.path} is not a valid CSV: {error}.") from error

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)

        write_with(self.path, write)


def _is_step(text: str) -> bool:
    return text.isdecimal() and len(text) < 20


def _is_of_epoch(row: Mapping[str, str]) -> bool:
    return any(value for name, value in row.items() if name.endswith("/loss"))
