"""The images of one side of an evaluation: read once, checked, and kept on disk, not in memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthcube.data.images import read_image
from synthcube.data.manifest import Manifest, Row, read_manifest
from synthcube.data.transforms import DataConfig, Preprocessing
from synthcube.errors import ImageError, SynthCubeError
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
    paths: dict[str, Path], data: DataConfig, folder: Path
) -> tuple[dict[str, ImageSet], list[str]]:
    """Read the images of every set into files in `folder`.

    Predictions are taken as they are; the real images of the other sets are brought to their
    place as before a training with `data` (orientation, transforms, spacing, size), so that both
    are on one grid. Intensities are left alone.

    Args:
        paths: manifest, CSV or folder of each set, by its name.

    Returns:
        The sets that could be read, and all that is wrong with the others.

    Raises:
        OutputError: `folder` is full.
    """
    found: dict[str, ImageSet] = {}
    faults: list[str] = []
    for name, path in paths.items():
        try:
            settings = DataConfig() if name == "predictions" else data
            found[name] = _read(name, read_manifest(path), settings, folder / f"{name}.f32")
        except SynthCubeError as error:
            faults += [f"{name}: {text}" for text in (error.faults or (str(error),))]
    return found, faults


def _read(name: str, manifest: Manifest, data: DataConfig, path: Path) -> ImageSet:
    preprocessing, total = Preprocessing(data), len(manifest.rows)
    faults: list[str] = []
    shapes: list[tuple[int, ...]] = []
    constant, raster, spacing = 0, True, (1.0, 1.0, 1.0)
    samples: list[Array] = []
    rng = np.random.default_rng(0)
    log.info("Reading %d images of %s ...", total, name)
    with explained(path), path.open("wb") as file:
        for row in manifest.rows:
            try:
                image = read_image(row.channels)
                tensor, affine = preprocessing.placed(image, may_be_constant=name == "predictions")
            except SynthCubeError as error:
                faults.append(_named(str(error), row))
                continue
            voxels = tensor.numpy()[..., 0] if tensor.shape[-1] == 1 else tensor.numpy()
            if not shapes:
                raster = image.raster
                x, y, z = (float(each) for each in np.linalg.norm(affine[:3, :3], axis=0))
                spacing = (x, y, z)
            shapes.append(voxels.shape)
            constant += bool(voxels.min() == voxels.max())
            if len(samples) < _SAMPLED:
                flat = voxels.reshape(voxels.shape[0], -1)
                samples.append(flat[:, rng.integers(flat.shape[1], size=_VALUES_SAMPLED)])
            if shapes[0] == voxels.shape:
                file.write(np.ascontiguousarray(voxels, np.float32).tobytes())
    faults += _shape_faults(manifest, shapes) if len(shapes) == total else []
    if faults:
        raise ImageError(f"{len(faults)} images of {name} cannot be used:", faults)
    bounds = [np.percentile(np.concatenate(each), _BOUNDS) for each in zip(*samples, strict=True)]
    return ImageSet(
        name, manifest, shapes[0], spacing, raster, constant,
        tuple((float(low), float(high)) for low, high in bounds), path,
    )  # fmt: skip


def _named(text: str, row: Row) -> str:
    return text if any(str(path) in text for path in row.channels) else f"{row.channels[0]}: {text}"


def _shape_faults(manifest: Manifest, shapes: list[tuple[int, ...]]) -> list[str]:
    usual, _ = Counter(shapes).most_common(1)[0]
    return [
        f"{row.channels[0]}: shape {list(shape)}, the others {list(usual)} (channels first); "
        f"data.size of the config (-c) brings real images to one"
        for row, shape in zip(manifest.rows, shapes, strict=True)
        if shape != usual
    ]
