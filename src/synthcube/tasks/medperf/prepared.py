"""A prepared folder: images, their manifest, and an index that is written last.

Without its index a folder counts for nothing: its preparation was cut short.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field

from synthcube import reading, storage
from synthcube.data.manifest import FILE_NAME
from synthcube.errors import ManifestError, OutputError
from synthcube.schema import Schema

IMAGES, INDEX = "images", "prepared.json"
VOXELS = "voxels.json"  # a list of digests alone, to be shown to others


class _Image(Schema):
    """An image of the index."""

    subject: str = Field(description="Whose it is.")
    voxels: str = Field(description="voxel_digest of the raw image.")


class _Index(Schema):
    """prepared.json; what else is recorded there is for people."""

    model_config = ConfigDict(extra="ignore")

    images: dict[str, _Image] = Field(default={}, description="By its path in the folder.")
    files: dict[str, str] = Field(description="SHA-256 of each file.")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a prepared image comes from."""

    path: str  # of its first file, relative to the prepared folder
    subject: str
    voxels: str  # voxel_digest of the raw image


def voxel_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the shape (C, X, Y, Z) and the float32 voxels: of content, whatever the file."""
    voxels = tensor.float().contiguous().numpy()
    return hashlib.sha256(str(voxels.shape).encode() + voxels.tobytes()).hexdigest()


def claim(folder: Path, name: str) -> list[str]:
    """Take a folder that is empty, or holds what an earlier preparation wrote, and no more.

    Returns:
        The names of the files in it.

    Raises:
        OutputError: it holds something else, or cannot be written.
    """
    storage.make_folder(folder, name)
    storage.settle(folder)
    if not storage.contents(folder):
        return []
    index = folder / INDEX
    listed = [INDEX, *_read(index).files] if index.is_file() else []
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if strange := sorted({*found} - {*listed}):
        raise OutputError(
            f"{name} {folder} holds something else than prepared images ({strange[0]}): "
            "give another one, or empty it."
        )
    return found


def clear(folder: Path) -> None:
    """Remove what an earlier preparation wrote into a folder; the index goes first."""
    with storage.explained(folder):
        (folder / INDEX).unlink(missing_ok=True)
        (folder / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder / IMAGES, ignore_errors=True)


def content_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of all files at or below `paths`, whatever their names.

    In an index it makes that unlike any file that was prepared, an older index among them:
    MedPerf takes data whose files are all the same before and after for unprepared.
    """
    found = (file for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    digests = sorted(storage.sha256(file) for file in found)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def write_index(folder: Path, sources: list[Source], record: dict[str, Any]) -> None:
    """Close the folder: every file with its hash, every image with that of its source."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    storage.write_json(
        folder / INDEX,
        record
        | {
            "images": {
                each.path: {"subject": each.subject, "voxels": each.voxels} for each in sources
            },
            "files": {name: storage.sha256(folder / name) for name in names if name != INDEX},
        },
    )


def read_sources(index: Path) -> list[Source]:
    """The images that an index lists.

    Raises:
        ManifestError: it is missing or no index.
    """
    images = _read(index).images
    return [Source(path, each.subject, each.voxels) for path, each in images.items()]


def read_digests(path: Path) -> list[str]:
    """The digests of images in a list that prepare has written to its metadata.

    Raises:
        ManifestError: it is no such list.
    """
    found = reading.read_json(path, ManifestError, limit=reading.MAX_LIST_BYTES)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ManifestError(f"{path} is not a list of digests, as prepare writes {VOXELS}.")
    return found


def changed_files(folder: Path) -> list[str]:
    """What is wrong with the files of a prepared folder, one line each.

    Raises:
        ManifestError: there is no index.
    """
    folder = storage.recovered_folder(folder)
    listed = _read(folder / INDEX).files
    faults = []
    for name, digest in listed.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            faults.append(f"{folder / INDEX} lists {name}, which is not in its folder")
        elif not (folder / name).is_file():
            faults.append(f"{folder / name} is missing")
        elif storage.sha256(folder / name) != digest:
            faults.append(f"{folder / name} has changed since it was prepared (SHA-256 differs)")
    return faults


def _read(index: Path) -> _Index:
    if not index.is_file():
        raise ManifestError(
            f"{index.parent} was not prepared, or its preparation was cut short: it has no {INDEX}."
        )
    values = reading.read_object(index, ManifestError, limit=reading.MAX_LIST_BYTES)
    return reading.validated(values, _Index, index, ManifestError)
