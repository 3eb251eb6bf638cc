"""Tables of text: a CSV with any of the usual delimiters, packed or not, cell by cell."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from synthcube.errors import ManifestError
from synthcube.escapes import from_spreadsheet, visible
from synthcube.reading import MAX_LIST_BYTES

TABLE_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
KNOWN_COLUMNS = ("SubjectID", "Label", "LabelMapping", "Split")
"""Columns that have a meaning in a manifest, beside those of CHANNEL."""
CHANNEL = re.compile(r"Channel_(\d+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", re.ASCII)
_GZIP = b"\x1f\x8b"  # how such a file begins


@dataclass(frozen=True, slots=True)
class CsvTable:
    """Stripped cells of a CSV by line number; `faults` names lines that do not fit the header."""

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


def read_table(path: Path) -> CsvTable:
    """Read a CSV in UTF-8; empty lines are skipped.

    Its cells are separated by commas, semicolons or tabs. It may begin with a byte order mark, and
    it may be packed with gzip.
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
        content = "only a header" if header else "nothing"
        raise ManifestError(f"{path} is empty: it holds {content}; one row per image is needed.")
    return CsvTable(tuple(header), lines, tuple(faults))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines that hold something, with their numbers."""
    try:
        text = _unpacked(path).decode("utf-8-sig")
        if "\0" in text:
            raise ManifestError(f"{path} is binary, not text; a CSV in UTF-8 is needed.")
        if control := _CONTROL.search(text):
            line_number = text.count("\n", 0, control.start()) + 1
            raise ManifestError(
                f"{path}, line {line_number} holds {visible(control[0])}, a control character: "
                "remove it."
            )
        reader = csv.reader(
            io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(text, path)
        )
        has_apostrophes = "'" in text
        for line in reader:
            cells = [cell.strip() for cell in line]
            if has_apostrophes:
                cells = [from_spreadsheet(cell) for cell in cells]
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


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_GZIP):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            content = packed.read(MAX_LIST_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ManifestError(f"{path} is a damaged gzip file: copy it again.") from error
    if len(content) > MAX_LIST_BYTES:
        raise ManifestError(f"{path} unpacks to more than {MAX_LIST_BYTES >> 20} MB: unpack it.")
    return content


def _delimiter(text: str, path: Path) -> str:
    """What separates the cells of the first line: the one that leaves a known column, or most."""
    line = next((line for line in io.StringIO(text) if line.strip()), "")
    if "\t" in line and path.name.lower().endswith((".tsv", ".tsv.gz")):
        return "\t"
    bare = re.sub(r'"[^"]*"', "", line)
    cells = {mark: [cell.strip(' "\n') for cell in line.split(mark)] for mark in ",;\t"}
    return max(
        cells,
        key=lambda mark: (
            any(name in KNOWN_COLUMNS or CHANNEL.fullmatch(name) for name in cells[mark]),
            bare.count(mark),
        ),
    )
