"""Features of all images of a set, in tables on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from synthcube.errors import ImageError
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.features.extractors import Extractor
from synthcube.evaluation.images import ImageSet
from synthcube.storage import explained

log = logging.getLogger("synthcube")

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bounds = tuple[tuple[float, float], ...]

_PIXELS = 1 << 18  # of all slices that a network gets at once: 64 of 64x64
_VOXELS = 1 << 22  # of all images that are read at once
_MIDDLE = 0.8  # the outer slices of a volume are mostly empty
# axis of (N, C, X, Y, Z) that is cut across, by the axes that lie in the plane
_CUTS = {"yz": 2, "xz": 3, "xy": 4}


@dataclass(frozen=True, slots=True)
class Table:
    """Features of one plane of all images: one row for each slice, on disk."""

    path: Path
    images: int
    """N."""
    slices: int
    """s: those of an image follow each other; 1 for pictures and for whole volumes."""
    dimension: int
    """D."""

    def rows(self) -> Array:
        """(N * s, D), float32, a memory map."""
        shape = (self.images * self.slices, self.dimension)
        return np.memmap(self.path, np.float32, "r", shape=shape)

    def owners(self) -> Ints:
        """(N * s,): the image of each row."""
        return np.repeat(np.arange(self.images), self.slices)

    def rows_of(self, images: Ints) -> Ints:
        """(len(images) * s,): the rows of those images, in their order."""
        return (images[:, None] * self.slices + np.arange(self.slices)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Features:
    """What an extractor sees in the images of one set."""

    name: str
    """That of the set."""
    extractor: Extractor
    planes: dict[str, Table]
    """By the axes that lie in the plane: yz, xz and xy; or `image` alone, for pictures and for an
    extractor that takes whole volumes."""


def extract(
    images: ImageSet, extractor: Extractor, bounds: Bounds, config: EvaluationConfig,
    folder: Path, device: torch.device | str = "cpu",
) -> Features:  # fmt: skip
    """Features of every image, written to `folder`; memory does not grow with their number.

    Intensities are scaled so that `bounds` become 0 and 1, and clipped. Three channels of a
    picture file are its colours; any others are seen one by one, and their features stand side by
    side. Of a volume, `slices_per_plane` slices of each plane are taken, evenly spaced in its
    middle 80 percent, unless the extractor takes it whole.

    Args:
        bounds: for each channel; those of the labels for all sets, so that a set that is too
            bright is seen to be so.

    Raises:
        ImageError: the extractor gives numbers that are not finite.
        OutputError: `folder` is full.
    """
    path = folder / f"{images.name}-features"
    planes: dict[str, Table] = {}
    log.info("Features of %d images of %s (%s) ...", len(images), images.name, extractor.name)
    with torch.inference_mode(), explained(path):
        for name, axis in _planes(images, extractor).items():
            file = path.with_name(f"{path.name}-{name}.f32")
            places = _places(images.shape[axis - 1], config.slices_per_plane) if axis else [0]
            dimension = 0
            with file.open("wb") as stream:
                for batch in _batches(images, bounds, axis, places):
                    found = extractor(batch.to(device), _is_colour(images)).float().cpu()
                    if not found.isfinite().all():
                        raise ImageError(
                            f"{images.name}: the features of {extractor.name} are not finite; its "
                            "weights are damaged, or those of another network."
                        )
                    dimension = found.shape[1]
                    stream.write(found.numpy().tobytes())
            planes[name] = Table(file, len(images), len(places), dimension)
    return Features(images.name, extractor, planes)


def scaled(images: Array, bounds: Bounds) -> Array:
    """(N, C, *spatial) to the same in [0, 1]: `bounds` of each channel become 0 and 1."""
    shape = (1, len(bounds), *[1] * (images.ndim - 2))
    low, high = (np.array(each, np.float32).reshape(shape) for each in zip(*bounds, strict=True))
    unit: Array = (images - low) / np.maximum(high - low, np.float32(1e-12))
    return np.clip(unit, 0, 1, out=unit)


def _is_colour(images: ImageSet) -> bool:
    return images.raster and images.shape[0] == 3


def _planes(images: ImageSet, extractor: Extractor) -> dict[str, int]:
    """Axis of (N, C, *spatial) to cut across, by plane; 0 for no cut."""
    return {"image": 0} if images.rank == 2 or extractor.volumes else _CUTS


def _places(length: int, number: int) -> list[int]:
    margin = (1 - _MIDDLE) / 2 * (length - 1)
    places = np.linspace(margin, length - 1 - margin, min(number, length))
    return [int(place) for place in np.unique(places.round())]


def _batches(
    images: ImageSet, bounds: Bounds, axis: int, places: list[int]
) -> Iterator[torch.Tensor]:
    """(n, C, *spatial) of all images or their slices, in order, rows down, in [0, 1]."""
    voxels = int(np.prod(images.shape[1:]))
    for _, block in images.batches(max(1, min(128, _VOXELS // (voxels * images.shape[0])))):
        x = torch.from_numpy(scaled(block, bounds))
        if axis:
            x = x.index_select(axis, torch.tensor(places)).movedim(axis, 1).flatten(0, 1)
        if x.ndim == 4:
            x = x.transpose(2, 3)
        pixels = int(np.prod(x.shape[1:]))
        yield from x.split(max(1, min(128, _PIXELS // pixels)))
