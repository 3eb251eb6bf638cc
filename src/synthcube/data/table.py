"""The CSV behind a manifest as text: cells by line and column, and a header that can be used."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from synthcube.errors import ManifestError
from synthcube.escapes import from_spreadsheet, visible

KNOWN_COLUMNS = ("SubjectID", "Label", "LabelMapping", "Split")

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", re.ASCII)
_CHANNEL = re.compile(r"Channel_(\d+)")


@dataclass(frozen=True, slots=True)
class Table:
    """Stripped cells by line number, in the header's order; `faults` are the lines that do not
    fit."""

    header: tuple[str, ...]
    lines: dict[int, list[str]]
    faults: tuple[str, ...]

    @property
    def records(self) -> dict[int, dict[str, str]]:
        """The cells by line number and column."""
        return {
            number: dict(zip(self.header, cells, strict=True))
            for number, cells in self.lines.items()
        }

    def column(self, name: str) -> dict[int, str]:
        """The cells of a column by line number; empty where there is no such column."""
        if name not in self.header:
            return dict.fromkeys(self.lines, "")
        place = self.header.index(name)
        return {number: cells[place] for number, cells in self.lines.items()}


def read_table(path: Path) -> Table:
    """Read a UTF-8 CSV (a byte order mark is fine); empty lines are skipped.

    Raises:
        ManifestError: it is not a CSV in UTF-8, or holds no row below the header.
    """
    header: list[str] = []
    lines = {}
    faults = []
    for number, cells in _lines(path):
        if not header:
            header = cells
        elif len(cells) == len(header):
            lines[number] = cells
        else:
            faults.append(f"row {number}: {len(cells)} cells, but the header has {len(header)}")
    if not lines and not faults:
        found = "only a header" if header else "nothing"
        raise ManifestError(f"{path} is empty: it holds {found}; one row per image is needed.")
    return Table(tuple(header), lines, tuple(faults))


def channel_columns(path: Path, header: Sequence[str]) -> list[str]:
    """The columns Channel_0 to Channel_N, in this order.

    Raises:
        ManifestError: there is none, one is missing, or a column is there twice or misspelt.
    """
    found = ", ".join(name or "(no name)" for name in header)
    count = sum(_CHANNEL.fullmatch(name) is not None for name in header)
    expected = [f"Channel_{i}" for i in range(count)]
    exact = {name.casefold(): name for name in (*KNOWN_COLUMNS, *expected, "Channel_0")}
    faults = [
        f"the column {name!r} is there twice"
        for name in sorted(set(header))
        if header.count(name) > 1
    ]
    # a misspelt "split" would pass for a condition, and training would see the test images
    faults += [
        f"the column {name!r} should be spelled {exact[name.casefold()]!r}"
        for name in header
        if exact.get(name.casefold(), name) != name
    ]
    if not count:
        hint = " Separate the columns with commas." if set(found) & set(";\t") else ""
        raise ManifestError(
            f"{path} has no column Channel_0 with the images; its columns are: {found}.{hint}",
            faults,
        )
    missing = [name for name in expected if name not in header]
    if missing:
        faults.append(f"channels count from 0 without a gap, but {missing[0]} is missing")
    if faults:
        raise ManifestError(f"The header of {path} is faulty; its columns are: {found}.", faults)
    return expected


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines that hold something, with their numbers."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ManifestError(f"{path} is binary, not text; a CSV in UTF-8 is needed.")
        if found := _CONTROL.search(text):
            line_number = text.count("\n", 0, found.start()) + 1
            raise ManifestError(
                f"{path}, line {line_number} holds {visible(found[0])}, a control character: "
                "take it out."
            )
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for line in reader:
            cells = [from_spreadsheet(cell.strip()) for cell in line]
            if any(cells):
                yield reader.line_num, cells
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} is not text in UTF-8 (byte {error.start}); a CSV in UTF-8 is needed."
        ) from error
    except csv.Error as error:
        raise ManifestError(f"{path} is not a valid CSV: {error}.") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}.") from error
