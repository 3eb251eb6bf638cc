"""Features of all images of a set, in tables on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from synthcube.data.cache import Float32Rows, append_rows
from synthcube.errors import ImageError
from synthcube.evaluation.arrays import Array, Ints
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.extractors import Extractor
from synthcube.evaluation.sets import Bounds, ImageSet
from synthcube.terminal import Progress

log = logging.getLogger("synthcube")

_PIXELS = 1 << 18  # of all slices that a network gets at once: 64 of 64x64
_VOXELS = 1 << 22  # of all images that are read at once
_MIDDLE = 0.8  # the outer slices of a volume are mostly empty
# axis of (N, C, X, Y, Z) that is cut across, by the axes that lie in the plane
_CUTS = {"yz": 2, "xz": 3, "xy": 4}


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Features of one plane of all images: one row for each slice, on disk."""

    values: Float32Rows  # (N * s, D)
    images: int  # N
    slices: int  # s: those of an image follow each other; 1 for pictures and for whole volumes
    channels: int = 1  # whose features stand side by side in a row
    channel: int | None = None  # the only one that `rows` has

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.rows().shape[1])

    def rows(self) -> Array:
        """(N * s, D), float32, a memory map."""
        if self.channel is None:
            return self.values.mapped
        width = self.values.row_shape[0] // self.channels
        return self.values.mapped[:, self.channel * width : (self.channel + 1) * width]

    def owners(self) -> Ints:
        """(N * s,): the image of each row."""
        return np.repeat(np.arange(self.images), self.slices)

    def rows_of(self, images: Ints) -> Ints:
        """(len(images) * s,): the rows of those images, in their order."""
        return (images[:, None] * self.slices + np.arange(self.slices)).reshape(-1)


@dataclass(frozen=True, slots=True)
class Features:
    """The features of the images of one set."""

    name: str  # that of the set
    extractor: Extractor
    planes: dict[str, FeatureTable]
    """By the axes that lie in the plane: yz, xz and xy; or `image` alone, for pictures and for an
    extractor that takes whole volumes."""

    @property
    def channels(self) -> int:
        """Channels that have features of their own."""
        return next(iter(self.planes.values())).channels

    def of_channel(self, channel: int) -> Features:
        """The features of one channel alone."""
        planes = {name: replace(table, channel=channel) for name, table in self.planes.items()}
        return replace(self, planes=planes)

    def of_images(self) -> Array:
        """(N, D): one row for each image, the mean over its slices, planes side by side."""
        planes = []
        for table in self.planes.values():
            rows = table.rows()
            if table.slices > 1:
                rows = rows.reshape(table.images, table.slices, -1).mean(axis=1)
            planes.append(rows)
        return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=1)


def extract(
    images: ImageSet, extractor: Extractor, bounds: Bounds, config: EvaluationConfig,
    folder: Path, device: torch.device | str = "cpu",
) -> Features:  # fmt: skip
    """Features of every image, written to `folder`; memory does not grow with their number.

    Intensities are scaled so that `bounds` become 0 and 1, and clipped. Three channels of a
    picture file are its colours; other channels are taken one by one, and their features stand side
    by side. Of a volume, `slices_per_plane` slices of each plane are taken, evenly spaced in its
    middle 80 percent, unless the extractor takes it whole.

    Args:
        bounds: for each channel; those of the labels for all sets, so that a set that is too
            bright shows in the features.
    """
    planes: dict[str, FeatureTable] = {}
    log.info("Features of %d images of %s (%s) ...", len(images), images.name, extractor.name)
    colour = images.raster and images.shape[0] == 3
    whole = images.rank == 2 or extractor.volumes
    for name, axis in ({"image": 0} if whole else _CUTS).items():
        path = folder / f"{images.name}-features-{name}.f32"
        slices = _slices(images.shape[axis - 1], config.slices_per_plane) if axis else [0]
        dimension = 0
        bar = Progress(f"Features of {images.name}", len(images) * len(slices))
        with torch.inference_mode(), append_rows(path) as append, bar:
            for batch in _batches(images, bounds, axis, slices):
                features = extractor(batch.to(device), colour).float().cpu()
                if not features.isfinite().all():
                    raise ImageError(
                        f"{images.name}: the features of {extractor.name} are not finite; its "
                        "weights are damaged, or belong to another network."
                    )
                dimension = features.shape[1]
                append(features.numpy())
                bar.advance(len(batch))
        channels = 1 if colour or dimension % images.shape[0] else images.shape[0]
        table = Float32Rows(path, (dimension,))
        planes[name] = FeatureTable(table, len(images), len(slices), channels)
    return Features(images.name, extractor, planes)


def scaled(images: Array, bounds: Bounds) -> Array:
    """(N, C, *spatial) to the same in [0, 1]: `bounds` of each channel become 0 and 1."""
    shape = (1, len(bounds), *[1] * (images.ndim - 2))
    low, high = (np.array(ends, np.float32).reshape(shape) for ends in zip(*bounds, strict=True))
    unit: Array = (images - low) / np.maximum(high - low, np.float32(1e-12))
    return np.clip(unit, 0, 1, out=unit)


def _slices(length: int, number: int) -> list[int]:
    margin = (1 - _MIDDLE) / 2 * (length - 1)
    positions = np.linspace(margin, length - 1 - margin, min(number, length))
    return [int(position) for position in np.unique(positions.round())]


def _batches(
    images: ImageSet, bounds: Bounds, axis: int, slices: list[int]
) -> Iterator[torch.Tensor]:
    """(n, C, *spatial) of all images or their slices, in order, rows down, in [0, 1]."""
    voxels = int(np.prod(images.shape[1:]))
    for _, block in images.batches(max(1, min(128, _VOXELS // (voxels * images.shape[0])))):
        x = torch.from_numpy(scaled(block, bounds))
        if axis:
            x = x.index_select(axis, torch.tensor(slices)).movedim(axis, 1).flatten(0, 1)
        if x.ndim == 4:
            x = x.transpose(2, 3)
        pixels = int(np.prod(x.shape[1:]))
        yield from x.split(max(1, min(128, _PIXELS // pixels)))
