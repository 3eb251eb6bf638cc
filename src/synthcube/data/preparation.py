"""A folder tree of images to a manifest: channels in a fixed order, classes, splits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from synthcube.data.manifest import (
    FILE_NAME,
    SUFFIXES,
    bids_subject,
    image_suffix,
    manifest_text,
    name_fault,
    natural_key,
    split_warning,
    write_manifest,
)
from synthcube.data.module import split_subjects
from synthcube.errors import ManifestError, OutputError, first_faults
from synthcube.storage import make_folder, sha256, write_text
from synthcube.terminal import followed

Paradigm = Literal["unlabeled", "patient", "custom"]

LAYOUTS = {
    "unlabeled": "SUBJECT/images, or images",
    "patient": "SUBJECT/images",
    "custom": "CLASS/SUBJECT/images, or CLASS/images",
}
_SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True)
class Preparation:
    """The manifest that was written, its counts, and the files left out with the reasons."""

    manifest_path: Path
    rows: int
    subjects: int
    labels: dict[str, int]  # rows by class name
    splits: dict[str, int]  # rows by split; empty where no fraction was given
    left_out: tuple[tuple[Path, str], ...]
    warning: str = ""  # of a person who may be several subjects


@dataclass(frozen=True)
class _Subject:
    """The files of one subject, with its name and class."""

    name: str
    label_name: str
    files: tuple[Path, ...]


_LeftOut = list[tuple[Path, str]]
_Item = tuple[_Subject, tuple[Path, ...]]  # one row to be: its channel files


def prepare(
    folder: Path,
    out: Path,
    *,
    paradigm: Paradigm = "unlabeled",
    channels: Sequence[str] = (),
    validation: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    fault_of: Callable[[Path], str] | None = None,
) -> Preparation:
    """List the images below `folder` in a manifest; nothing else is written or moved.

    Args:
        folder: laid out as LAYOUTS says; folders deeper than that belong to their subject.
        out: a folder, which gets a manifest.csv, or the path of a .csv.
        paradigm: "patient" makes each subject a class, "custom" each top folder. The same
            subject folder in two classes is one person, who never is in two splits.
        channels: one pattern per channel, in the order of the channels. A pattern matches a
            whole word of a file's name ("t1" is not in "t1ce") or, with * or ?, all of it;
            case does not matter. Without patterns every image is a row with one channel.
        validation: share of the subjects for validation.
        test: share of the subjects for the test.
        seed: of the split.
        fault_of: says why a file cannot be used, or nothing; such files are left out. Without
            it no file is opened.
    """
    csv_path = (out if out.suffix.lower() == ".csv" else out / FILE_NAME).resolve()
    if not folder.is_dir():
        raise ManifestError(
            f"data_path {folder} is not a folder; one with images below it is needed."
        )
    _check_patterns(channels)
    left_out: _LeftOut = []
    images = _images(folder.resolve(), csv_path, left_out)
    if fault_of:
        read = followed(images, len(images), "Reading images")
        faults = {image: fault_of(folder.resolve() / image) for image in read}
        left_out += [(folder.resolve() / image, text) for image, text in faults.items() if text]
        images = [image for image, text in faults.items() if not text]
    subjects = _subjects(folder.resolve(), images, paradigm, left_out)
    items = [item for subject in subjects for item in _items(subject, channels, left_out)]
    if not items:
        reasons = [f"{path}: {reason}" for path, reason in left_out]
        raise ManifestError(
            f"{folder} holds no image that can be used (layout: {LAYOUTS[paradigm]}; "
            f"names end in {', '.join(SUFFIXES)}).",
            first_faults(reasons),
        )
    rows = _rows(items, csv_path.parent)
    if validation or test:
        labels = [int(row.get("Label", -1)) for row in rows]
        fractions = {"validation": validation, "test": test}
        splits = split_subjects([row["SubjectID"] for row in rows], labels, fractions, seed)
        rows = [row | {"Split": splits[row["SubjectID"]]} for row in rows]
    make_folder(csv_path.parent, "output_path")
    _write_anew(csv_path, rows)
    return Preparation(
        manifest_path=csv_path,
        rows=len(rows),
        subjects=len({row["SubjectID"] for row in rows}),
        labels=_tally(rows, "LabelMapping"),
        splits=_tally(rows, "Split"),
        left_out=tuple(left_out),
        warning=_split_warning(items, folder.resolve()),
    )


def _split_warning(items: Iterable[_Item], folder: Path) -> str:
    """Of files that lie loose in `folder` or in its classes; a folder is one person."""
    subjects = {}
    for subject, files in items:
        name = files[0].relative_to(folder).as_posix()
        subjects[name[: -len(image_suffix(files[0]))]] = subject.name
    return split_warning(subjects)


def _write_anew(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a manifest, and its hash beside it in the form that sha256sum --check reads.

    An OutputError is raised if a person has written or edited the one that is there.
    """
    record = _record(path)
    if path.exists():
        recorded = record.read_text(encoding="utf-8") if record.is_file() else ""
        if manifest_text(rows) != path.read_text(encoding="utf-8", errors="replace") and (
            recorded != _hash_line(path)
        ):
            raise OutputError(
                f"output_path {path} was edited, or was not written by synthcube prepare, and "
                "stays as it is: move it away, or give another output_path."
            )
    write_manifest(path, rows)
    write_text(record, _hash_line(path))


def _record(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _hash_line(path: Path) -> str:
    return f"{sha256(path)}  {path.name}\n"


def _check_patterns(channels: Sequence[str]) -> None:
    folded = [pattern.casefold() for pattern in channels]
    faults = [f"channel {i}: the pattern is empty" for i, text in enumerate(folded) if not text]
    faults += [
        f"channel {i}: the pattern {channels[i]!r} is there already"
        for i, text in enumerate(folded)
        if text and text in folded[:i]
    ]
    if faults:
        raise ManifestError("The channel patterns cannot be used.", faults)


def _images(folder: Path, csv_path: Path, left_out: _LeftOut) -> list[Path]:
    """Image files below `folder`, relative to it, in natural order."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    images = []
    for file in sorted(files, key=lambda file: natural_key(file.as_posix())):
        if folder / file in (csv_path, _record(csv_path)):  # of an earlier call
            continue
        reason = name_fault(file.as_posix())
        if any(part.startswith(".") or part.lower() in _SYSTEM_NAMES for part in file.parts):
            reason = "hidden or of the system"
        elif not image_suffix(file):
            reason = f"not a known image; names end in {', '.join(SUFFIXES)}"
        elif not reason and not (folder / file).stat().st_size:
            reason = "empty (0 bytes)"
        if reason:
            left_out.append((folder / file, reason))
        else:
            images.append(file)
    return images


def _subjects(
    folder: Path, images: Iterable[Path], paradigm: Paradigm, left_out: _LeftOut
) -> list[_Subject]:
    """Images grouped by the folders they are in; a loose image is a subject of its own.

    Where all names have BIDS subjects, a loose image belongs to that subject.
    """
    images = list(images)
    is_bids = all(bids_subject(image.name) for image in images)
    groups: dict[tuple[str, str, str], list[Path]] = {}
    for image in images:
        above = list(image.parts[:-1])
        label = above.pop(0) if paradigm == "custom" and above else ""
        if (paradigm == "custom" and not label) or (paradigm == "patient" and not above):
            reason = f"not in a folder of its own (layout: {LAYOUTS[paradigm]})"
            left_out.append((folder / image, reason))
            continue
        stem = image.name[: -len(image_suffix(image))]
        loose_subject = bids_subject(stem) if is_bids else "/".join(filter(None, (label, stem)))
        subject = above[0] if above else loose_subject
        # loose images of one stem (a.png, a.jpg) share the subject, but are not its channels
        loose = "" if above else image.as_posix()
        label = subject if paradigm == "patient" else label
        groups.setdefault((label, subject, loose), []).append(folder / image)
    return [_Subject(name, label, tuple(files)) for (label, name, _), files in groups.items()]


def _items(subject: _Subject, channels: Sequence[str], left_out: _LeftOut) -> Iterator[_Item]:
    """The subject's rows: one per image, or one in all where channels have patterns."""
    if not channels:
        yield from ((subject, (file,)) for file in subject.files)
        return
    faults = []
    chosen = []
    for pattern in channels:
        matches = [file for file in subject.files if _matches(file, pattern)]
        chosen += matches[:1]
        if len(matches) > 1:
            names = ", ".join(file.name for file in matches)
            faults.append(f"channel {pattern!r} has {len(matches)} files ({names})")
        elif not matches:
            faults.append(f"channel {pattern!r} has no file")
    twice = [file.name for file, count in Counter(chosen).items() if count > 1]
    if twice and not faults:
        faults.append(f"{twice[0]} matches several channels")
    if faults:
        reason = f"subject {subject.name}: {'; '.join(faults)}"
        left_out.extend((file, reason) for file in subject.files)
        return
    left_out.extend((f, "matches no channel") for f in subject.files if f not in chosen)
    yield subject, tuple(chosen)


def _matches(file: Path, pattern: str) -> bool:
    stem = file.name[: -len(image_suffix(file))].casefold()
    folded = pattern.casefold()
    if re.search(rf"(?<![^\W_]){re.escape(folded)}(?![^\W_])", stem):
        return True
    is_glob = "*" in folded or "?" in folded
    return is_glob and (fnmatchcase(stem, folded) or fnmatchcase(file.name.casefold(), folded))


def _rows(items: Iterable[_Item], base: Path) -> list[dict[str, str]]:
    items = sorted(
        items, key=lambda item: (natural_key(item[0].label_name), natural_key(item[0].name))
    )
    names = sorted({subject.label_name for subject, _ in items} - {""}, key=natural_key)
    ids = {name: i for i, name in enumerate(names)}
    rows = []
    for subject, files in items:
        row = {
            f"Channel_{i}": Path(os.path.relpath(file, base)).as_posix()
            for i, file in enumerate(files)
        }
        row["SubjectID"] = subject.name
        if subject.label_name:
            row["Label"] = str(ids[subject.label_name])
            row["LabelMapping"] = subject.label_name
        rows.append(row)
    return rows


def _tally(rows: Iterable[dict[str, str]], column: str) -> dict[str, int]:
    return dict(Counter(row[column] for row in rows if column in row))
