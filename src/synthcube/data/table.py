"""The CSV behind a manifest as text: cells by line and column, and a header that can be used."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from synthcube.errors import ManifestError

KNOWN_COLUMNS = ("SubjectID", "Label", "LabelMapping", "Split")

_CHANNEL = re.compile(r"Channel_(\d+)")


@dataclass(frozen=True, slots=True)
class Table:
    """Stripped cells by line number and column; `faults` are the lines that do not fit."""

    header: tuple[str, ...]
    records: dict[int, dict[str, str]]
    faults: tuple[str, ...]


def read_table(path: Path) -> Table:
    """Read a UTF-8 CSV (a byte order mark is fine); empty lines are skipped.

    Raises:
        ManifestError: it is not a CSV in UTF-8, or holds no row below the header.
    """
    lines = [line for line in _lines(path) if any(line[1])]
    if len(lines) < 2:
        found = "only a header" if lines else "nothing"
        raise ManifestError(f"{path} is empty: it holds {found}; one row per image is needed.")
    header = lines[0][1]
    records = {}
    faults = []
    for number, cells in lines[1:]:
        if len(cells) == len(header):
            records[number] = dict(zip(header, cells, strict=True))
        else:
            faults.append(f"row {number}: {len(cells)} cells, but the header has {len(header)}")
    return Table(tuple(header), records, tuple(faults))


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


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ManifestError(f"{path} is binary, not text; a CSV in UTF-8 is needed.")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path} is not text in UTF-8 (byte {error.start}); a CSV in UTF-8 is needed."
        ) from error
    except csv.Error as error:
        raise ManifestError(f"{path} is not a valid CSV: {error}.") from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}.") from error
