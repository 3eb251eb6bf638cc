"""The list of images: read from a CSV or a plain folder, checked as a whole, written back."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from synthcube.data.labels import class_labels, natural_key
from synthcube.data.table import KNOWN_COLUMNS, channel_columns, read_table
from synthcube.errors import ManifestError, OutputError
from synthcube.escapes import hidden_in, is_utf8, spreadsheet
from synthcube.runtime import told
from synthcube.storage import recovered_folder, write_text

SUFFIXES = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLITS = ("train", "validation", "test")
FILE_NAME = "manifest.csv"
MAX_SHOWN = 20
_UNLABELLED = (-1, "")


@dataclass(frozen=True, slots=True)
class Row:
    """One image: its channel files (absolute paths), whose it is, and what is known of it."""

    channels: tuple[Path, ...]
    subject: str
    label: int = -1
    label_name: str = ""
    split: str = ""
    conditions: Mapping[str, str] = field(default_factory=dict, hash=False)
    number: int = 0
    """Line in the CSV (the header is line 1); in a plain folder the running number from 1."""

    @property
    def name(self) -> str:
        """A stem for output files, unique within a manifest: number and subject."""
        subject = re.sub(r"[^A-Za-z0-9._-]+", "_", self.subject).strip("._")
        return f"{self.number:05d}-{subject[:80] or 'image'}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """All rows, and the CSV or folder they were read from."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, in the order of their ids; an id that no row has is named by its number."""
        names = {row.label: row.label_name for row in self.rows if row.label >= 0}
        return tuple(names.get(i, str(i)) for i in range(max(names, default=-1) + 1))


def image_suffix(path: Path) -> str:
    """The known image suffix that a file's name ends in, in lower case, or an empty string."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def name_fault(name: str) -> str:
    """Why the name of a file can be in no manifest; empty where it can."""
    if not is_utf8(name):
        return "the name is not UTF-8; rename it"
    if "\n" in name or "\t" in name or hidden_in(name):
        return "the name holds a character that no screen shows; rename it"
    return ""


def capped(faults: Sequence[str]) -> list[str]:
    """The first faults, and how many more there are: a screen, not a flood."""
    more = len(faults) - MAX_SHOWN
    return [*faults[:MAX_SHOWN], *([f"and {more} more"] if more > 0 else [])]


def read_manifest(data: Path) -> Manifest:
    """Read a CSV, a folder that holds a manifest.csv, or a plain folder of images.

    Raises:
        ManifestError: nothing is there, nothing is in it, or rows are faulty (all are listed).
    """
    if not data.exists():
        raise ManifestError(
            f"data_path {data} does not exist; a CSV or a folder of images is needed."
        )
    if not data.is_dir():
        return _read_csv(data)
    csv_path = recovered_folder(data) / FILE_NAME
    return _read_csv(csv_path) if csv_path.is_file() else _read_folder(data)


def require_outside(outputs: Mapping[str, Path | None], manifest: Manifest) -> None:
    """Refuse an output folder that holds images of the manifest.

    Raises:
        OutputError: which, and a folder of such images.
    """
    existing = {name: path for name, path in outputs.items() if path and path.is_dir()}
    if not existing:
        return
    folders = {path.parent for row in manifest.rows for path in row.channels}
    read = {_identity(folder): folder for folder in folders}
    for name, output in existing.items():
        for written, _, _ in os.walk(output):
            if folder := read.get(_identity(written)):
                raise OutputError(
                    f"{name} {output} holds images that are read (in {folder}): give another one."
                )


def _identity(folder: Path | str) -> tuple[int, int]:
    """What a folder is to the system, by whatever path it is reached."""
    stat = Path(folder).stat()
    return stat.st_dev, stat.st_ino


def write_manifest(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV in one step; columns in the order in which the rows bring them.

    What a spreadsheet would compute is written so that it does not; whoever reads the file
    without :func:`read_table` needs :func:`from_spreadsheet`.

    Raises:
        ManifestError: there are no rows.
        OutputError: `path` cannot be written.
    """
    if not rows:
        raise ManifestError(f"There are no rows to write to {path}.")
    write_text(path, manifest_text(rows))


def manifest_text(rows: Sequence[Mapping[str, str]]) -> str:
    """The CSV of a manifest; columns in the order in which the rows bring them."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(spreadsheet, columns))
    writer.writerows([spreadsheet(row.get(column, "")) for column in columns] for row in rows)
    return text.getvalue()


def _read_folder(folder: Path) -> Manifest:
    base = folder.absolute()
    names = sorted(
        (
            path.relative_to(base).as_posix()
            for path in base.rglob("*")
            if image_suffix(path)
            and not any(part.startswith(".") for part in path.relative_to(base).parts)
            and path.is_file()
        ),
        key=natural_key,
    )
    if not names:
        raise ManifestError(
            f"data_path {folder} holds no {FILE_NAME} and no image; "
            f"an image's name ends in one of {', '.join(SUFFIXES)}."
        )
    if faults := [f"{name}: {fault}" for name in names if (fault := name_fault(name))]:
        raise ManifestError(f"data_path {folder} holds names that cannot be used:", capped(faults))
    rows = (
        Row((base / name,), subject=name[: -len(image_suffix(Path(name)))], number=number)
        for number, name in enumerate(names, start=1)
    )
    return Manifest(folder, tuple(rows))


def _read_csv(path: Path) -> Manifest:
    table = read_table(path)
    channels = channel_columns(path, table.header)
    conditions = [name for name in table.header if name not in (*KNOWN_COLUMNS, *channels)]
    labels, label_faults = class_labels(table.column("Label"), table.column("LabelMapping"))
    faults = list(table.faults)
    files = _Files(path.absolute().parent)
    rows = []
    for number, line in told(table.lines.items(), len(table.lines), f"Reading {path}"):
        cells = dict(zip(table.header, line, strict=True))
        label, label_name = labels.get(number, _UNLABELLED)
        row = Row(
            tuple([files[cells[name]] for name in channels]),
            cells.get("SubjectID", f"row-{number}"), label, label_name, cells.get("Split", ""),
            {name: cells[name] for name in conditions}, number,
        )  # fmt: skip
        faults += [
            f"row {number}, column {name}: {fault}"
            for name in channels
            if (fault := files.faults.get(cells[name]))
        ]
        faults += _cell_faults(row)
        rows.append(row)
    faults += label_faults + _split_faults(rows)
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ManifestError(f"{path} has {count}:", capped(faults))
    return Manifest(path, tuple(rows))


def _cell_faults(row: Row) -> list[str]:
    faults = []
    if not row.subject:
        faults.append(f"row {row.number}, column SubjectID: the cell is empty")
    if row.split and row.split not in SPLITS:
        faults.append(
            f"row {row.number}, column Split: {row.split!r} is not known; "
            f"use {', '.join(SPLITS)}, or leave the cell empty"
        )
    return faults


class _Files(dict[str, Path]):
    """The file that a cell names, and in `faults` what is wrong with it; each looked at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.faults: dict[str, str] = {}

    def __missing__(self, cell: str) -> Path:
        file = self[cell] = self.folder / cell
        if not cell:
            self.faults[cell] = "the cell is empty"
        elif not cell.lower().endswith(SUFFIXES):
            self.faults[cell] = (
                f"{cell} is not a known image; its name should end in {', '.join(SUFFIXES)}"
            )
        elif not os.path.isfile(file):  # noqa: PTH113  # also where the name is too long for any
            self.faults[cell] = f"{file} is {'not a file' if os.path.exists(file) else 'missing'}"  # noqa: PTH110
        return file


def _split_faults(rows: Iterable[Row]) -> list[str]:
    """One fault for each subject whose images are in more than one split."""
    first: dict[str, str] = {}
    splits: dict[str, set[str]] = {}
    for row in rows:
        split = first.setdefault(row.subject, row.split)
        if split != row.split:
            splits.setdefault(row.subject, {split}).add(row.split)
    return [
        f"subject {subject!r} is in several splits: "
        f"{', '.join(sorted(name or '(empty)' for name in names))}; a subject belongs to one"
        for subject, names in splits.items()
    ]
