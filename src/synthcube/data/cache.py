"""Preprocessed images, made once and read from a memory-mapped file from then on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synthcube import __version__
from synthcube.data.digests import content_digests
from synthcube.data.transforms import Prepared
from synthcube.errors import OutputError
from synthcube.storage import explained, make_folder

log = logging.getLogger("synthcube")

_FORMAT = 3
_ARRAY, _INDEX = "images.f32", "index.json"
_KEY_LENGTH, _BUILDING = 32, ".building-"
# Whatever else is in the folder is not for us to remove.
_OURS = re.compile(rf"[0-9a-f]{{{_KEY_LENGTH}}}|{re.escape(_BUILDING)}[0-9a-f]{{{_KEY_LENGTH}}}-.*")
# Mapped pages count as memory of the process; past this much they are handed back. The kernel maps
# some pages around every one that is read, so that several times as much is resident.
_MAPPED_BYTES = 2 << 20


class ImageCache:
    """The images of one manifest under one set of settings, (N, C, *spatial) float32.

    Beside them `affines` (N, 4, 4), and `intensity_ranges` (N, C, 2): the source intensities that
    -1 and 1 stand for.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self.shape: tuple[int, ...] = tuple(index["shape"])
        self.affines: npt.NDArray[np.float64] = np.array(index["affines"])
        self.intensity_ranges: npt.NDArray[np.float64] = np.array(index["intensity_ranges"])
        self._folder = folder
        with (folder / _ARRAY).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # the map keeps it: what is open is not pruned
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._images: npt.NDArray[np.float32] = np.frombuffer(self._map, np.float32).reshape(
            self.shape
        )
        self._touched = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path]]:
        return ImageCache, (self._folder,)  # for loader processes that are not forked

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """A copy of those images, (len(rows), C, *spatial)."""
        batch: npt.NDArray[np.float32] = self._images[np.asarray(rows)]
        self._touched += batch.nbytes
        if self._touched > _MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return batch


def cache_key(files: Sequence[Sequence[Path]], settings: dict[str, Any], root: Path) -> str:
    """Name of the cache of these files' content under these settings."""
    digests = content_digests([path for row in files for path in row], root)
    parts = {
        "format": _FORMAT,
        "version": __version__,
        "settings": settings,
        "files": [[digests[path] for path in row] for row in files],
    }
    return hashlib.blake2b(
        json.dumps(parts, sort_keys=True).encode(), digest_size=_KEY_LENGTH // 2
    ).hexdigest()


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
    make_folder(root)
    folder = root / key
    with _locked(root / f"{key}.lock"):
        if not _is_whole(folder):
            with explained(folder):
                if folder.exists():
                    log.warning("The cache %s is damaged: it is made again.", folder)
                    shutil.rmtree(folder)
                _build(folder, num_images, prepare(), limit_bytes)
            _prune(root, keep=folder, limit_bytes=limit_bytes)
        os.utime(folder)
        return ImageCache(folder)


def _build(folder: Path, num_images: int, images: Iterator[Prepared], limit_bytes: float) -> None:
    prefix = f"{_BUILDING}{folder.name}-"
    for killed in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(killed)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        affines: list[list[list[float]]] = []
        ranges: list[Sequence[Sequence[float]]] = []
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
                affines.append(image.affine.tolist())
                ranges.append(image.intensity_range)
            file.flush()
            os.fsync(file.fileno())
        index: dict[str, Any] = {
            "shape": [num_images, *shape],
            "affines": affines,
            "intensity_ranges": ranges,
        }
        index["checksum"] = zlib.crc32(json.dumps(index).encode(), checksum)
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
        expected = index.pop("checksum")
        return bool(zlib.crc32(json.dumps(index).encode(), checksum) == expected)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _prune(root: Path, *, keep: Path, limit_bytes: float) -> None:
    """Drop the caches not used for longest until the rest fits the limit, and killed builds.

    One that a process has open or is about to open stays.
    """
    folders = [path for path in root.iterdir() if _OURS.fullmatch(path.name) and path != keep]
    folders.sort(key=_last_use, reverse=True)
    total = _size(keep)
    for folder in folders:
        is_leftover = folder.name.startswith(_BUILDING)
        total += 0 if is_leftover else _size(folder)
        if not is_leftover and total <= limit_bytes:
            continue
        key = folder.name.removeprefix(_BUILDING)[:_KEY_LENGTH]
        with suppress(OutputError), _locked(root / f"{key}.lock", wait=False) as is_mine:
            if is_mine and (is_leftover or not _is_open(folder)):
                log.info("The cache %s goes, to keep within data.cache_gb.", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _last_use(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return 0.0


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return 0


def _is_open(folder: Path) -> bool:
    """Whether an :class:`ImageCache` of any process is reading it."""
    try:
        with (folder / _ARRAY).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock called `path`; without `wait`, say whether it was free."""
    with explained(path):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
