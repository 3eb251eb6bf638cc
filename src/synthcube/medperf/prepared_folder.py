"""A folder of prepared images: images/, manifest.csv, and the index prepared.json.

The index is written last. A folder without one is incomplete, and no task reads it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field

from synthcube import reading, storage
from synthcube.data.manifest import FILE_NAME
from synthcube.errors import ManifestError, OutputError
from synthcube.models.artifact import damaged
from synthcube.schema import Schema

IMAGES, INDEX = "images", "prepared.json"
VOXELS = "voxels.json"  # a list of digests only, which can be shown to others


class PreparedImage(Schema):
    """An image of the index."""

    subject: str = Field(description="The subject of the image.")
    voxels: str = Field(description="voxel_digest of the raw image.")


class Index(Schema):
    """The content of prepared.json that is read back; the rest is for people."""

    model_config = ConfigDict(extra="ignore")

    images: dict[str, PreparedImage] = Field(default={}, description="By path in the folder.")
    files: dict[str, str] = Field(description="SHA-256 of each file.")


def read_index(folder: Path) -> Index:
    """Return the index of a prepared folder."""
    path = folder / INDEX
    if not path.is_file():
        raise ManifestError(
            f"{folder} was not prepared, or its preparation was interrupted: it has no {INDEX}."
        )
    values = reading.read_object(path, ManifestError, limit=reading.MAX_LIST_BYTES)
    return reading.validated(values, Index, path, ManifestError)


def write_index(
    folder: Path, images: Mapping[str, PreparedImage], record: Mapping[str, Any]
) -> None:
    """Complete a folder: write its images, the SHA-256 of every file, and `record`."""
    files = {name: storage.sha256(folder / name) for name in _file_names(folder) if name != INDEX}
    listed = {path: image.model_dump() for path, image in images.items()}
    storage.write_json(folder / INDEX, {**record, "images": listed, "files": files})


def claim(folder: Path, parameter: str) -> list[str]:
    """The names of the files of an earlier preparation, which are all that is in `folder`."""
    storage.make_folder(folder, parameter)
    storage.settle(folder)
    if not storage.contents(folder):
        return []
    listed = [INDEX, *read_index(folder).files] if (folder / INDEX).is_file() else []
    names = _file_names(folder)
    if others := sorted({*names} - {*listed}):
        raise OutputError(
            f"{parameter} {folder} holds files other than prepared images ({others[0]}): "
            "use another folder, or empty it."
        )
    return names


def clear(folder: Path) -> None:
    """Remove the files of an earlier preparation, the index first."""
    with storage.storage_errors(folder):
        (folder / INDEX).unlink(missing_ok=True)
        (folder / FILE_NAME).unlink(missing_ok=True)
        shutil.rmtree(folder / IMAGES, ignore_errors=True)


def changed_files(folder: Path) -> list[str]:
    """Return what is wrong with the files of a prepared folder, one line each."""
    folder = storage.recovered_folder(folder)
    files = read_index(folder).files
    outside = [name for name in files if ".." in Path(name).parts or Path(name).is_absolute()]
    faults = [f"{folder / INDEX} lists {name}, which is not in its folder" for name in outside]
    inside = {name: digest for name, digest in files.items() if name not in outside}
    return faults + [f"{folder}/{text}" for text in damaged(folder, inside, "prepared").values()]


def voxel_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of shape (C, X, Y, Z) and float32 voxels, whatever the file format."""
    voxels = tensor.float().contiguous().numpy()
    return hashlib.sha256(str(voxels.shape).encode() + voxels.tobytes()).hexdigest()


def content_digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of all files at or below `paths`, whatever their names.

    In the index, it makes the index differ from every input file, even from an older index: if all
    files are the same before and after, MedPerf concludes that the data were not prepared.
    """
    files = (file for path in paths for file in (path, *path.rglob("*")) if file.is_file())
    digests = sorted(storage.sha256(file) for file in files)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def read_digests(path: Path) -> list[str]:
    """Return the voxel digests in a list such as voxels.json."""
    digests = reading.read_json(path, ManifestError, limit=reading.MAX_LIST_BYTES)
    if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
        raise ManifestError(f"{path} is not a list of digests, as prepare writes {VOXELS}.")
    return digests


def _file_names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
