"""Volumes in time in one NIfTI file: how many there are, and files of one of them or their mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.arrayproxy import ArrayProxy

from synthcube.data.image_files import Array, check_declared, check_finite, decoding
from synthcube.data.images import write_image
from synthcube.data.layouts import LeftOut
from synthcube.data.manifest import bids_subject, image_suffix, path_cell
from synthcube.data.nifti import MAX_CHANNELS_4D, axes_of, nifti_header, unpacked
from synthcube.errors import ImageError, ManifestError, OutputError
from synthcube.reading import open_file
from synthcube.storage import make_folder
from synthcube.terminal import followed

FOLDER = "volumes"
"""Where the 3D files are written, below the folder of the manifest."""
COLUMN = "Volume"
"""The number of the volume, counted from 0, where each is a row."""
_DESCRIPTION = "volume {} of a series, by synthcube prepare"
_MARK = _DESCRIPTION.partition("{}")
_NIFTI = (".nii", ".nii.gz")


def check_choice(choice: str) -> None:
    """Raise a ManifestError unless `choice` is mean, first, each or a number from 0."""
    if choice not in ("mean", "first", "each") and not (choice.isascii() and choice.isdecimal()):
        raise ManifestError(
            f"--volume {choice}: mean, first, each or a number is needed; volumes count from 0."
        )


def num_volumes(path: Path) -> int:
    """The number of volumes along the fourth axis of a NIfTI file, by its header alone.

    1 where it has no fourth axis, is another kind of file, or cannot be read.
    """
    if image_suffix(path) not in _NIFTI:
        return 1
    try:
        with _opened(path) as series:
            return series.count
    except ImageError:  # which whoever reads the image explains
        return 1


@dataclass(frozen=True, slots=True)
class _Series:
    """An open file of volumes in time."""

    path: Path
    header: Any
    affine: Array
    proxy: ArrayProxy
    count: int

    def volume(self, number: int) -> Array:
        """One volume, scaled as the header says."""
        after = [0] * (len(self.proxy.shape) - 4)
        return np.asarray(self.proxy[(slice(None),) * 3 + (number, *after)])

    @property
    def is_whole(self) -> bool:
        """Whether its intensities are whole numbers."""
        factors = (self.proxy.slope, self.proxy.inter)
        is_integer = self.proxy.dtype.kind in "iu"
        return is_integer and all(float(factor).is_integer() for factor in factors)


@contextmanager
def _opened(path: Path) -> Iterator[_Series]:
    """The series in a file, whose voxels are read volume by volume. Raises ImageError."""
    with open_file(path, ImageError) as file, decoding(path, image_suffix(path)):
        stream: Any = unpacked(file)
        _, header, _ = nifti_header(path, stream)
        axes = axes_of(header.get_data_shape())
        count = axes[3] if len(axes) == 4 else 1
        proxy = ArrayProxy(stream, header, mmap=False)
        yield _Series(path, header, header.get_best_affine(), proxy, count)


def write_volumes(source: Path, folder: Path, name: Path, choice: str) -> list[Path]:
    """Write the chosen volumes of a series as 3D files; a mean is float32. Returns their paths.

    No more than two volumes are in memory. Nothing but the geometry is taken from the header.

    Args:
        folder: gets the files.
        name: path of the series below the folder that it was found in.
        choice: as for :func:`check_choice`.
    """
    with _opened(source) as series:
        proxy = series.proxy
        if proxy.dtype.names or proxy.dtype.kind == "c":
            raise ImageError(f"{source} holds colours or complex numbers, and volumes in time.")
        check_declared(source, proxy.shape[:3], 2 * proxy.dtype.itemsize + 8)
        if choice == "mean":
            mean = np.zeros(proxy.shape[:3])
            for number in range(series.count):
                mean += series.volume(number)
            volumes = iter([("mean", mean / series.count)])
        else:
            volumes = (
                (f"{number:04d}", series.volume(number)) for number in _numbers(series, choice)
            )
        return [_written(series, folder, name, label, volume) for label, volume in volumes]


def _numbers(series: _Series, choice: str) -> Sequence[int]:
    if choice == "each":
        return range(series.count)
    number = 0 if choice == "first" else int(choice)
    if number >= series.count:
        raise ImageError(
            f"{series.path} has no volume {number}: it has {series.count}, 0 to {series.count - 1}."
        )
    return [number]


def _written(series: _Series, folder: Path, name: Path, label: str, volume: Array) -> Path:
    check_finite(series.path, volume)
    path = folder / name.parent / _name(name, label)
    make_folder(path.parent, "output_path")
    _require_own(path)
    tensor = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None]
    whole = series.is_whole and label != "mean"
    write_image(path, tensor, series.affine, integer=whole, description=_DESCRIPTION.format(label))
    return path


def _name(name: Path, label: str) -> str:
    """The file's name; in BIDS the suffix stays the last word: sub-1_volume-mean_bold.nii.gz."""
    stem = name.name[: -len(image_suffix(name))]
    before, _, suffix = stem.rpartition("_")
    if bids_subject(stem) and before and "-" not in suffix:
        return f"{before}_volume-{label}_{suffix}.nii.gz"
    return f"{stem}_volume-{label}.nii.gz"


def _require_own(path: Path) -> None:
    """Refuse to overwrite a file that is not of this module. Raises OutputError."""
    if not path.exists():
        return
    try:
        with _opened(path) as there:
            text = bytes(there.header["descrip"]).decode(errors="replace")
    except ImageError:
        text = ""
    if not (text.startswith(_MARK[0]) and _MARK[2] in text):
        raise OutputError(
            f"output_path: {path} is a file that this command did not write: move it away, or give "
            "another output_path."
        )


@dataclass
class Volumes:
    """Puts files of the chosen volumes into the rows of a manifest, in place of their series.

    Without a choice a row with a series is left out; a short fourth axis then means channels.
    """

    choice: str | None
    data: Path
    """The folder, or the CSV, that the series are listed in."""
    base: Path
    """The folder of the manifest, from which paths start; it gets the folder `volumes`."""
    left_out: LeftOut
    usable: Callable[[Path], bool]
    """Whether a file that was written can be used."""
    _written: dict[Path, list[Path]] = field(default_factory=dict)

    def rows(self, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The rows, with one for each volume where `choice` is each."""
        if self.choice == "each" and any(COLUMN in row for row in rows):
            raise ManifestError(
                f"{self.data} has a column {COLUMN}, which --volume each writes: rename it."
            )
        if self.choice == "each" and rows and "SubjectID" not in rows[0]:
            # the volumes of one series are of one person
            rows = [row | {"SubjectID": f"row-{number}"} for number, row in enumerate(rows)]
        followed_rows = followed(rows, len(rows), "Looking for volumes in time", bar_after_s=1.0)
        return [new for row in followed_rows for new in self._of_row(row)]

    def _of_row(self, row: dict[str, str]) -> list[dict[str, str]]:
        files = {
            name: Path(os.path.normpath(self.base / cell))
            for name, cell in row.items()
            if name.startswith("Channel_")
        }
        counts = {name: num_volumes(file) for name, file in files.items()}
        least = MAX_CHANNELS_4D if self.choice is None else 1
        series = {name: files[name] for name, count in counts.items() if count > least}
        if not series:
            return [row]
        first = next(iter(series.values()))
        if self.choice is None:
            how = "--volume mean (or first, a number, each) takes them as 3D images"
            self.left_out.append((first, f"volumes in time: {how}"))
            return []
        if self.choice == "each" and len({counts[name] for name in series}) > 1:
            numbers = ", ".join(str(counts[name]) for name in series)
            self.left_out.append((first, f"its channels have {numbers} volumes"))
            return []
        try:
            written = {name: self._files_of(file) for name, file in series.items()}
        except ImageError as error:
            self.left_out.append((first, str(error).removeprefix(f"{first} ")))
            return []
        rows = []
        for number in range(len(next(iter(written.values())))):
            chosen = {name: paths[number] for name, paths in written.items()}
            usable = [self.usable(path) for path in chosen.values()]  # each is told of
            if all(usable):
                cells = {name: path_cell(path, self.base) for name, path in chosen.items()}
                column = {COLUMN: str(number)} if self.choice == "each" else {}
                rows.append(row | cells | column)
        return rows

    def _files_of(self, source: Path) -> list[Path]:
        if source not in self._written:
            assert self.choice is not None
            top = self.data.resolve() if self.data.is_dir() else self.data.absolute().parent
            inside = source.is_relative_to(top)
            name = source.relative_to(top) if inside else source.relative_to(source.anchor)
            self._written[source] = write_volumes(source, self.base / FOLDER, name, self.choice)
        return self._written[source]
