"""The sets of images of an evaluation: read and checked once, then kept on disk, not in memory."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from synthcube.data.cache import Float32Rows, append_rows
from synthcube.data.channels import (
    ChannelConfigs,
    MaskChannel,
    Masks,
    mask_settings,
    probable_masks,
)
from synthcube.data.geometry import affine_from, spacing_of
from synthcube.data.images import Image, read_images
from synthcube.data.manifest import Manifest, Row
from synthcube.data.patches import cut, middle
from synthcube.data.preprocessing import DataConfig, Preprocessing, patch_fault
from synthcube.errors import EvaluationError
from synthcube.evaluation.arrays import Array, Floats, Ints
from synthcube.terminal import followed

log = logging.getLogger("synthcube")
T = TypeVar("T")
Bounds = tuple[tuple[float, float], ...]

_SAMPLED_IMAGES = 1000  # images whose intensities give the range of a set
_SAMPLED_VOXELS = 4096  # of each
_PERCENTILES = (0.1, 99.9)

_FEWEST_IMAGES = 2
_TOO_WIDE = 20.0  # times the range of the real images: other units
_TOO_NARROW = 100.0  # a poor model makes grey images; these are to be evaluated
_FLAT = 5.0
_SAME_SPACING = 0.01  # relative
_NAMES_SHOWN = 5
_LOOKED_AT = 16  # images of a set, to tell masks from images


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images in their own intensities, in the order of their manifest."""

    name: str  # predictions, labels or train_data, as users call it
    manifest: Manifest
    spacing_mm: tuple[float, ...]  # of the first image
    raster: bool  # pictures: the first axis runs to the right, the second down
    constant: int  # images whose voxels are all the same
    digests: tuple[bytes, ...]  # of each image's voxels: equal where all voxels are equal
    sha256: str  # of the voxels of all images, in order
    bounds: Bounds
    """Nearly the lowest and highest intensity, for each channel (0.1 and 99.9 percent)."""
    voxels: Float32Rows  # (N, channels of the file, *spatial)
    masks: Masks = field(default_factory=dict)
    """The classes of each channel that is a mask."""
    channels: tuple[int, ...] = ()
    """Those of the file that are read; all of them where it is empty."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.manifest.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *spatial) of each image."""
        count, *size = self.voxels.row_shape
        return (len(self.channels) or count, *size)

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.shape) - 1

    @property
    def distinct(self) -> int:
        """Number of images that differ from one another."""
        return len(set(self.digests))

    @property
    def has_subjects(self) -> bool:
        """Whether the manifest names subjects: not a folder, and not only numbered rows."""
        return self.manifest.has_subjects

    def subjects(self) -> Ints:
        """(N,): the number of each image's subject, from 0."""
        return subject_numbers(self)[0]

    def read(self, rows: Sequence[int]) -> Array:
        """A copy of those images, (len(rows), C, *spatial), float32."""
        images = self.voxels.read(rows)
        return images[:, self.channels] if self.channels else images

    def without_masks(self) -> ImageSet:
        """The same images without the channels that are masks; all of them if no other is left."""
        channels = tuple(i for i in range(self.shape[0]) if i not in self.masks)
        if not self.masks or not channels:
            return self
        bounds = tuple(self.bounds[channel] for channel in channels)
        return replace(self, channels=channels, bounds=bounds, masks={})

    def portions(self, items: Sequence[T], voxels: int) -> list[Sequence[T]]:
        """`items`, one for each image to read, in order: the images of a portion have at most so
        many voxels together, but an image with more is a portion."""
        size = max(1, voxels // math.prod(self.shape))
        return [items[start : start + size] for start in range(0, len(items), size)]

    def batches(self, size: int) -> Iterator[tuple[range, Array]]:
        """All images in order, at most `size` at once, with their places."""
        for start in range(0, len(self), size):
            rows = range(start, min(start + size, len(self)))
            yield rows, self.read(rows)


def subject_numbers(*sets: ImageSet) -> list[Ints]:
    """(N,) for each set: the number of each image's subject, the same in all sets."""
    numbers: dict[str, int] = {}
    return [
        np.array([numbers.setdefault(row.subject, len(numbers)) for row in images.rows], np.int64)
        for images in sets
    ]


def open_sets(
    manifests: Mapping[str, Manifest], data: DataConfig, folder: Path
) -> tuple[dict[str, ImageSet], list[str]]:
    """Read the images of every set into files in `folder`.

    Predictions are taken as they are, but masks among them must hold their classes. The real
    images of the other sets are placed as before training with `data` (orientation, transforms,
    spacing, size; of a model that translates, only the channels that it makes), so that both are on
    one grid; where predictions are patches, so is the middle of each that is taken. Intensities are
    left alone.

    Returns:
        The sets that could be read, and all faults of the others.

    Raises:
        OutputError: `folder` is full.
    """
    sets: dict[str, ImageSet] = {}
    faults: list[str] = []
    for name, manifest in manifests.items():
        log.info("Reading %d images of %s ...", len(manifest.rows), name)
        is_real = name != "predictions"
        masks = data.target_masks
        stated: ChannelConfigs = {
            channel: MaskChannel(classes=classes) for channel, classes in masks.items()
        }
        config = data if is_real else DataConfig(channels=stated)
        patch = patch_of(sets, data) if is_real else None
        place = _placement(config, patch, may_be_constant=not is_real)
        images = _read_set(name, manifest, place, folder / f"{name}.f32", masks)
        if isinstance(images, ImageSet):
            sets[name] = images
        else:
            faults += [f"{name}: {fault}" for fault in images]
    return sets, faults


Placed = tuple[Row, Array, Floats]  # the row, with its slice; (C, *spatial) and its affine
Placement = Callable[[Row, Image], list[Placed]]


def patch_of(sets: Mapping[str, ImageSet], data: DataConfig) -> tuple[int, ...] | None:
    """The sides of the patches that are compared; None where whole images are."""
    predictions = sets.get("predictions")
    is_patch = predictions and data.patches and predictions.shape[1:] == data.patches
    return data.patches if is_patch else None


def _placement(
    data: DataConfig, patch: Sequence[int] | None, *, may_be_constant: bool
) -> Placement:
    """A function from a file's image, or the slices of it, to voxels on the common grid.

    Args:
        patch: sides of the middle part that is taken of each image; None: all of it.
    """
    sources = frozenset(data.source_channels)
    preprocessing = Preprocessing(data)

    def place(row: Row, image: Image) -> list[Placed]:
        return [
            (row if number is None else replace(row, slice=number), *place_one(cut))
            for number, cut in preprocessing.images_of(image, row.slice)
        ]

    def place_one(image: Image) -> tuple[Array, Floats]:
        count, of_targets = len(image.tensor), preprocessing
        has_sources = bool(sources) and count > len(sources)
        if sources and data.channels and not has_sources:
            targets = [i for i in range(count + len(sources)) if i not in sources]
            of_targets = Preprocessing(data.selected(targets))
        tensor, affine = of_targets.placed(image, may_be_constant=may_be_constant)
        if has_sources:
            tensor = tensor[[i for i in range(count) if i not in sources]]
        voxels = tensor.numpy()
        voxels = voxels[..., 0] if voxels.shape[-1] == 1 else voxels
        # What a patch does not fit into is left whole: that the shapes differ is told then.
        if patch and not patch_fault(patch, voxels.shape[1:]):
            start = middle(voxels.shape[1:], patch)
            voxels, affine = voxels[cut(start, patch)], affine_from(affine, start)
        return np.ascontiguousarray(voxels), affine

    return place


def _read_set(
    name: str, manifest: Manifest, place: Placement, path: Path, masks: Masks
) -> ImageSet | list[str]:
    """The set, its voxels written to `path`; or the faults of all images."""
    faults: dict[Row, str] = {}
    shapes: list[tuple[int, ...]] = []
    spacing_mm: tuple[float, ...] = ()
    raster, constant = True, 0
    digest, digests = hashlib.sha256(), []
    samples: list[Array] = []
    shown_rows: list[Row] = []
    rng = np.random.default_rng(0)
    with append_rows(path) as append:
        rows = followed(manifest.rows, len(manifest.rows), f"Reading {name}")
        for image_row, voxels, affine, is_raster in _each(rows, place, faults):
            shown_rows.append(image_row)
            if not shapes:
                raster = is_raster
                spacing_mm = tuple(spacing_of(affine).tolist())
            shapes.append(voxels.shape)
            if voxels.shape == shapes[0]:
                append(voxels)
            constant += bool(voxels.min() == voxels.max())
            digest.update(voxels.tobytes())
            signless = (voxels + 0.0).tobytes()  # -0 becomes 0
            digests.append(hashlib.blake2b(signless, digest_size=16).digest())
            if len(samples) < _SAMPLED_IMAGES:
                flat = voxels.reshape(voxels.shape[0], -1)
                samples.append(flat[:, rng.integers(flat.shape[1], size=_SAMPLED_VOXELS)])
    manifest = Manifest(manifest.path, tuple(shown_rows))
    if texts := list(faults.values()) or _shape_faults(manifest, shapes):
        return texts
    bounds = [np.percentile(np.concatenate(v), _PERCENTILES) for v in zip(*samples, strict=True)]
    return ImageSet(
        name, manifest, spacing_mm, raster, constant, tuple(digests), digest.hexdigest(),
        tuple((float(low), float(high)) for low, high in bounds), Float32Rows(path, shapes[0]),
        masks,
    )  # fmt: skip


def _each(
    rows: Iterable[Row], place: Placement, faults: dict[Row, str]
) -> Iterator[tuple[Row, Array, Floats, bool]]:
    """Each image that could be read, and whether it is a picture."""

    def use(row: Row, image: Image) -> tuple[bool, list[Placed]]:
        return image.raster, place(row, image)

    for _, (raster, images) in read_images(rows, use, faults):
        for row, voxels, affine in images:
            yield row, voxels, affine, raster


def _shape_faults(manifest: Manifest, shapes: list[tuple[int, ...]]) -> list[str]:
    usual, _ = Counter(shapes).most_common(1)[0]
    return [
        f"{row.channels[0]}: shape {list(shape)}, the others {list(usual)} (channels first); "
        "data.size of the config (-c) brings real images to one size"
        for row, shape in zip(manifest.rows, shapes, strict=True)
        if shape != usual
    ]


def check_comparable(sets: Mapping[str, ImageSet], faults: Sequence[str]) -> None:
    """Compare every other set with the predictions.

    Args:
        faults: those of single images, to be reported together with the rest.

    Raises:
        EvaluationError: everything that keeps the sets from being compared.
    """
    faults = list(faults)
    for name, images in sets.items():
        if len(images) < _FEWEST_IMAGES:
            faults.append(f"{name}: {len(images)} image; at least {_FEWEST_IMAGES} are needed")
        elif images.distinct == 1:
            faults.append(f"{name}: all {len(images)} images are identical")
    predictions = sets.get("predictions")
    for name, images in sets.items():
        if predictions and name != "predictions":
            faults += _differences(predictions, images)
    if faults:
        raise EvaluationError("These images cannot be compared:", faults)


def _differences(predictions: ImageSet, real: ImageSet) -> list[str]:
    if predictions.shape != real.shape:
        return [
            f"predictions have the shape {list(predictions.shape)}, {real.name} "
            f"{list(real.shape)} (channels first): give the config of the training as -c, whose "
            "data section brings real images to the predictions' grid"
        ]
    faults = []
    for channel, (ours, theirs) in enumerate(zip(predictions.bounds, real.bounds, strict=True)):
        if channel in real.masks:
            continue
        width, real_width = ours[1] - ours[0], theirs[1] - theirs[0]
        apart = ours[0] > theirs[1] + real_width or ours[1] < theirs[0] - real_width
        wide, narrow = width > _TOO_WIDE * real_width, width * _TOO_NARROW < real_width
        if real_width > 0 and (apart or wide or narrow):
            faults.append(
                f"predictions lie in [{ours[0]:g}, {ours[1]:g}], {real.name} in [{theirs[0]:g}, "
                f"{theirs[1]:g}] (channel {channel}): they are not in the same units"
            )
    return faults


def comparability_notes(sets: Mapping[str, ImageSet], data: DataConfig) -> list[str]:
    """What a reader should know of sets that can be compared: duplicates, constants, spacing.

    Args:
        data: with which they were opened.
    """
    notes = []
    if patch := patch_of(sets, data):
        notes.append(
            f"Predictions are patches (data.patches {list(patch)}), of any part of an image. Of "
            "real images the middle patch of each is compared: copies of other parts are not found."
        )
    predictions, labels = sets["predictions"], sets.get("labels")
    if labels and (suspected := _probable_masks(labels)):
        notes.append(
            f"Channels {', '.join(map(str, suspected))} of labels hold few whole numbers and are "
            "judged as images. If they are masks, say so in the config (-c): "
            f"{mask_settings(suspected)}"
        )
    for images in sets.values():
        if num_duplicates := len(images) - images.distinct:
            notes.append(
                f"{num_duplicates} of the {len(images)} images of {images.name} are exact "
                "duplicates of others among them."
            )
        if images.constant:
            notes.append(f"{images.constant} images of {images.name} are constant.")
        ours, theirs = predictions.without_masks(), images.without_masks()
        ranges = zip(ours.bounds, theirs.bounds, strict=True)
        for (low, high), (real_low, real_high) in ranges:
            if (high - low) * _FLAT < real_high - real_low:
                notes.append(
                    f"Predictions lie in [{low:g}, {high:g}] only, {images.name} in "
                    f"[{real_low:g}, {real_high:g}]."
                )
        spacing = images.spacing_mm, predictions.spacing_mm
        if not images.raster and not np.allclose(*spacing, rtol=_SAME_SPACING):
            real_size, size = (" x ".join(f"{side:g}" for side in voxel) for voxel in spacing)
            notes.append(
                f"Voxels of {images.name} measure {real_size} mm, those of the predictions {size}: "
                "shapes differ by that much."
            )
    return notes


def _probable_masks(images: ImageSet) -> Masks:
    """Channels that seem to be masks, and are not said to be."""
    first = (torch.from_numpy(images.read([i])[0]) for i in range(min(len(images), _LOOKED_AT)))
    probable = probable_masks(first)
    return {channel: probable[channel] for channel in probable if channel not in images.masks}


@dataclass(frozen=True, slots=True)
class Overlap:
    """What held-out images have in common with the training images."""

    images: tuple[int, ...]  # places of held-out images whose voxels are those of a training image
    subjects: tuple[str, ...]  # subjects of both, where both manifests name subjects

    def __bool__(self) -> bool:
        return bool(self.images or self.subjects)

    def anonymous(self) -> str:
        """A clause that names nobody, as it may leave the site."""
        parts = [f"{len(self.images)} of them are training images"] if self.images else []
        parts += [f"{len(self.subjects)} subjects are in both"] if self.subjects else []
        return " and ".join(parts)

    def named(self, labels: ImageSet) -> str:
        """The same with the first names, for the log."""
        texts = []
        files = tuple(str(labels.rows[image].channels[0]) for image in self.images)
        for names in filter(None, (files, self.subjects)):
            num_more = len(names) - _NAMES_SHOWN
            more = f" and {num_more} more" if num_more > 0 else ""
            texts.append(", ".join(names[:_NAMES_SHOWN]) + more)
        return "; ".join(texts)


def overlap(labels: ImageSet, train_data: ImageSet) -> Overlap:
    """What `labels` and `train_data` share: voxels, or subjects by SubjectID."""
    known = set(train_data.digests)
    images = tuple(i for i, digest in enumerate(labels.digests) if digest in known)
    subjects: set[str] = set()
    if labels.has_subjects and train_data.has_subjects:
        subjects = {row.subject for row in labels.rows} & {row.subject for row in train_data.rows}
    return Overlap(images, tuple(sorted(subjects)))
