"""The images of one side of an evaluation: read once, checked, and kept on disk, not in memory."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthcube.data.images import Image, read_image
from synthcube.data.manifest import Manifest, Row
from synthcube.data.transforms import DataConfig, Preprocessing
from synthcube.errors import SynthCubeError
from synthcube.runtime import told
from synthcube.storage import explained

log = logging.getLogger("synthcube")

Array = npt.NDArray[np.float32]

_SAMPLED = 1000  # images whose intensities tell the range of a set
_BOUNDS = (0.1, 99.9)  # percentiles
_VALUES_SAMPLED = 4096  # of each


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images in their own intensities, in the order of their manifest."""

    name: str
    """predictions, labels or train_data: what the user knows them by."""
    manifest: Manifest
    shape: tuple[int, ...]
    """(C, *spatial) of each."""
    spacing_mm: tuple[float, ...]
    """Of the first image."""
    raster: bool
    """Pictures: the first axis runs to the right, the second down."""
    constant: int
    """Images whose voxels are all the same."""
    digests: tuple[bytes, ...]
    """Of each image's voxels: equal where all of them are."""
    sha256: str
    """Of the voxels of all, in their order."""
    bounds: tuple[tuple[float, float], ...]
    """Nearly the lowest and highest intensity, for each channel (0.1 and 99.9 percent)."""
    path: Path
    """Raw float32 of all, (N, C, *spatial)."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.manifest.rows

    @property
    def distinct(self) -> int:
        """Images that differ from one another."""
        return len(set(self.digests))

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.shape) - 1

    def subjects(self) -> npt.NDArray[np.int64]:
        """(N,): the number of each image's subject, from 0."""
        numbers: dict[str, int] = {}
        found = [numbers.setdefault(row.subject, len(numbers)) for row in self.rows]
        return np.array(found, np.int64)

    def read(self, rows: Sequence[int]) -> Array:
        """A copy of those images, (len(rows), C, *spatial), float32."""
        length = int(np.prod(self.shape))
        out = np.empty((len(rows), *self.shape), np.float32)
        with self.path.open("rb", buffering=0) as file:
            for place, row in enumerate(rows):
                file.seek(int(row) * length * 4)
                out[place] = np.fromfile(file, np.float32, length).reshape(self.shape)
        return out

    def batches(self, size: int = 64) -> Iterator[tuple[range, Array]]:
        """All images in their order, at most `size` at once, with their places."""
        for start in range(0, len(self), size):
            rows = range(start, min(start + size, len(self)))
            yield rows, self.read(rows)


def open_sets(
    manifests: Mapping[str, Manifest], data: DataConfig, folder: Path
) -> tuple[dict[str, ImageSet], list[str]]:
    """Read the images of every set into files in `folder`.

    Predictions are taken as they are; the real images of the other sets are brought to their
    place as before a training with `data` (orientation, transforms, spacing, size; the channels
    that are made, of a model that translates), so that both are on one grid. Intensities are left
    alone.

    Returns:
        The sets that could be read, and all that is wrong with the others.

    Raises:
        OutputError: `folder` is full.
    """
    found: dict[str, ImageSet] = {}
    faults: list[str] = []
    for name, manifest in manifests.items():
        log.info("Reading %d images of %s ...", len(manifest.rows), name)
        placing = _Placing(DataConfig(), True) if name == "predictions" else _Placing(data, False)
        path = folder / f"{name}.f32"
        summary = _Summary()
        with explained(path):
            wrong = _copy(manifest, placing, path, summary)
        if wrong:
            faults += [f"{name}: {text}" for text in wrong]
        else:
            found[name] = summary.image_set(name, manifest, path)
    return found, faults


class _Placing:
    """Brings one image to its place among the others."""

    def __init__(self, data: DataConfig, may_be_constant: bool) -> None:
        self.preprocessing = Preprocessing(data)
        self.sources = frozenset(data.source_channels)
        self.may_be_constant = may_be_constant

    def __call__(self, image: Image) -> tuple[Array, npt.NDArray[np.float64]]:
        """Its voxels, (C, *spatial), and its affine."""
        tensor, affine = self.preprocessing.placed(image, may_be_constant=self.may_be_constant)
        if self.sources and len(tensor) > len(self.sources):
            tensor = tensor[[i for i in range(len(tensor)) if i not in self.sources]]
        voxels = tensor.numpy()
        return np.ascontiguousarray(voxels[..., 0] if voxels.shape[-1] == 1 else voxels), affine


@dataclass(slots=True)
class _Summary:
    """What is known of a set once all its images went by."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)
    raster: bool = True
    constant: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    digests: list[bytes] = field(default_factory=list)
    samples: list[Array] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, voxels: Array, affine: npt.NDArray[np.float64], raster: bool) -> None:
        if not self.shapes:
            self.raster = raster
            self.spacing_mm = tuple(float(x) for x in np.linalg.norm(affine[:3, :3], axis=0))
        self.shapes.append(voxels.shape)
        self.constant += bool(voxels.min() == voxels.max())
        self.digest.update(voxels.tobytes())
        signless = (voxels + 0.0).tobytes()  # -0 becomes 0
        self.digests.append(hashlib.blake2b(signless, digest_size=16).digest())
        if len(self.samples) < _SAMPLED:
            flat = voxels.reshape(voxels.shape[0], -1)
            self.samples.append(flat[:, self.rng.integers(flat.shape[1], size=_VALUES_SAMPLED)])

    def image_set(self, name: str, manifest: Manifest, path: Path) -> ImageSet:
        bounds = [
            np.percentile(np.concatenate(each), _BOUNDS) for each in zip(*self.samples, strict=True)
        ]
        return ImageSet(
            name, manifest, self.shapes[0], self.spacing_mm, self.raster, self.constant,
            tuple(self.digests), self.digest.hexdigest(),
            tuple((float(low), float(high)) for low, high in bounds), path,
        )  # fmt: skip


def _copy(manifest: Manifest, placing: _Placing, path: Path, summary: _Summary) -> list[str]:
    """Write the voxels of all images to `path`; returns all that is wrong with them."""
    faults: list[str] = []
    with path.open("wb") as file:
        for row in told(manifest.rows, len(manifest.rows), "Reading images"):
            try:
                image = read_image(row.channels)
                voxels, affine = placing(image)
            except SynthCubeError as error:
                faults.append(_named(str(error), row))
                continue
            summary.add(voxels, affine, image.raster)
            if voxels.shape == summary.shapes[0]:
                file.write(voxels.tobytes())
    return faults or _shape_faults(manifest, summary.shapes)


def _named(text: str, row: Row) -> str:
    return text if any(str(path) in text for path in row.channels) else f"{row.channels[0]}: {text}"


def _shape_faults(manifest: Manifest, shapes: list[tuple[int, ...]]) -> list[str]:
    usual, _ = Counter(shapes).most_common(1)[0]
    return [
        f"{row.channels[0]}: shape {list(shape)}, the others {list(usual)} (channels first); "
        "data.size of the config (-c) brings real images to one"
        for row, shape in zip(manifest.rows, shapes, strict=True)
        if shape != usual
    ]
