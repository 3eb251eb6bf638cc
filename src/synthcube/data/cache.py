"""Preprocessed images, made once and read from a memory-mapped file from then on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synthcube import __version__
from synthcube.data.transforms import Prepared
from synthcube.errors import OutputError
from synthcube.storage import explained

log = logging.getLogger("synthcube")

_FORMAT = 1
_ARRAY, _INDEX = "images.f32", "index.json"
# Mapped pages count as memory of the process; past this much they are handed back.
_MAPPED_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """What the cache knows of one image beside its voxels."""

    affine: list[list[float]]
    intensity_range: list[list[float]]


class ImageCache:
    """The images of one manifest under one set of settings, (N, C, *spatial) float32."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self.shape = tuple(index["shape"])
        self.entries = [Entry(**entry) for entry in index["entries"]]
        self._file = (folder / _ARRAY).open("rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._images: npt.NDArray[np.float32] = np.frombuffer(self._map, np.float32).reshape(
            self.shape
        )
        self._touched = 0

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """A copy of those images, (len(rows), C, *spatial)."""
        batch = self._images[np.asarray(rows)]
        self._touched += batch.nbytes
        if self._touched > _MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return batch


def cache_key(files: Sequence[Sequence[Path]], settings: dict[str, Any], root: Path) -> str:
    """Name of the cache of these files' content under these settings."""
    digests = _digests([path for row in files for path in row], root)
    parts = {
        "format": _FORMAT,
        "version": __version__,
        "settings": settings,
        "files": [[digests[path] for path in row] for row in files],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def open_cache(
    root: Path,
    key: str,
    num_images: int,
    prepare: Callable[[], Iterator[Prepared]],
    limit_bytes: float,
) -> ImageCache:
    """The cache called `key` under `root`, built by `prepare` where it is absent or damaged.

    Several processes may call this at once: one builds, the others wait for it.

    Raises:
        OutputError: it would not fit `limit_bytes` or the disk.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    with _locked(root / f"{key}.lock"):
        if not _is_whole(folder):
            if folder.exists():
                log.warning("The cache %s is damaged: it is made again.", folder)
                shutil.rmtree(folder)
            with explained(folder):
                _build(folder, num_images, prepare(), limit_bytes)
            _prune(root, keep=folder, limit_bytes=limit_bytes)
        os.utime(folder)
        return ImageCache(folder)


def _build(folder: Path, num_images: int, images: Iterator[Prepared], limit_bytes: float) -> None:
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        entries: list[Entry] = []
        checksum = 0
        shape: tuple[int, ...] = ()
        with (staging / _ARRAY).open("wb") as file:
            for image in images:
                if not shape:
                    _check_room(folder.parent, num_images * image.tensor.nbytes, limit_bytes)
                shape = tuple(image.tensor.shape)
                piece = image.tensor.numpy().tobytes()
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
                entries.append(
                    Entry(image.affine.tolist(), [list(pair) for pair in image.intensity_range])
                )
            file.flush()
            os.fsync(file.fileno())
        index = {
            "shape": [num_images, *shape],
            "checksum": checksum,
            "entries": [asdict(entry) for entry in entries],
        }
        (staging / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_room(root: Path, needed: int, limit_bytes: float) -> None:
    if needed > limit_bytes:
        raise OutputError(
            f"The preprocessed images take {needed / 1e9:.2f} GB, data.cache_gb allows "
            f"{limit_bytes / 1e9:g}: raise it, or lower data.size."
        )
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OutputError(
            f"The preprocessed images take {needed / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB "
            "free: make room, or name another folder in the variable SYNTHCUBE_CACHE."
        )


def _is_whole(folder: Path) -> bool:
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        checksum = 0
        with (folder / _ARRAY).open("rb") as file:
            while piece := file.read(1 << 22):
                checksum = zlib.crc32(piece, checksum)
        return bool(index["checksum"] == checksum)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _prune(root: Path, *, keep: Path, limit_bytes: float) -> None:
    """Drop the caches that were not used for longest until the rest fits the limit."""
    folders = sorted(
        (path for path in root.iterdir() if path.is_dir() and path.name[0] != "."),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    total = 0
    for folder in [keep, *(path for path in folders if path != keep)]:
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > limit_bytes:
            log.info("The cache %s goes, to keep within data.cache_gb.", folder)
            shutil.rmtree(folder, ignore_errors=True)
            (root / f"{folder.name}.lock").unlink(missing_ok=True)


def _digests(paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """Content hashes; a file of unchanged path, size and time is not read again."""
    memo_path = root / "digests.json"
    try:
        memo = dict(json.loads(memo_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        memo = {}
    found: dict[Path, str] = {}
    fresh: dict[str, str] = {}
    for path in paths:
        stat = path.stat()
        name = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        digest = memo.get(name)
        if digest is None:
            digest = fresh[name] = _digest(path)
        found[path] = digest
    if fresh:
        root.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=root, prefix=".digests-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(memo | fresh, file)
        Path(temporary).replace(memo_path)
    return found


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
