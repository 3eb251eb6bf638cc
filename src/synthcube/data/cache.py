"""Preprocessed images, computed once and then read from a memory-mapped file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from synthcube import __version__
from synthcube.data.images import Image, read_images
from synthcube.data.manifest import Manifest, Row
from synthcube.data.patches import cut
from synthcube.data.preprocessing import DataConfig, Prepared, Preprocessing
from synthcube.errors import ImageError, OutputError, first_faults
from synthcube.schema import near_multiples
from synthcube.storage import make_folder, storage_errors, write_json
from synthcube.terminal import followed

log = logging.getLogger("synthcube")
_FORMAT = 5
_ARRAY, _INDEX = "images.f32", "index.json"
_KEY_LENGTH, _BUILDING = 32, ".building-"
# Nothing else in the folder is ours to remove.
_OURS = re.compile(rf"[0-9a-f]{{{_KEY_LENGTH}}}|{re.escape(_BUILDING)}[0-9a-f]{{{_KEY_LENGTH}}}-.*")
# Mapped pages count as memory of the process; past this much they are handed back. The kernel maps
# some pages around every one that is read, so that several times as much is resident.
_MAPPED_BYTES = 2 << 20
_SIDE_STEP = 32  # sides that are multiples of it suit the defaults of every family
_GREY_LEVEL = 2 / 255  # of a picture of 8 bits, in [-1, 1]


def load_images(manifest: Manifest, config: DataConfig, cache: Path) -> ImageCache:
    """The preprocessed images of `manifest`, in its order, from the cache or newly computed.

    With data.slices, they are those of its volumes' slices; see :meth:`ImageCache.rows_of`.
    """
    files = [row.channels for row in manifest.rows]
    settings = config.preprocessing_key
    if any(row.slice is not None for row in manifest.rows):
        settings["rows"] = [row.slice for row in manifest.rows]
    key = cache_key(files, settings, cache)
    images = open_cache(
        cache, key, len(files), lambda: _prepared(manifest, config), config.cache_gb * 1e9
    )
    if not config.patches and not images.is_of_one_shape:  # patches were taken of them before
        paths = (str(manifest.rows[place].channels[0]) for place in images.source_rows)
        raise _unusable(manifest, shape_faults(dict(zip(paths, images.shapes, strict=True))))
    return images


def shape_faults(shapes: dict[str, tuple[int, ...]], *, any_size: bool = False) -> list[str]:
    """One line for each image, by its name, whose shape (C, *spatial) is not the usual one.

    Args:
        any_size: only channels, and the number of axes, must agree.
    """
    if len(set(shapes.values())) <= 1:
        return []
    usual, _ = Counter(shapes.values()).most_common(1)[0]
    faults = []
    for name, shape in shapes.items():
        if shape[0] != usual[0]:
            faults.append(
                f"{name}: {shape[0]} channels, the others have {usual[0]}; "
                "convert it, or leave it out"
            )
        elif len(shape) != len(usual):
            faults.append(
                f"{name}: {len(shape) - 1} spatial axes, the others have {len(usual) - 1}; "
                "leave it out"
            )
        elif shape != usual and not any_size:
            faults.append(
                f"{name}: shape {shape[1:]}, the others {usual[1:]}; data.size: "
                f"{near_multiples(usual[1:], _SIDE_STEP)} brings all to one, and data.patches "
                "takes parts of all"
            )
    return faults


class Float32Rows:
    """An array (N, *row_shape) in a file that holds nothing else, read a few rows at a time.

    The file must not be empty. A memory map holds it open, and with it a shared lock.
    """

    def __init__(self, path: Path, row_shape: Sequence[int]) -> None:
        self.path, self.row_shape = path, tuple(row_shape)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # the map keeps it: an open cache is not pruned
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        values: npt.NDArray[np.float32] = np.frombuffer(self._map, np.float32)
        self.mapped = values.reshape(-1, *self.row_shape)
        """The whole array, as a memory map."""
        self._touched = 0

    def read(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """A copy of those rows, (len(rows), *row_shape)."""
        batch: npt.NDArray[np.float32] = self.mapped[np.asarray(rows, np.int64)]
        self.hand_back(batch.nbytes)
        return batch

    def hand_back(self, nbytes: int) -> None:
        """Count what was read of `mapped`; give its pages back to the system once it is enough."""
        self._touched += nbytes
        if self._touched > _MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


@contextmanager
def append_rows(path: Path) -> Iterator[Callable[[npt.NDArray[np.float32]], None]]:
    """Yield a function that appends an array to a new file at `path`, for :class:`Float32Rows`."""
    with storage_errors(path), path.open("wb") as file:

        def append(rows: npt.NDArray[np.float32]) -> None:
            file.write(rows.tobytes())

        yield append


class ImageCache:
    """The images of one manifest under one set of settings, (N, C, *spatial) float32.

    Beside them `affines` (N, 4, 4), and `intensity_ranges` (N, C, 2): the source intensities that
    -1 and 1 stand for. Images to take patches of may be of several sizes: `shapes` has (C,
    *spatial) of each, `shape` the shortest sides.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self.shapes: list[tuple[int, ...]] = [tuple(shape) for shape in index["shapes"]]
        self.shape: tuple[int, ...] = (len(self.shapes), *map(min, *self.shapes, self.shapes[0]))
        self.affines: npt.NDArray[np.float64] = np.array(index["affines"])
        self.intensity_ranges: npt.NDArray[np.float64] = np.array(index["intensity_ranges"])
        self._sources: list[tuple[int, int | None]] = index["sources"]
        self._folder = folder
        self._voxels = Float32Rows(folder / _ARRAY, ())
        self.is_of_one_shape = len(set(self.shapes)) == 1
        self._ends: list[int] = np.cumsum([math.prod(shape) for shape in self.shapes]).tolist()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of all images."""
        return self._ends[-1] * 4

    @property
    def source_rows(self) -> list[int]:
        """For each image, the row of the manifest that it is from."""
        return [place for place, _ in self._sources]

    def rows_of(self, manifest: Manifest) -> Manifest:
        """The manifest that was loaded, with a row for each image: its own, or one a slice."""
        rows = []
        for place, number in self._sources:
            row = manifest.rows[place]
            rows.append(row if number is None else replace(row, slice=number))
        return Manifest(manifest.path, tuple(rows))

    def __reduce__(self) -> tuple[type[ImageCache], tuple[Path]]:
        return ImageCache, (self._folder,)  # for loader processes that are not forked

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.float32]:
        """A copy of those images, which are of one shape: (len(rows), C, *spatial)."""
        batch: npt.NDArray[np.float32]
        if self.is_of_one_shape:
            batch = self._voxels.mapped.reshape(self.shape)[np.asarray(rows, np.int64)]
        else:
            sizes = {self.shapes[row][1:] for row in rows}
            if len(sizes) > 1:
                shown = " and ".join(str(list(size)) for size in sorted(sizes)[:2])
                raise ImageError(
                    f"The images have several sizes, such as {shown}: give those of one size at a "
                    "time."
                )
            batch = np.stack([self._image(row) for row in rows])
        self._voxels.hand_back(batch.nbytes)
        return batch

    def read_patches(
        self, rows: Sequence[int], starts: Sequence[Sequence[int]], size: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """A copy of a patch of each of those images, (len(rows), C, *size), and of nothing else.

        Args:
            starts: the first voxel of each patch.
        """
        pairs = zip(rows, starts, strict=True)
        batch = np.stack([self._image(row)[cut(start, size)] for row, start in pairs])
        # Pages between the lines of a patch are mapped too.
        shapes = [self.shapes[row] for row in rows]
        planes = (math.prod((shape[0], size[0], *shape[2:])) for shape in shapes)
        self._voxels.hand_back(sum(planes) * 4)
        return batch

    def _image(self, row: int) -> npt.NDArray[np.float32]:
        """(C, *spatial), in the memory map."""
        shape, end = self.shapes[row], self._ends[row]
        return self._voxels.mapped[end - math.prod(shape) : end].reshape(shape)


def open_cache(
    root: Path,
    key: str,
    num_images: int,
    prepare: Callable[[], Iterator[Prepared]],
    limit_bytes: float,
) -> ImageCache:
    """The cache called `key` under `root`, built by `prepare` where it is absent or damaged.

    Several processes may call this at once: one builds, the others wait for it.
    """
    make_folder(root)
    folder = root / key
    with _locked(root / f"{key}.lock"):
        if not _is_whole(folder):
            with storage_errors(folder):
                if folder.exists():
                    log.warning("The cache %s is damaged and is built again.", folder)
                    shutil.rmtree(folder)
                _build(folder, num_images, prepare(), limit_bytes)
            _prune(root, keep=folder, limit_bytes=limit_bytes)
        os.utime(folder)
        return ImageCache(folder)


def cache_key(files: Sequence[Sequence[Path]], settings: dict[str, Any], root: Path) -> str:
    """Name of the cache for the content of these files under these settings."""
    digests = content_digests([path for row in files for path in row], root)
    parts = {
        "format": _FORMAT,
        "version": __version__,
        "settings": settings,
        "files": [[digests[path] for path in row] for row in files],
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_KEY_LENGTH // 2).hexdigest()


def content_digests(paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """Content hashes of files; one whose metadata have not changed is not read again.

    The metadata include ctime, which users cannot set, as mtime can be set by anybody.
    """
    memo_path = root / "digests.json"
    try:
        memo = dict(json.loads(memo_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        memo = {}
    digests: dict[Path, str] = {}
    fresh: dict[str, str] = {}
    for path in paths:
        try:
            stat = path.stat()
            parts = (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            name = "|".join(map(str, parts))
            digests[path] = memo.get(name) or fresh.setdefault(name, _digest(path))
        except OSError:
            digests[path] = os.urandom(16).hex()  # in no cache; reading the image says why
    if fresh:
        make_folder(root)
        write_json(memo_path, memo | fresh)
    return digests


def _prepared(manifest: Manifest, config: DataConfig) -> Iterator[Prepared]:
    """Every image preprocessed, in the manifest's order; faults of all are raised together."""
    preprocessing = Preprocessing(config)
    unusable: dict[Row, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    contrasts = _Contrasts()
    log.info("Preprocessing %d images (cached for next time) ...", len(manifest.rows))
    rows = followed(manifest.rows, len(manifest.rows), "Preprocessing")

    def prepare(row: Row, image: Image) -> list[Prepared]:
        cuts = preprocessing.images_of(image, row.slice)
        return [replace(preprocessing(cut), slice=number) for number, cut in cuts]

    for place, (row, images) in enumerate(read_images(rows, prepare, unusable)):
        for prepared in images:
            shapes[str(row.channels[0])] = tuple(prepared.tensor.shape)
            contrasts.add(prepared)
            if not unusable:
                yield replace(prepared, row=place)
    if not unusable and (lost := contrasts.faults(config)):
        raise ImageError(
            f"The range of intensities leaves no contrast in any image of {manifest.path}:", lost
        )
    of_shapes = shape_faults(shapes, any_size=config.patches is not None)
    if faults := [*unusable.values(), *of_shapes]:
        raise _unusable(manifest, faults, may_be_left_out=bool(unusable))


def _unusable(
    manifest: Manifest, faults: Sequence[str], *, may_be_left_out: bool = False
) -> ImageError:
    count = "1 image" if len(faults) == 1 else f"{len(faults)} images"
    return ImageError(
        f"{count} of {manifest.path} cannot be used"
        f"{' (synthcube prepare --verify leaves them out)' if may_be_left_out else ''}:",
        first_faults(faults),
    )


class _Contrasts:
    """The contrast of each channel over all images, before and after scaling to [-1, 1].

    A fixed range may make one image all black; if it does so to all of them, it is a mistake.
    """

    def __init__(self) -> None:
        self.before: list[tuple[float, float]] = []
        self.after: list[float] = []

    def add(self, image: Prepared) -> None:
        low, high = image.tensor.flatten(1).aminmax(dim=1)
        after = (high - low).tolist()
        pairs = zip(self.before or image.source_range, image.source_range, strict=False)
        self.before = [(min(a, c), max(b, d)) for (a, b), (c, d) in pairs]
        self.after = [max(pair) for pair in zip(self.after or after, after, strict=False)]

    def faults(self, config: DataConfig) -> list[str]:
        """One line for each channel whose fixed range leaves less than a grey level in every
        image."""
        faults = []
        for index, ((low, high), after) in enumerate(zip(self.before, self.after, strict=True)):
            key, fixed = config.fixed_range(index)
            if fixed and low < high and after < _GREY_LEVEL:
                faults.append(
                    f"channel {index}: its intensities are {low:g} to {high:g}, and {key} is "
                    f"{list(fixed)}"
                )
        return faults


def _build(folder: Path, num_images: int, images: Iterator[Prepared], limit_bytes: float) -> None:
    prefix = f"{_BUILDING}{folder.name}-"
    for killed in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(killed)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        index: dict[str, Any] = {
            "shapes": [], "sources": [], "affines": [], "intensity_ranges": [],
        }  # fmt: skip
        checksum, written = 0, 0
        with (staging / _ARRAY).open("wb") as file:
            for image in images:
                if not written:
                    _check_room(folder.parent, num_images * image.tensor.nbytes, limit_bytes)
                written += image.tensor.nbytes
                if written > limit_bytes:  # of slices
                    raise OutputError(
                        f"The preprocessed images take more than {limit_bytes / 1e9:g} GB, which "
                        "data.cache_gb allows: raise it, or lower data.size."
                    )
                piece = image.tensor.numpy().tobytes()
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
                index["shapes"].append(tuple(image.tensor.shape))
                index["sources"].append((image.row, image.slice))
                index["affines"].append(image.affine.tolist())
                index["intensity_ranges"].append(image.intensity_range)
            file.flush()
            os.fsync(file.fileno())
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
    """Remove the least recently used caches until the rest fits the limit, and killed builds.

    A cache that a process has open or is about to open stays.
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
                log.info("Removing the cache %s to stay within data.cache_gb.", folder)
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
    with storage_errors(path):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
