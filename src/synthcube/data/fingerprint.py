"""What a data set is like, in numbers that name nobody: the facts that `synthcube plan` reads.

The measures are those of nnU-Net's fingerprint (Isensee et al., Nature Methods 2021): shapes,
shapes cropped to the content, spacings, and intensities of the foreground. Images are read one by
one. What is kept of each has a fixed size, whatever the size of the image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from synthcube import __version__
from synthcube.data.cache import content_digests, shape_faults
from synthcube.data.channels import MaskSearch
from synthcube.data.geometry import spacing_of
from synthcube.data.images import Image, read_images
from synthcube.data.manifest import Manifest, Row
from synthcube.errors import ImageError, OutputError, first_faults
from synthcube.reading import read_object, validated
from synthcube.schema import MAX_COUNT, Count, FileFormat, List, Schema
from synthcube.storage import make_folder, write_json
from synthcube.terminal import followed

FILE_NAME = "fingerprint.json"
_FORMAT = 1
_FOREGROUND = 0.05  # of the range of an image, above its lowest value
_SAMPLED_VOXELS = 1_000_000  # of each channel, over all images; percentiles are those of them
_SAMPLED_OF_IMAGE = 10_000
_RANGE_VOXELS = 100_000  # of a channel of an image, to find its range
_GRIDS = {2: 12, 3: 6}  # sides of the small copies in which duplicates are looked for
_DUPLICATE = 4.0  # largest root-mean-square difference of two small copies, of 255
_COMPARED = 20_000  # small copies that are compared pair by pair; of more, only equal ones count
_BLOCK = 512

Floats = npt.NDArray[np.float64]
Sides = List[float]
Rows = Annotated[int, Field(ge=0, le=MAX_COUNT)]
MaskValue = Annotated[int, Field(ge=-(2**15), lt=2**24)]
AxisValues = Annotated[Sides, Field(min_length=2, max_length=3)]


class Spread(Schema):
    """Values along each axis, over all images."""

    lowest: AxisValues = Field(description="Smallest value along each axis.")
    median: AxisValues = Field(description="Median along each axis.")
    highest: AxisValues = Field(description="Largest value along each axis.")


class ChannelFingerprint(Schema):
    """One channel; its intensities are those of the foreground."""

    kind: Literal["image", "mask", "rgb"] = Field(description="What the channel holds.")
    classes: List[MaskValue] = Field(default=(), description="Values of a mask.")
    integer: bool = Field(description="Whether all files store whole numbers.")
    lowest: float = Field(description="Lowest intensity of all images, background included.")
    highest: float = Field(description="Highest intensity of all images.")
    mean: float = Field(description="Mean of the foreground.")
    std: float = Field(description="Standard deviation of the foreground.")
    percentiles: List[float] = Field(description="Percentiles 0.5, 50 and 99.5 of the foreground.")
    foreground: float = Field(description="Mean share of the voxels that are foreground.")


class NumberColumn(Schema):
    """A column of numbers."""

    low: float = Field(description="Lowest number.")
    high: float = Field(description="Highest number.")
    known: Rows = Field(description="Rows that have one.")


class Fingerprint(Schema):
    """The measures of one data set. It holds no path, no identifier and no name of a class."""

    num_images: Count = Field(description="Rows of the manifest.")
    num_subjects: Rows | None = Field(description="Subjects; null: the manifest names none.")
    splits: dict[str, Rows] = Field(description="Rows of each split that the manifest has.")
    class_counts: List[Rows] = Field(description="Rows of each class, in the order of class ids.")
    classes_of_subjects: bool = Field(description="Whether no class has more than one subject.")
    numbers: dict[str, NumberColumn] = Field(description="Columns of numbers, by name.")
    has_geometry: bool = Field(description="Whether files state where their voxels lie.")
    file_format: FileFormat = Field(description="Format of generated images.")
    one_shape: bool = Field(description="Whether all images have one shape.")
    one_spacing: bool = Field(description="Whether all images have one spacing, to 1%.")
    shape: Spread = Field(description="Voxels.")
    content: Spread = Field(description="Voxels of the smallest box around the foreground.")
    spacing_mm: Spread = Field(description="Voxel size in millimetres.")
    spacing_10: AxisValues = Field(description="10th percentile of the spacing along each axis.")
    extent_mm: Spread = Field(description="Size of the images in millimetres.")
    channels: List[ChannelFingerprint] = Field(description="One entry for each channel.")
    near_duplicates: Rows = Field(description="Images that another image nearly equals.")
    duplicates_across_subjects: Rows = Field(description="Those that equal one of another subject.")

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.shape.median)

    @property
    def masks(self) -> dict[int, tuple[int, ...]]:
        """The classes of each channel that is a mask."""
        return {i: part.classes for i, part in enumerate(self.channels) if part.kind == "mask"}


def fingerprint(manifest: Manifest, cache: Path) -> Fingerprint:
    """The fingerprint of a data set, from the cache or newly measured.

    Raises:
        ImageError: images cannot be read, or differ in their channels or number of axes.
    """
    path = cache / "fingerprints" / f"{_key(manifest, cache)}.json"
    if path.is_file():
        with suppress(OutputError):  # damaged by a kill of the machine: it is measured again
            return validated(read_object(path, OutputError), Fingerprint, str(path), OutputError)
    measured = measure(manifest)
    make_folder(path.parent)
    write_json(path, measured.model_dump(mode="json"))
    return measured


def _key(manifest: Manifest, cache: Path) -> str:
    """A name for the content of a manifest and of its images, wherever they lie."""
    digests = content_digests([path for row in manifest.rows for path in row.channels], cache)
    parts = [
        [[digests[path] for path in row.channels], row.known_cells, manifest.has_subjects]
        for row in manifest.rows
    ]
    text = json.dumps([_FORMAT, __version__, parts], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def measure(manifest: Manifest) -> Fingerprint:
    """Read every image of a manifest once and measure it; see :func:`fingerprint`."""
    faults: dict[Row, str] = {}
    collector = _Collector(len(manifest.rows))
    rows = followed(manifest.rows, len(manifest.rows), "Measuring images")
    for _ in read_images(rows, collector.add, faults):
        pass
    if faults:
        raise ImageError(
            f"{len(faults)} of {len(manifest.rows)} images cannot be used:",
            first_faults(list(faults.values())),
        )
    return collector.result(manifest)


class _Foreground:
    """Mean, spread and a sample of the foreground of one channel, image by image."""

    def __init__(self, sampled_of_image: int) -> None:
        self._sampled_of_image = sampled_of_image
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._sample: list[npt.NDArray[np.float32]] = []
        self._shares: list[float] = []
        self.integer = True
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, voxels: torch.Tensor, *, integer: bool) -> torch.Tensor:
        """Count one image; returns where its foreground is."""
        low, high = (float(end) for end in voxels.aminmax())
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        self.integer &= integer
        flat = voxels.flatten()
        few = flat[:: max(1, len(flat) // _RANGE_VOXELS)]
        usual = float(np.percentile(few.numpy(), 99.5))  # a bright speck is not the range
        place = voxels > low + _FOREGROUND * ((usual if usual > low else high) - low)
        bright = voxels[place]
        self._shares.append(len(bright) / len(flat))
        if len(bright):
            self._merge(bright.double())
            step = max(1, len(bright) // self._sampled_of_image)
            self._sample.append(bright[::step][: self._sampled_of_image].numpy().copy())
        return place

    def _merge(self, voxels: torch.Tensor) -> None:
        """Chan's update of mean and squared deviations by those of another part."""
        count, mean = len(voxels), float(voxels.mean())
        total, difference = self._count + count, mean - self._mean
        self._squares += float((voxels - mean).square().sum())
        self._squares += difference**2 * self._count * count / total
        self._mean += difference * count / total
        self._count = total

    def result(self, kind: Literal["image", "mask", "rgb"], classes: Sequence[int]) -> Any:
        sample = np.concatenate(self._sample) if self._sample else np.zeros(1, np.float32)
        return ChannelFingerprint(
            kind=kind, classes=tuple(classes), integer=self.integer,
            lowest=self.lowest, highest=self.highest,
            mean=self._mean, std=math.sqrt(self._squares / max(1, self._count)),
            percentiles=tuple(np.percentile(sample, (0.5, 50, 99.5)).tolist()),
            foreground=float(np.mean(self._shares)),
        )  # fmt: skip


class _Collector:
    """Gathers the measures of one image after the other."""

    def __init__(self, num_images: int) -> None:
        self._sampled = max(1, min(_SAMPLED_OF_IMAGE, _SAMPLED_VOXELS // num_images))
        self._channels: list[_Foreground] = []
        self._masks = MaskSearch()
        self._shapes: dict[str, tuple[int, ...]] = {}  # by name, as faults name them
        self._geometry: list[tuple[Floats, Floats, Floats]] = []  # shape, content, spacing
        self._copies: list[npt.NDArray[np.uint8]] = []
        self._subjects: list[str] = []
        self._are_coloured = self._are_rasters = True
        self._is_picture = True

    def add(self, row: Row, image: Image) -> None:
        tensor = image.tensor
        rank = 2 if tensor.shape[-1] == 1 else 3
        self._shapes[str(row.channels[0])] = (len(tensor), *[0] * rank)
        while len(self._channels) < len(tensor):
            self._channels.append(_Foreground(self._sampled))
        place = torch.zeros(tensor.shape[1:], dtype=torch.bool)
        for channel, voxels in enumerate(tensor):
            place |= self._channels[channel].add(voxels, integer=image.integers[channel])
        self._masks.add(tensor)
        self._are_coloured &= image.file_format == "png" and len(tensor) == 3 * len(row.channels)
        self._are_rasters &= image.raster
        self._is_picture &= image.file_format == "png"
        order = _canonical_order(image, rank)
        shape = np.array(tensor.shape[1:], float)
        spacing = spacing_of(image.affine)
        self._geometry.append((shape[order], _box(place)[order], spacing[order]))
        self._copies.append(_small_copy(tensor, rank))
        self._subjects.append(row.subject)

    def result(self, manifest: Manifest) -> Fingerprint:
        if faults := shape_faults(self._shapes, any_size=True):
            raise ImageError("The images differ:", first_faults(faults))
        shapes, contents, spacings = (
            np.stack(values) for values in zip(*self._geometry, strict=True)
        )
        masks = self._masks.masks()
        kind: Literal["image", "rgb"] = "rgb" if self._are_coloured else "image"
        channels = [
            channel.result("mask" if i in masks else kind, masks.get(i, ()))
            for i, channel in enumerate(self._channels)
        ]
        duplicates, across = _duplicates(np.stack(self._copies), self._subjects)
        rows = manifest.rows
        counts = Counter(row.label for row in rows if row.label >= 0)
        subjects = set(self._subjects) if manifest.has_subjects else None
        return Fingerprint(
            num_images=len(rows),
            num_subjects=len(subjects) if subjects else None,
            splits=dict(Counter(row.split or "train" for row in rows))
            if any(row.split for row in rows)
            else {},
            class_counts=tuple(counts[i] for i in range(max(counts, default=-1) + 1)),
            classes_of_subjects=_are_subjects(rows) if subjects else False,
            numbers=_numbers(rows),
            has_geometry=not self._are_rasters,
            file_format="png" if self._is_picture else "nii.gz",
            one_shape=bool((shapes == shapes[0]).all()),
            one_spacing=bool(np.allclose(spacings, np.median(spacings, axis=0), rtol=0.01)),
            shape=_spread(shapes),
            content=_spread(contents),
            spacing_mm=_spread(spacings),
            spacing_10=_rounded(np.percentile(spacings, 10, axis=0)),
            extent_mm=_spread(shapes * spacings),
            channels=tuple(channels),
            near_duplicates=duplicates,
            duplicates_across_subjects=across if subjects else duplicates,
        )


def _canonical_order(image: Image, rank: int) -> list[int]:
    """The axes of an image in the order in which a training has them (RAS)."""
    if rank == 2 or image.raster:
        return list(range(rank))
    orientation = nib.orientations.io_orientation(image.affine)
    return [int(axis) for axis in np.argsort(orientation[:, 0])]


def _box(place: torch.Tensor) -> Floats:
    """Sides of the smallest box around the marked voxels (X, Y, Z); all of it if there are none."""
    if not place.any():
        return np.array(place.shape, float)
    sides = []
    for axis in range(place.ndim):
        others = tuple(other for other in range(place.ndim) if other != axis)
        used = place.any(dim=others).nonzero()
        sides.append(float(used.max() - used.min() + 1))
    return np.array(sides)


def _small_copy(tensor: torch.Tensor, rank: int) -> npt.NDArray[np.uint8]:
    """The first channel on a grid of a few voxels, 0 to 255 from its lowest to its highest."""
    grid = (_GRIDS[rank],) * rank
    voxels = tensor[0] if rank == 3 else tensor[0, ..., 0]
    pool: Any = torch.nn.functional
    pooled = getattr(pool, f"adaptive_avg_pool{rank}d")(voxels[None, None], grid).flatten()
    low, high = pooled.aminmax()
    scaled = (pooled - low) / (high - low).clamp(min=1e-30) * 255
    copy: npt.NDArray[np.uint8] = scaled.round().to(torch.uint8).numpy()
    return copy


def _duplicates(copies: npt.NDArray[np.uint8], subjects: Sequence[str]) -> tuple[int, int]:
    """Images that nearly equal another one, and those that equal one of another subject."""
    numbers = {subject: number for number, subject in enumerate(dict.fromkeys(subjects))}
    owners = np.array([numbers[subject] for subject in subjects])
    if len(copies) > _COMPARED:
        return _equal_copies(copies, owners)
    values = copies.astype(np.float32)
    squares = (values**2).sum(axis=1)
    limit = _DUPLICATE**2 * values.shape[1]
    count = across = 0
    for start in range(0, len(values), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = squares[block, None] + squares[None] - 2 * values[block] @ values.T
        near = distances < limit
        near[np.arange(len(near)), np.arange(start, start + len(near))] = False
        count += int(near.any(axis=1).sum())
        across += int((near & (owners[block, None] != owners[None])).any(axis=1).sum())
    return count, across


def _equal_copies(copies: npt.NDArray[np.uint8], owners: npt.NDArray[Any]) -> tuple[int, int]:
    groups: dict[bytes, list[int]] = {}
    for copy, owner in zip(copies >> 3, owners.tolist(), strict=True):
        groups.setdefault(copy.tobytes(), []).append(owner)
    several = [group for group in groups.values() if len(group) > 1]
    across = [group for group in several if len(set(group)) > 1]
    return sum(map(len, several)), sum(map(len, across))


def _are_subjects(rows: Sequence[Row]) -> bool:
    """Whether each class is that of one subject alone."""
    owners: dict[int, set[str]] = {}
    for row in rows:
        if row.label >= 0:
            owners.setdefault(row.label, set()).add(row.subject)
    return bool(owners) and all(len(subjects) == 1 for subjects in owners.values())


def _numbers(rows: Sequence[Row]) -> dict[str, NumberColumn]:
    """The range of each column whose cells are all numbers, or empty."""
    columns = dict.fromkeys(name for row in rows for name in row.conditions)
    ranges = {}
    for name in columns:
        cells = [text for row in rows if (text := row.conditions.get(name, ""))]
        try:
            values = [float(text) for text in cells]
        except ValueError:
            continue
        if values and all(map(math.isfinite, values)) and min(values) < max(values):
            ranges[name] = NumberColumn(low=min(values), high=max(values), known=len(values))
    return ranges


def _spread(values: Floats) -> Spread:
    return Spread(
        lowest=_rounded(values.min(axis=0)),
        median=_rounded(np.median(values, axis=0)),
        highest=_rounded(values.max(axis=0)),
    )


def _rounded(values: Floats) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)
