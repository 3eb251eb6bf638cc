"""The list of images: read from a CSV or a plain folder, checked as a whole, written back."""

from __future__ import annotations

import csv
import gc
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from synthcube.data.tables import CHANNEL, KNOWN_COLUMNS, CsvTable, read_table
from synthcube.errors import ManifestError, OutputError, first_faults
from synthcube.escapes import hidden_in, is_utf8, spreadsheet
from synthcube.reading import open_file
from synthcube.storage import recovered_folder, write_text
from synthcube.terminal import followed

SUFFIXES = (".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
_DICOM_SUFFIXES = (".dcm", ".dicom")
_DICOM_START = 4096  # bytes that hold the magic word and the transfer syntax
SPLITS = ("train", "validation", "test")
_SPLIT_CELLS = ("", *SPLITS)
FILE_NAME = "manifest.csv"
MAX_CLASSES = 10_000
"""A larger id is a code, not a class: it would size the model's embedding."""
_UNLABELLED = (-1, "")
_BIDS = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)(?=[/_.]|$)")
# The name up to its first number, where more follows: case_0001 of case_0001_t1, p01 of p01/t1.
_PERSON = re.compile(r"(.*?\d+[A-Za-z]*)[/_.-]")
_INTEGER = re.compile(r"[+-]?\d+(\.0+)?")  # spreadsheets and pandas write 1 as 1.0
Labels = dict[int, tuple[int, str]]
"""Class id and name by line number; lines without a class are not in it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image: its channel files (absolute paths), subject, label, split and conditions."""

    channels: tuple[Path, ...]
    subject: str
    label: int = -1
    label_name: str = ""
    split: str = ""
    conditions: Mapping[str, str] = field(default_factory=dict, hash=False)
    number: int = 0
    """Line in the CSV (the header is line 1); in a plain folder the running number from 1."""
    slice: int | None = None
    """The slice that is meant, of volumes that are read slice by slice (data.slices)."""

    @property
    def name(self) -> str:
        """A stem for output files, unique within a manifest: number and subject, and the slice."""
        subject = re.sub(r"[^A-Za-z0-9._-]+", "_", self.subject).strip("._")
        ending = "" if self.slice is None else f"-slice_{self.slice:04d}"
        return f"{self.number:05d}-{subject[:80] or 'image'}{ending}"

    @property
    def channel_cells(self) -> dict[str, str]:
        """Its files by column, Channel_0 and so on."""
        return {f"Channel_{index}": str(path) for index, path in enumerate(self.channels)}

    @property
    def known_cells(self) -> dict[str, str]:
        """Its other cells by column: SubjectID, the label and split if it has them, conditions."""
        cells = {"SubjectID": self.subject}
        if self.label >= 0:
            cells |= {"Label": str(self.label), "LabelMapping": self.label_name}
        if self.split:
            cells["Split"] = self.split
        return cells | dict(self.conditions)

    @property
    def cells(self) -> dict[str, str]:
        """All of its cells by column, as :func:`write_manifest` takes them."""
        return self.channel_cells | self.known_cells


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

    @property
    def has_subjects(self) -> bool:
        """Whether it names subjects: not a folder, and not only numbered rows."""
        if self.path.is_dir():
            return False
        return any(row.subject != f"row-{row.number}" for row in self.rows)


def read_manifest(data: Path) -> Manifest:
    """Read a CSV, a folder that holds a manifest.csv, or a plain folder of images."""
    if not data.exists():
        raise ManifestError(
            f"data_path {data} does not exist; a CSV or a folder of images is needed."
        )
    if not data.is_dir():
        return _read_csv(data)
    csv_path = recovered_folder(data) / FILE_NAME
    return _read_csv(csv_path) if csv_path.is_file() else _read_folder(data)


def write_manifest(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV in one step; columns in the order in which the rows bring them.

    Cells that a spreadsheet would compute are escaped; whoever reads the file
    without :func:`read_table` needs :func:`from_spreadsheet`.
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


def path_cell(file: Path | str, folder: Path) -> str:
    """A file's cell in a manifest that lies in `folder`."""
    return Path(os.path.relpath(file, folder)).as_posix()


def require_outside(outputs: Mapping[str, Path | None], manifest: Manifest) -> None:
    """Refuse an output folder that holds images of the manifest. Raises OutputError."""
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
    """Device and inode of a folder, the same for every path to it."""
    stat = Path(folder).stat()
    return stat.st_dev, stat.st_ino


def image_suffix(path: Path) -> str:
    """The known image suffix that a file's name ends in, in lower case, or an empty string."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, whatever its name, or is named so."""
    return path.suffix.lower() in _DICOM_SUFFIXES or bool(dicom_start(path))


def dicom_start(path: Path) -> bytes:
    """The first bytes of a DICOM file; nothing of any other file."""
    try:
        with open_file(path, ManifestError) as file:
            start = file.read(_DICOM_START)
    except (ManifestError, OSError):
        return b""
    return start if start[128:132] == b"DICM" else b""


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder; linked folders are followed, and none is entered twice."""
    entered: set[tuple[int, int]] = set()
    tops = [str(folder)]
    while tops:  # the links after what is really there, which keeps its own name
        links: list[str] = []
        for top in tops:
            for parent, folders, names in os.walk(top):
                if _identity(parent) in entered:
                    folders.clear()
                    continue
                entered.add(_identity(parent))
                paths = [Path(parent, name) for name in sorted(folders)]
                links += [str(path) for path in paths if path.is_symlink()]
                yield from (file for name in names if (file := Path(parent, name)).is_file())
        tops = links


def name_fault(name: str) -> str:
    """Why a file name cannot be in a manifest; empty if it can."""
    if not is_utf8(name):
        return "the name is not UTF-8; rename it"
    if "\n" in name or "\t" in name or hidden_in(name):
        return "the name holds a character that no screen shows; rename it"
    return ""


def bids_subject(name: str) -> str:
    """The subject that a BIDS path or name states, such as sub-01; empty if it states none."""
    stated = _BIDS.findall(name)
    return stated[-1] if stated else ""


def split_warning(subjects: Mapping[str, str]) -> str:
    """A warning if names suggest that one person is several subjects; empty otherwise.

    Args:
        subjects: the subject of each image, by its path without the suffix. A subject that was
            stated, and is not just the name of its image, is doubted only where BIDS contradicts.
    """
    people: dict[str, set[str]] = {}
    for name, subject in subjects.items():
        is_stated = not f"/{name}".endswith(f"/{subject}") and not subject.startswith("row-")
        before = None if is_stated else _PERSON.match(name)
        if person := bids_subject(name) or (before[1] if before else ""):
            people.setdefault(person, set()).add(subject)
    several = [person for person in people if len(people[person]) > 1]
    named = set().union(*people.values()) if people else set()
    if len(people) < 2 or not several or len(named) * 2 < len(set(subjects.values())):
        return ""
    shown = ", ".join(sorted(people, key=natural_key)[:3]) + (", ..." if len(people) > 3 else "")
    return (
        f"the file names look like {len(people)} people ({shown}), but they "
        f"count as {len(named)} subjects: one person could be in training and in validation. "
        "Say who is who in a column SubjectID (synthcube prepare writes the CSV), or put the "
        "images of each person into a folder and run synthcube prepare"
    )


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key that puts "scan2" before "scan10"; the same order on every machine."""
    parts = re.split(r"([0-9]+)", text.casefold())
    numbered = ((0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts))
    return tuple(numbered), text


def channel_columns(path: Path, header: Sequence[str]) -> list[str]:
    """The columns Channel_0 to Channel_N, in this order. Raises ManifestError."""
    listed = ", ".join(name or "(no name)" for name in header)
    count = sum(CHANNEL.fullmatch(name) is not None for name in header)
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
        raise ManifestError(
            f"{path} has no column Channel_0 with the images; its columns are: {listed}. If one of "
            f"them holds the images, synthcube prepare -d {path} --column Channel_0=ITS_NAME "
            "writes a manifest.",
            faults,
        )
    missing = [name for name in expected if name not in header]
    if missing:
        faults.append(f"channels count from 0 without a gap, but {missing[0]} is missing")
    if faults:
        raise ManifestError(f"The header of {path} is faulty; its columns are: {listed}.", faults)
    return expected


def _read_folder(folder: Path) -> Manifest:
    base = folder.absolute()
    names = sorted(
        (
            path.relative_to(base).as_posix()
            for path in files_below(base)
            if image_suffix(path)
            and not any(part.startswith(".") for part in path.relative_to(base).parts)
        ),
        key=natural_key,
    )
    if not names:
        if any(dicom_start(file) for file in files_below(base)):
            raise ManifestError(
                f"data_path {folder} holds DICOM files; synthcube prepare -d {folder} "
                "-o NEW_FOLDER makes images of them. Then give NEW_FOLDER."
            )
        raise ManifestError(
            f"data_path {folder} holds no {FILE_NAME} and no image; "
            f"an image's name ends in one of {', '.join(SUFFIXES)}."
        )
    if faults := [f"{name}: {fault}" for name in names if (fault := name_fault(name))]:
        raise ManifestError(
            f"data_path {folder} holds names that cannot be used:", first_faults(faults)
        )
    stems = [name[: -len(image_suffix(Path(name)))] for name in names]
    bids = [bids_subject(stem) for stem in stems]
    subjects = bids if all(bids) else stems
    rows = (
        Row((base / name,), subject=subject, number=number)
        for number, (name, subject) in enumerate(zip(names, subjects, strict=True), start=1)
    )
    return Manifest(folder, tuple(rows))


def _read_csv(path: Path) -> Manifest:
    """The manifest in a CSV. Raises ManifestError.

    Python's search for reference cycles waits: it would walk millions of rows again and again,
    which takes a third of the time of a long list.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return manifest_of(path, read_table(path))
    finally:
        if was_enabled:
            gc.enable()


def manifest_of(path: Path, table: CsvTable) -> Manifest:
    """The rows of a table that was read at `path`. Raises ManifestError."""
    place = {name: index for index, name in enumerate(table.header)}
    channels = [(name, place[name]) for name in channel_columns(path, table.header)]
    conditions = [
        (name, index)
        for name, index in place.items()
        if name not in KNOWN_COLUMNS and not CHANNEL.fullmatch(name)
    ]
    subject_place, split_place = place.get("SubjectID"), place.get("Split")
    labels, label_faults = class_labels(table.column("Label"), table.column("LabelMapping"))
    faults = list(table.faults)
    files = _Files(path.absolute().parent)
    rows = []
    lines = followed(table.lines.items(), len(table.lines), "Reading rows", "row", bar_after_s=0.5)
    for number, cells in lines:
        label, label_name = labels.get(number, _UNLABELLED)
        row = Row(
            tuple([files[cells[index]] for _, index in channels]),
            f"row-{number}" if subject_place is None else cells[subject_place],
            label, label_name,
            "" if split_place is None else cells[split_place],
            {name: cells[index] for name, index in conditions}, number,
        )  # fmt: skip
        if files.faults:
            faults += [
                f"row {number}, column {name}: {files.faults[cells[index]]}"
                for name, index in channels
                if cells[index] in files.faults
            ]
        if not row.subject or row.split not in _SPLIT_CELLS:
            faults += _cell_faults(row)
        rows.append(row)
    faults += label_faults + split_faults(_several_splits(rows))
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ManifestError(f"{path} has {count}:", first_faults(faults))
    return Manifest(path, tuple(rows))


class _Files(dict[str, Path]):
    """The file that a cell names; `faults` has what is wrong with it. Each is checked once."""

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


def _cell_faults(row: Row) -> list[str]:
    faults = []
    if not row.subject:
        faults.append(f"row {row.number}, column SubjectID: the cell is empty")
    if row.split not in _SPLIT_CELLS:
        faults.append(
            f"row {row.number}, column Split: {row.split!r} is not known; "
            f"use {', '.join(SPLITS)}, or leave the cell empty"
        )
    return faults


def _several_splits(rows: Iterable[Row]) -> dict[str, set[str]]:
    """The splits of each subject whose images are in more than one."""
    first: dict[str, str] = {}
    splits: dict[str, set[str]] = {}
    for row in rows:
        split = first.setdefault(row.subject, row.split)
        if split != row.split:
            splits.setdefault(row.subject, {split}).add(row.split)
    return splits


def split_faults(splits: Mapping[str, Collection[str]]) -> list[str]:
    """One fault for each subject that has several splits."""
    return [
        f"subject {subject!r} is in several splits: "
        f"{', '.join(sorted(name or '(empty)' for name in names))}; a subject belongs to one"
        for subject, names in splits.items()
        if len(names) > 1
    ]


def class_labels(ids: Mapping[int, str], names: Mapping[int, str]) -> tuple[Labels, list[str]]:
    """Labels out of the columns Label and LabelMapping, and what is wrong with them.

    Names without ids (LabelMapping alone, or a Label that is not a number) get ids in the
    natural order of the names; ids without names are named by their number.

    Args:
        ids: cells of Label by line number; all empty where there is no such column.
        names: of LabelMapping.
    """
    faults = _empty("Label", ids) + _empty("LabelMapping", names)
    if not any(names.values()) and not all(_INTEGER.fullmatch(cell) for cell in ids.values()):
        ids, names = names, ids
    if any(ids.values()):
        labels, id_faults = _numbered(ids, names)
        return labels, faults + id_faults + _contradictions(labels)
    order = {name: i for i, name in enumerate(sorted(set(names.values()) - {""}, key=natural_key))}
    return {number: (order[name], name) for number, name in names.items() if name}, faults


def _empty(column: str, cells: Mapping[int, str]) -> list[str]:
    if not any(cells.values()):
        return []
    return [
        f"row {number}, column {column}: the cell is empty; label every row or none"
        for number, cell in cells.items()
        if not cell
    ]


def _numbered(ids: Mapping[int, str], names: Mapping[int, str]) -> tuple[Labels, list[str]]:
    labels: Labels = {}
    faults = []
    for number, cell in ids.items():
        if _INTEGER.fullmatch(cell) and 0 <= float(cell) < MAX_CLASSES:
            label = int(float(cell))
            labels[number] = (label, names[number] or str(label))
        elif cell:
            faults.append(
                f"row {number}, column Label: {cell!r} is not a class id; "
                f"ids are whole numbers from 0, below {MAX_CLASSES}"
            )
    return labels, faults


def _contradictions(labels: Labels) -> list[str]:
    """One fault for each id with two names and each name with two ids, at the first such row."""
    faults: dict[tuple[int, str], str] = {}
    first: dict[int | str, int] = {}
    for number, label in labels.items():
        for key in label:
            before = first.setdefault(key, number)
            if labels[before] != label:
                old_id, old_name = labels[before]
                faults.setdefault(
                    label,
                    f"row {number}: label {label[0]} is named {label[1]!r}, "
                    f"but in row {before} label {old_id} is named {old_name!r}",
                )
    return list(faults.values())
