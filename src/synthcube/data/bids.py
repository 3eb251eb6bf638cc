"""A BIDS data set: which of its images are the raw ones, and what its file names state.

The Brain Imaging Data Structure, https://bids-specification.readthedocs.io: images are in
sub-LABEL/[ses-LABEL/]DATATYPE and have names of entities and a suffix, sub-01_run-1_T1w.nii.gz;
what was made of them is in derivatives/, what they were made of in sourcedata/.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from synthcube.data.manifest import bids_subject, image_suffix
from synthcube.data.tables import KNOWN_COLUMNS, read_table
from synthcube.errors import ManifestError, first_faults

DESCRIPTION = "dataset_description.json"
PARTICIPANTS = "participants.tsv"
SUFFIX = "suffix"
"""The column of the last word of a name, T1w or bold, where each file is a row."""
_DERIVATIVES = "derivatives"
_NOT_RAW = (_DERIVATIVES, "sourcedata", "code", "stimuli", "phenotype")
_COMPANIONS = {
    *(DESCRIPTION, "participants.json", "README", "README.md", "README.txt", "CHANGES", "LICENSE"),
    *(PARTICIPANTS, ".bidsignore"),
}
_COMPANION_SUFFIXES = (".json", ".tsv", ".bval", ".bvec")
_RESERVED = {name.casefold() for name in KNOWN_COLUMNS}
_NOT_AVAILABLE = "n/a"
_TIME = "acq_time"  # a date, which may identify a person
_ENTITY = re.compile(r"(?:^|_)([a-z]+)-([A-Za-z0-9+]+)(?=_|$)")


def raw_images(
    folder: Path,
    images: Sequence[Path],
    left_out: list[tuple[Path, str]],
    *,
    derivatives: bool = False,
) -> list[Path]:
    """The images, relative to `folder`, that count in a BIDS data set; all of them in another.

    Of the others each folder, or each file whose name states no subject, is added to `left_out`.

    Args:
        derivatives: those below derivatives/ count as well.
    """
    outside = [image for image in images if image.parts[0] not in _NOT_RAW]
    is_described = (folder / DESCRIPTION).is_file()
    if not is_described and not (outside and all(bids_subject(i.name) for i in outside)):
        return list(images)
    set_aside: Counter[str] = Counter()
    raw = []
    for image in images:
        top = image.parts[0]
        if top in _NOT_RAW and not (derivatives and top == _DERIVATIVES):
            set_aside[top] += 1
        elif bids_subject(image.name):
            raw.append(image)
        else:
            left_out.append((folder / image, "no name of BIDS, which begins with sub-LABEL_"))
    for top, count in set_aside.items():
        number = "1 image" if count == 1 else f"{count} images"
        how = "; --derivatives adds them" if top == _DERIVATIVES else ""
        left_out.append((folder / top, f"{number} beside the raw ones of a BIDS data set{how}"))
    return raw


def entities_of(file: Path) -> dict[str, str]:
    """What a BIDS name states: {"sub": "01", "run": "1"}, for run-01 as for run-1."""
    entities = dict(_ENTITY.findall(_stem(file)))
    return entities | ({"run": entities["run"].lstrip("0")} if "run" in entities else {})


def common_entities(files: Iterable[Path]) -> dict[str, str]:
    """The entities that all files of a row share, without the subject: columns of a manifest."""
    known = {"sub", *_RESERVED}
    common = _common(map(entities_of, files))
    return {name: value for name, value in common.items() if name not in known}


def suffix_of(file: Path) -> str:
    """The last word of a BIDS name, T1w; empty where it is an entity."""
    word = _stem(file).rpartition("_")[2]
    return "" if "-" in word else word


def visit(file: Path) -> str:
    """Subject and session, within which each channel is looked for."""
    return f"{bids_subject(_stem(file))}/{entities_of(file).get('ses', '')}"


def by_run(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The files by their entity `run`; those without one are a group too."""
    runs: dict[str, list[Path]] = {}
    for file in files:
        runs.setdefault(entities_of(file).get("run", ""), []).append(file)
    return runs


@dataclass(frozen=True, slots=True)
class Tables:
    """Columns that the tables of a data set state of its subjects, sessions and files."""

    subjects: Mapping[str, Mapping[str, str]]
    sessions: Mapping[tuple[str, str], Mapping[str, str]]
    files: Mapping[Path, Mapping[str, str]]

    def cells_of(self, subject: str, files: Sequence[Path]) -> dict[str, str]:
        """The cells of a row: a file's own before those of its session before its subject's.

        Of several files those count that are the same for all of them.
        """
        label = f"sub-{subject.removeprefix('sub-')}"
        session = entities_of(files[0]).get("ses", "")
        common = _common(self.files.get(file, {}) for file in files)
        of_session = self.sessions.get((label, session), {})
        return {**self.subjects.get(label, {}), **of_session, **common}


def read_tables(folder: Path, left_out: list[tuple[Path, str]]) -> Tables:
    """Read participants.tsv, and the sessions.tsv and scans.tsv of each subject, where they are.

    Columns that a manifest has a meaning for, and times, are left out. Raises ManifestError.
    """
    participants = folder / PARTICIPANTS
    subjects = {
        f"sub-{name}": cells
        for name, cells in _cells_by(participants, "participant_id", "sub-", left_out).items()
    }
    sessions = {
        (path.parent.name, name): cells
        for path in sorted(folder.glob("sub-*/sub-*_sessions.tsv"))
        for name, cells in _cells_by(path, "session_id", "ses-", left_out).items()
    }
    scans = [*folder.glob("sub-*/sub-*_scans.tsv"), *folder.glob("sub-*/ses-*/sub-*_scans.tsv")]
    files = {
        path.parent / name: cells
        for path in sorted(scans)
        for name, cells in _cells_by(path, "filename", "", left_out).items()
    }
    return Tables(subjects, sessions, files)


def is_companion(file: Path) -> bool:
    """Whether a file, relative to its data set, is one that BIDS has beside the images."""
    if len(file.parts) == 1 and file.name in _COMPANIONS:
        return True
    return file.name.endswith(_COMPANION_SUFFIXES) and bool(bids_subject(file.name))


def _common(mappings: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What all mappings have the same."""
    first, *others = mappings
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def _cells_by(
    path: Path, key: str, prefix: str, left_out: list[tuple[Path, str]]
) -> dict[str, dict[str, str]]:
    """The cells of a table by its column `key`, whose values may lack `prefix`.

    Empty where there is no such file.
    """
    if not path.is_file():
        return {}
    table = read_table(path)
    faults = [*table.faults]
    if key not in table.header:
        faults.append(f"it has no column {key}; it has: {', '.join(table.header)}")
    for name in table.header:
        if name.casefold() in _RESERVED:
            left_out.append((path, f"the column {name} has a meaning in a manifest"))
        elif name == _TIME:
            left_out.append((path, f"the column {name} has dates, which may identify a person"))
    dropped = {key, _TIME, *(name for name in table.header if name.casefold() in _RESERVED)}
    by_key: dict[str, dict[str, str]] = {}
    for number, cells in table.records.items() if not faults else ():
        value = cells[key].removeprefix(prefix)
        if value in by_key:
            faults.append(f"row {number}: {prefix}{value} is there twice")
        by_key[value] = {
            name: "" if cell == _NOT_AVAILABLE else cell
            for name, cell in cells.items()
            if name not in dropped
        }
    if faults:
        raise ManifestError(f"{path} cannot be joined to the images:", first_faults(faults))
    return by_key


def _stem(path: Path) -> str:
    return path.name[: -len(image_suffix(path))]
