"""A folder tree of images, or a table of them, to a manifest: channels, classes, splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from synthcube.data import bids, dicom
from synthcube.data.channels import Masks, probable_masks
from synthcube.data.dicom_columns import check_columns
from synthcube.data.images import CONSTANT, read_image
from synthcube.data.layouts import (
    LAYOUTS,
    Channel,
    Item,
    LeftOut,
    Paradigm,
    is_mask_name,
    is_nnunet,
    items_of,
    nnunet_items,
    recognised_channels,
)
from synthcube.data.manifest import (
    FILE_NAME,
    SUFFIXES,
    files_below,
    image_suffix,
    is_dicom,
    manifest_of,
    manifest_text,
    name_fault,
    natural_key,
    path_cell,
    split_warning,
    write_manifest,
)
from synthcube.data.module import split_subjects
from synthcube.data.slide_patches import PatchOptions
from synthcube.data.slides import is_slide, patch_items, split_off_slides
from synthcube.data.tables import KNOWN_COLUMNS, read_table
from synthcube.data.time_series import FOLDER, Volumes, check_choice, num_volumes
from synthcube.errors import ImageError, ManifestError, OutputError, first_faults
from synthcube.storage import make_folder, require_separate, sha256, write_text
from synthcube.terminal import followed

_NAMES_SHOWN = 3
_LOOKED_AT = 16  # images, to tell masks from images
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
    channels: tuple[str, ...] = ()  # what names them in the files; empty: each file is a row
    columns: tuple[str, ...] = ()  # that can be conditions
    masks: Masks = field(default_factory=dict)  # channels that look like masks, with their classes

    @property
    def left_out_lines(self) -> list[str]:
        """What was left out, one line for each reason that several files share."""
        return _left_out_lines(self.left_out)


def prepare(
    data: Path,
    out: Path,
    *,
    paradigm: Paradigm = "unlabeled",
    channels: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    fault_of: Callable[[Path], str] | None = None,
    volume: str | None = None,
    derivatives: bool = False,
    dicom_columns: Sequence[str] = (),
    patches: PatchOptions | None = None,
) -> Preparation:
    """List the images of `data` in a manifest; nothing is moved.

    DICOM series, chosen volumes of 4D files and patches of slides are written as images beside the
    manifest, see :mod:`synthcube.data.dicom`, :mod:`synthcube.data.time_series` and
    :mod:`synthcube.data.slides`; nothing else is written.

    Args:
        data: a folder laid out as LAYOUTS says, or as nnU-Net or BIDS have it; folders deeper than
            that belong to their subject. Or a CSV whose columns have other names.
        out: a folder, which gets a manifest.csv, or the path of a .csv.
        paradigm: "patient" makes each subject a class, "custom" each top folder. The same
            subject folder in two classes is one person, who never is in two splits.
        channels: one pattern per channel, in the order of the channels. A pattern matches a
            whole word of a file's name ("t1" is not in "t1ce") or, with * or ?, all of it;
            case does not matter. None recognises usual words (t1, flair, seg, ...); without
            patterns every image is a row with one channel.
        columns: of a CSV, its names by those of a manifest: {"Channel_0": "t1_path"}.
        validation: share of the subjects for validation.
        test: share of the subjects for the test.
        seed: of the split.
        fault_of: says why a file cannot be used, or nothing; such files are left out. Without
            it no more of the files is read than it takes to tell masks from images.
        volume: of NIfTI files with volumes in time: mean, first, each, or a number from 0. The
            chosen ones are written as 3D files to the folder `volumes` beside the manifest; None
            leaves such files out, unless their fourth axis is short enough to be channels.
        derivatives: of a BIDS data set, list the images below derivatives/ too.
        dicom_columns: keywords of DICOM that become columns.
        patches: how whole slides are cut.
    """
    csv_path = (out if out.suffix.lower() == ".csv" else out / FILE_NAME).resolve()
    options = _FolderOptions(paradigm, channels, derivatives, tuple(dicom_columns), patches)
    _check_request(data, options, columns or {})
    if volume is not None:
        check_choice(volume)
        require_separate({"output_path": csv_path.parent / FOLDER}, {"data_path": data})
    left_out: LeftOut = []
    usable = _Usable(fault_of, left_out, takes_volumes=volume is not None)
    if data.is_file():
        listing = _Listing(_table_rows(data, columns or {}, csv_path, usable))
    else:
        listing = _listed_below(data, csv_path, options, usable)
    listed = Volumes(volume, data, csv_path.parent, left_out, usable).rows(listing.rows)
    if not listed:
        suffixes = f"; names end in {', '.join(SUFFIXES)}" if not patches else ""
        raise ManifestError(
            f"{data} holds no {'slide' if patches else 'image'} that can be used (layout: "
            f"{LAYOUTS[paradigm]}{suffixes}).",
            _left_out_lines(left_out),
        )
    rows = _split(listed, {"validation": validation, "test": test}, seed)
    make_folder(csv_path.parent, "output_path")
    _write_anew(csv_path, rows)
    known = {*KNOWN_COLUMNS, *(name for name in rows[0] if name.startswith("Channel_"))}
    return Preparation(
        manifest_path=csv_path,
        rows=len(rows),
        subjects=len({row.get("SubjectID", number) for number, row in enumerate(rows)}),
        labels=_tally(rows, "LabelMapping"),
        splits=_tally(rows, "Split"),
        left_out=tuple(left_out),
        warning=listing.warning,
        channels=listing.channels,
        columns=tuple(dict.fromkeys(name for row in rows for name in row if name not in known)),
        masks=_masks_among(rows, csv_path.parent),
    )


def _masks_among(rows: Sequence[Mapping[str, str]], folder: Path) -> Masks:
    """Channels that hold few whole numbers in the first images; none where a file is faulty."""
    columns = [name for name in rows[0] if name.startswith("Channel_")]
    masks: dict[int, tuple[int, ...]] = {}
    start = 0
    try:
        for column in columns if len(columns) > 1 else ():
            files = (folder / row[column] for row in rows[:_LOOKED_AT])
            images = (read_image([file]).tensor for file in files)
            first = next(images)
            if probable_masks([first]):
                probable = probable_masks(chain([first], images))
                masks |= {start + channel: classes for channel, classes in probable.items()}
            start += len(first)
    except ImageError:  # which --verify and check explain
        return {}
    return masks


def column_names(options: Sequence[str]) -> dict[str, str]:
    """ "Channel_0=t1_path" as {"Channel_0": "t1_path"}, for `prepare`. Raises ManifestError."""
    pairs = [text.partition("=") for text in options]
    names = {new.strip(): old.strip() for new, _, old in pairs}
    faults = [
        f"--column {text}: write it as in Channel_0=t1_path"
        for text, (new, _, old) in zip(options, pairs, strict=True)
        if not new.strip() or not old.strip()
    ]
    if not faults and len(names) < len(pairs):
        faults.append("--column names one column twice")
    if faults:
        raise ManifestError("These columns cannot be used:", faults)
    return names


@dataclass(frozen=True)
class _Listing:
    """The rows without a split, what names the channels, and a warning."""

    rows: list[dict[str, str]]
    channels: tuple[str, ...] = ()
    warning: str = ""


@dataclass(frozen=True)
class _Usable:
    """Says whether a file can be used; those that cannot are added to `left_out`."""

    fault_of: Callable[[Path], str] | None
    left_out: LeftOut
    takes_volumes: bool = False
    """Whether volumes are taken out of a series, so that it is judged by them."""

    def __call__(self, path: Path) -> bool:
        if self.fault_of and self.takes_volumes and num_volumes(path) > 1:
            return True
        fault = self.fault_of(path) if self.fault_of else ""
        if fault.startswith(CONSTANT) and is_mask_name(path):
            fault = ""  # a mask of a healthy subject
        if fault:
            self.left_out.append((path, fault))
        return not fault


@dataclass(frozen=True)
class _FolderOptions:
    """How a folder is listed; see prepare."""

    paradigm: Paradigm
    channels: Sequence[str] | None
    derivatives: bool
    dicom_columns: tuple[str, ...]
    patches: PatchOptions | None


def _check_request(data: Path, options: _FolderOptions, columns: Mapping[str, str]) -> None:
    if not data.exists():
        raise ManifestError(
            f"data_path {data} does not exist; a folder of images, or a CSV of them, is needed."
        )
    if data.is_dir() and columns:
        raise ManifestError(
            f"--column renames the columns of a CSV, but data_path {data} is a folder."
        )
    if not data.is_dir() and (options.channels or options.paradigm != "unlabeled"):
        raise ManifestError(
            f"--channels and --paradigm are for folders of images, but data_path {data} is a file: "
            "name its columns, as in --column Channel_0=t1_path."
        )
    if not data.is_dir() and options.dicom_columns:
        raise ManifestError(
            f"--dicom_columns is for folders with DICOM files, but data_path {data} is a file."
        )
    if not data.is_dir() and options.patches:
        raise ManifestError(
            f"--patch_size is for folders of slides, but data_path {data} is a file."
        )
    check_columns(options.dicom_columns)
    _check_patterns(options.channels or ())


def _listed_below(data: Path, csv_path: Path, options: _FolderOptions, usable: _Usable) -> _Listing:
    """The rows of the images, or of the patches of slides, below a folder."""
    folder, left_out = data.resolve(), usable.left_out
    paradigm, channels = options.paradigm, options.channels
    images, dicom_files = _images(folder, csv_path, left_out)
    images, slides = split_off_slides(folder, images, options.patches, left_out)
    images = bids.raw_images(folder, images, left_out, derivatives=options.derivatives)
    if usable.fault_of:
        read = followed(images, len(images), "Reading images")
        images = [image for image in read if usable(folder / image)]
    if paradigm == "unlabeled" and is_nnunet(images):
        items, names = nnunet_items(folder, images, channels or (), left_out)
    else:
        patterns = tuple(Channel(pattern) for pattern in channels or ())
        named = recognised_channels(images, paradigm) if channels is None else patterns
        items = list(items_of(folder, images, paradigm, named, left_out))
        names = tuple(channel.pattern for channel in named)
    if dicom_files:
        if len(names) > 1:
            raise ManifestError(
                f"data_path {data} holds DICOM files, and images with the channels "
                f"{', '.join(names)}; a DICOM series is one channel: prepare them apart."
            )
        series = dicom.converted(
            folder, dicom_files, csv_path.parent, left_out,
            paradigm=paradigm, columns=options.dicom_columns,
        )  # fmt: skip
        items = [*items, *(item for item in series if all(map(usable, item.files)))]
    if options.patches:
        items += patch_items(folder, slides, csv_path.parent, options.patches, left_out, paradigm)
    stated = bids.read_tables(folder, left_out)
    return _Listing(
        _rows(items, csv_path.parent, stated),
        names,
        split_warning({item.name: item.subject for item in items}),
    )


def _table_rows(
    data: Path, columns: Mapping[str, str], csv_path: Path, usable: _Usable
) -> list[dict[str, str]]:
    """The rows of a CSV, with its columns renamed as `columns` says. Raises ManifestError."""
    table = read_table(data)
    faults = [
        f"--column {new}={old}: there is no column {old!r}"
        for new, old in columns.items()
        if old not in table.header
    ]
    kept = set(table.header) - {*columns.values()}
    faults += [
        f"--column {new}={old}: there is a column {new!r} already" if new in kept
        else f"--column {new}={old}: {old!r} is renamed twice"
        for new, old in columns.items()
        if new in kept or list(columns.values()).count(old) > 1
    ]  # fmt: skip
    if faults:
        listed = ", ".join(name or "(no name)" for name in table.header)
        raise ManifestError(f"The columns of {data} are: {listed}.", faults)
    names = {old: new for new, old in columns.items()}
    header = tuple(names.get(name, name) for name in table.header)
    manifest = manifest_of(data, replace(table, header=header))
    rows = []
    for row in manifest.rows:
        if all(usable(path) for path in row.channels):
            cells = row.channel_cells.items()
            paths = {name: path_cell(path, csv_path.parent) for name, path in cells}
            known = row.known_cells
            rows.append(paths | {k: v for k, v in known.items() if k != "SubjectID" or k in header})
    return rows


def _split(
    rows: list[dict[str, str]], fractions: Mapping[str, float], seed: int
) -> list[dict[str, str]]:
    """The rows with a column Split, where a fraction is asked for."""
    if not any(fractions.values()):
        return rows
    if any("Split" in row for row in rows):
        raise ManifestError(
            "The CSV has a column Split already: leave out --validation and --test, or the column."
        )
    subjects = [row.get("SubjectID", f"row-{number}") for number, row in enumerate(rows)]
    labels = [int(row.get("Label", -1)) for row in rows]
    splits = split_subjects(subjects, labels, fractions, seed)
    return [row | {"Split": splits[subject]} for row, subject in zip(rows, subjects, strict=True)]


def _left_out_lines(left_out: Iterable[tuple[Path, str]]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason, []).append(str(path))
    lines = []
    for reason, paths in by_reason.items():
        if len(paths) > _NAMES_SHOWN:
            names = ", ".join(first_faults(paths, _NAMES_SHOWN))
            lines.append(f"{len(paths)} times: {reason}: {names}")
        else:
            lines += [f"{path}: {reason}" for path in paths]
    return first_faults(lines)


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


def _images(folder: Path, csv_path: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """Image files below `folder`, relative to it, in natural order; and DICOM files."""
    files = (path.relative_to(folder) for path in files_below(folder))
    images, dicom_files = [], []
    for file in sorted(files, key=lambda file: natural_key(file.as_posix())):
        if folder / file in (csv_path, _record(csv_path)) or bids.is_companion(file):
            continue
        reason = name_fault(file.as_posix())
        if any(part.startswith(".") or part.lower() in _SYSTEM_NAMES for part in file.parts):
            reason = "hidden or of the system"
        elif not image_suffix(file) and not is_slide(folder / file):
            if is_dicom(folder / file):
                dicom_files.append(folder / file)
                continue
            reason = f"not a known image; names end in {', '.join(SUFFIXES)}"
        elif not reason and not (folder / file).stat().st_size:
            reason = "empty (0 bytes)"
        if reason:
            left_out.append((folder / file, reason))
        else:
            images.append(file)
    return images, dicom_files


def _rows(items: Iterable[Item], base: Path, stated: bids.Tables) -> list[dict[str, str]]:
    items = sorted(
        items, key=lambda item: (natural_key(item.label_name), natural_key(item.subject))
    )
    names = sorted({item.label_name for item in items} - {""}, key=natural_key)
    ids = {name: i for i, name in enumerate(names)}
    columns = dict.fromkeys(name for item in items for name in item.entities)
    rows = []
    for item in items:
        row = {f"Channel_{i}": path_cell(file, base) for i, file in enumerate(item.files)}
        row["SubjectID"] = item.subject
        if item.label_name:
            row["Label"] = str(ids[item.label_name])
            row["LabelMapping"] = item.label_name
        row |= {name: item.entities.get(name, "") for name in columns}
        cells = stated.cells_of(item.subject, item.files)
        rows.append(row | {name: cell for name, cell in cells.items() if name not in row})
    return rows


def _tally(rows: Iterable[dict[str, str]], column: str) -> dict[str, int]:
    return dict(Counter(row[column] for row in rows if column in row))
