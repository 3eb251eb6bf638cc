"""The list of images of a GaNDLF-Synth project, as a manifest of ours."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib

from synthcube.data.image_files import decoding
from synthcube.data.manifest import image_suffix
from synthcube.data.nifti import nifti_header, unpacked
from synthcube.data.tables import CsvTable
from synthcube.errors import ImageError, ManifestError, first_faults
from synthcube.reading import open_file

_CHANNEL = re.compile(r"Channel_\d+")
_LABELS = ("Label", "LabelMapping")
_ENDS = ("RL", "AP", "SI")  # of each axis


@dataclass(frozen=True)
class Rows:
    """Rows of a manifest, and what is other than in the old CSV; nothing: it is read as it is."""

    rows: tuple[dict[str, str], ...]
    changes: tuple[str, ...]


def translated(path: Path, table: CsvTable, folder: Path) -> Rows:
    """The rows with absolute paths, channels counted from 0, and a subject. Raises ManifestError.

    The subject is the folder of a patient, by which a validation is split. Channels keep the order
    of the columns, which is the order of an old model's channels.

    Args:
        folder: the one that its relative paths start from; it was the working folder.
    """
    channels = [name for name in table.header if _CHANNEL.fullmatch(name)]
    faults = [*table.faults, *_faults(table, channels)]
    if faults:
        raise ManifestError(f"{path} cannot be migrated:", first_faults(faults))
    lines = [dict(zip(table.header, cells, strict=True)) for cells in table.lines.values()]
    files = [[_located(row[name], folder, path) for name in channels] for row in lines]
    folders = [Path(row[0]).parent for row in files]
    is_patient = "LabelMapping" in lines[0] and all(
        row["LabelMapping"] == folder.name for row, folder in zip(lines, folders, strict=True)
    )
    changes = _changes(table, channels, lines, is_patient)
    subjects = _subjects(lines, folders)
    kept = [
        name for name in table.header
        if name not in channels and not (is_patient and name in _LABELS)
    ]  # fmt: skip
    rows = [
        {"SubjectID": subject}
        | {f"Channel_{number}": name for number, name in enumerate(names)}
        | {name: row[name] for name in kept}
        for row, names, subject in zip(lines, files, subjects, strict=True)
    ]
    return Rows(tuple(rows), tuple(changes))


def _faults(table: CsvTable, channels: Sequence[str]) -> list[str]:
    if not channels:
        return [f"there is no column Channel_0; its columns are {', '.join(table.header)}"]
    twice = sorted({name for name in table.header if table.header.count(name) > 1})
    faults = [f"the column {name!r} is there twice" for name in twice]
    if twice:
        return faults
    for name in channels:
        faults += [
            f"row {number}, column {name}: the cell is empty"
            for number, cell in table.column(name).items()
            if not cell
        ]
    return faults + [
        f"row {number}, column Label: {cell!r} is a path: a segmentation is no class; make it a "
        "channel of kind mask (data.channels)"
        for number, cell in table.column("Label").items()
        if "/" in cell or "\\" in cell
    ]


def _located(cell: str, folder: Path, csv: Path) -> str:
    """Relative paths started from the working folder; from that of the CSV where only it fits."""
    there, beside = folder / cell, csv.absolute().parent / cell
    place = beside if not there.exists() and beside.exists() else there
    return os.path.normpath(place)


def _subjects(lines: Sequence[dict[str, str]], folders: Sequence[Path]) -> list[str]:
    if "SubjectID" in lines[0]:
        return [row["SubjectID"] for row in lines]
    base = Path(os.path.commonpath(folders))
    if len({*folders}) < 2:  # all in one folder: no patient is known
        return [f"row-{number}" for number in range(len(folders))]
    subjects = []
    for row, folder in zip(lines, folders, strict=True):
        parts = folder.relative_to(base).parts or (base.name,)
        if len(parts) > 1 and parts[0] == row.get("LabelMapping"):  # the folder of a class
            parts = parts[1:]
        subjects.append(parts[0])
    return subjects


def _changes(
    table: CsvTable, channels: Sequence[str], lines: Sequence[dict[str, str]], is_patient: bool
) -> list[str]:
    changes = []
    if "SubjectID" not in table.header:
        changes.append("SubjectID is new: the folder of each patient, by which splits are made")
    expected = [f"Channel_{number}" for number in range(len(channels))]
    if list(channels) != expected:
        changes.append(f"{', '.join(channels)} are counted from 0, in this order, as in training")
    if any(not Path(row[name]).is_absolute() for row in lines for name in channels):
        changes.append("relative paths are absolute now: they started from the working folder")
    if is_patient:
        changes.append(
            "Label and LabelMapping are left out: every class was one patient, whose name would "
            "become part of a model with data.conditions"
        )
    return changes


def orientation_lines(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A line for each orientation of the first channels' volumes that is not RAS.

    GaNDLF-Synth trained volumes as they are stored; here they are turned to RAS+.
    """
    stored = Counter(filter(None, (_orientation(Path(row["Channel_0"])) for row in rows)))
    for axes, count in stored.items():
        if axes == "RAS":
            continue
        is_permuted = any(axis not in pair for axis, pair in zip(axes, _ENDS, strict=True))
        effect = (
            "data.size is in the order of R, A, S here, and was in that of the file: change it"
            if is_permuted
            else "they are mirrored here, compared with what GaNDLF-Synth saw"
        )
        share = f"{count} of {stored.total()} volumes"
        yield f"{share} are stored as {axes}, and turned to RAS: {effect}"


def _orientation(path: Path) -> str:
    """The axes of a volume as they are stored, such as LPS; empty where it is none, or damaged."""
    if not image_suffix(path).startswith(".nii"):
        return ""
    try:
        with open_file(path, ImageError) as file, decoding(path, image_suffix(path)):
            _, header, _ = nifti_header(path, unpacked(file))
            is_volume = min([*header.get_data_shape()[:3], 1, 1][:3]) > 1
            axes = nib.orientations.aff2axcodes(header.get_best_affine())
            return "".join(map(str, axes)) if is_volume else ""
    except ImageError:  # which `synthcube check` explains
        return ""
