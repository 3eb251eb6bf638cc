"""The data of a training run: splits by subject, batches, and the Lightning data module."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from synthcube.data import patches
from synthcube.data.batches import EpochBatches, SubjectBatches, by_subject
from synthcube.data.cache import ImageCache, load_images
from synthcube.data.channels import (
    Masks,
    encoded,
    mask_settings,
    probable_masks,
    subject_of,
    voxels_of,
)
from synthcube.data.conditions import condition_specs, condition_values
from synthcube.data.geometry import (
    affine_from,
    as_rows,
    centred_affine,
    generated_affine,
    spacing_of,
)
from synthcube.data.images import read_image
from synthcube.data.inpainting import InpaintingConfig, cut_holes
from synthcube.data.manifest import Manifest
from synthcube.data.preprocessing import DataConfig, Preprocessing, patch_fault
from synthcube.data.transforms import TransformConfig
from synthcube.data.unmeasured import unmeasured
from synthcube.environment import derived_seed, workers_that_fit
from synthcube.errors import ImageError, ManifestError, first_faults
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec

TRAIN = "train"
_LOOKED_AT = 8  # images, to tell masks from images


def split_subjects(
    subjects: Sequence[str], labels: Sequence[int], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Assign every subject to one split. Raises ManifestError.

    Subjects of one class (or of the same classes, where a subject has several) are spread
    over the splits in proportion. Presence comes before proportion: a class with at least as
    many subjects as there are splits is in each of them; and every split gets a subject as
    far as there are enough, train first. The result depends on the set of subjects, their
    labels and the seed: not on the order of the rows, nor on the machine.

    Args:
        subjects: subject of each row.
        labels: class id of each row, -1 where it has none.
        fractions: share of the subjects for each split, in 0..1; the remainder is "train".
        seed: a different seed gives a different split.

    Returns:
        Split name by subject, sorted by subject.
    """
    shares = _shares(fractions)
    strata = _strata(subjects, labels, seed)
    splits: dict[str, str] = {}
    owed = dict.fromkeys(shares, 0.0)  # rounding of one class is made good in the next
    for members in strata:
        counts = _counts(len(members), shares, owed)
        names = [name for name in shares for _ in range(counts[name])]
        splits.update(zip(members, names, strict=True))
    _fill_empty(splits, shares, [subject for members in strata for subject in members])
    return dict(sorted(splits.items()))


def _shares(fractions: Mapping[str, float]) -> dict[str, float]:
    """Positive shares that add up to 1, train first."""
    total = sum(fractions.values())
    if not all(0 <= share <= 1 for share in fractions.values()) or total > 1 + 1e-9:
        listed = ", ".join(f"{name} {share:g}" for name, share in fractions.items())
        raise ManifestError(
            f"The fractions {listed} cannot be split off; "
            "each must lie in 0 to 1, and together they must not exceed 1."
        )
    rest = fractions.get(TRAIN, 0.0) + 1 - total
    shares = {TRAIN: rest, **{name: share for name, share in fractions.items() if name != TRAIN}}
    return {name: share for name, share in shares.items() if share > 1e-9}


def _strata(subjects: Sequence[str], labels: Sequence[int], seed: int) -> list[list[str]]:
    """Subjects with the same classes, shuffled; large strata first, small ones even out."""
    classes: dict[str, set[int]] = {}
    for subject, label in zip(subjects, labels, strict=True):
        classes.setdefault(subject, set()).add(label)
    strata: dict[tuple[int, ...], list[str]] = {}
    for subject in sorted(classes, key=lambda name: _rank(seed, name)):
        strata.setdefault(tuple(sorted(classes[subject])), []).append(subject)
    return sorted(strata.values(), key=lambda members: (-len(members), _rank(seed, members[0])))


def _counts(size: int, shares: Mapping[str, float], owed: dict[str, float]) -> Counter[str]:
    """How many of `size` subjects each split gets; `owed` is updated."""
    for name, share in shares.items():
        owed[name] += size * share
    counts: Counter[str] = Counter()
    if size > 1:  # presence: train, then the splits that are owed most
        counts.update(sorted(shares, key=lambda name: (name != TRAIN, -owed[name]))[:size])
    while counts.total() < size:
        # rounded, so that noise in the last digit does not decide; ties go to the first, train
        counts[max(shares, key=lambda name: round(owed[name] - counts[name], 6))] += 1
    for name in shares:
        owed[name] -= counts[name]
    return counts


def _fill_empty(splits: dict[str, str], shares: Mapping[str, float], order: Sequence[str]) -> None:
    """Give each empty split a subject of the largest one, out of the smallest class."""
    for name in shares:
        sizes = Counter(splits.values())
        if sizes[name] or not sizes:
            continue
        donor = max(shares, key=lambda other: sizes[other])
        if sizes[donor] > 1:
            splits[next(s for s in reversed(order) if splits[s] == donor)] = name


def _rank(seed: int, subject: str) -> bytes:
    return hashlib.sha256(f"{seed}:{subject}".encode()).digest()


class CachedImages(Dataset[Batch]):
    """Rows of a cache, as whole batches; augmented where the config says so."""

    def __init__(
        self,
        cache: ImageCache,
        manifest: Manifest,
        image: ImageSpec,
        augmentation: Sequence[TransformConfig],
        seed: int,
        masks: Masks,
        inpainting: InpaintingConfig | None = None,
        *,
        is_random: bool = False,
    ) -> None:
        """Open rows of `cache`: of each, the patch of the size that `image` says.

        Args:
            inpainting: the holes that are cut into the images, which then are source and target.
            is_random: another patch, and other holes, in every epoch; else the middle of each
                image, and always the same holes.
        """
        self.cache, self.size = cache, image.size
        self.is_part = not cache.is_of_one_shape or image.size != cache.shape[2:]
        self.inpainting, self.is_random = inpainting, is_random
        self.random_patches = is_random and self.is_part
        self.labels = torch.tensor([row.label for row in manifest.rows], dtype=torch.int64)
        self.conditions = torch.from_numpy(condition_values(image.conditions, manifest.rows))
        self.source = [] if inpainting else list(image.source_channels)
        self.target = [i for i in range(cache.shape[1]) if i not in self.source]
        self.masks, self.target_masks = masks, image.masks
        self.augmentation = [transform.build() for transform in augmentation]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> Batch:
        """The batch at these (epoch, row) pairs, of which there may be none."""
        if not places:
            return _empty(self.__getitems__([(0, 0)]))
        rows = [row for _, row in places]
        starts = [self.start_of(*place) for place in places]
        voxels = (
            self.cache.read_patches(rows, starts, self.size)
            if self.is_part
            else self.cache.read(rows)
        )
        image = torch.from_numpy(voxels)
        if self.augmentation:
            triples = zip(image, places, starts, strict=True)
            image = torch.stack([self._augmented(one, *place, at) for one, place, at in triples])
        source = image[:, self.source]
        if self.inpainting:
            seeds = [
                derived_seed(self.seed, "holes", epoch if self.is_random else 0, row)
                for epoch, row in places
            ]
            source = cut_holes(image, self.inpainting, seeds)
        targets = image[:, self.target] if self.source else image
        return Batch(
            image=encoded(targets, self.target_masks),
            label=self.labels[rows],
            index=torch.tensor(rows),
            augmented=bool(self.augmentation) or self.random_patches,
            condition=Condition(values=self.conditions[rows], source=source),
        )

    def start_of(self, epoch: int, row: int) -> tuple[int, ...]:
        """The first voxel of the patch; it depends only on the seed, the epoch and the row."""
        shape = self.cache.shapes[row][1:]
        if not self.random_patches:
            return patches.middle(shape, self.size)
        return patches.drawn(shape, self.size, derived_seed(self.seed, "patch", epoch, row))

    def _augmented(
        self, image: torch.Tensor, epoch: int, row: int, start: Sequence[int]
    ) -> torch.Tensor:
        """An augmented image of the same shape; depends only on the seed, the epoch and the row."""
        volume = image if image.ndim == 4 else image[..., None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, "augmentation", epoch, row))
            affine = affine_from(self.cache.affines[row], start)
            subject = subject_of(self._with_places(volume), affine, self.masks)
            for transform in self.augmentation:
                subject = transform(subject)
        augmented, _ = voxels_of(subject, self.masks)
        for channel, classes in self.masks.items():
            augmented[channel] = augmented[channel] / (len(classes) - 1) * 2 - 1
        augmented = augmented.clamp(-1, 1)
        if augmented.shape != volume.shape:
            raise ImageError(
                f"data.augmentation makes {tuple(augmented.shape)} of an image of the shape "
                f"{tuple(volume.shape)}: what changes the shape belongs in data.preprocessing"
            )
        return augmented.reshape(image.shape)

    def _with_places(self, volume: torch.Tensor) -> torch.Tensor:
        """`volume` with the places of classes in masks: what TorchIO fills in is the first, 0."""
        if not self.masks:
            return volume
        volume = volume.clone()
        for channel, classes in self.masks.items():
            volume[channel] = ((volume[channel] + 1) / 2 * (len(classes) - 1)).round()
        return volume


class DataModule(pl.LightningDataModule):
    """Images of a manifest for training and validation."""

    def __init__(
        self, manifest: Manifest, config: DataConfig, *, batch_size: int, seed: int, cache: Path,
        conditions: Sequence[ConditionSpec] | None = None, private: bool = False,
    ) -> None:  # fmt: skip
        """Read the images.

        Args:
            conditions: vocabulary and range of each column, agreed on elsewhere; None: those of
                the training rows.
            private: draw subjects by chance for each batch, and describe the images by what is
                declared alone.
        """
        super().__init__()
        self.files = self.manifest = manifest
        self.config = config
        self.batch_size = batch_size
        self.seed = seed
        # First what takes no time: an image is only read where the manifest is right.
        self.splits = self.file_splits = self._split()
        if conditions is None:
            conditions = condition_specs(
                manifest, self.rows("train"), config.conditions,
                classes=config.classes, ranges=config.ranges,
            )  # fmt: skip
        self.conditions = tuple(conditions)
        self.cache = load_images(manifest, config, cache)
        _require_room(config.patches, self.cache, manifest)
        # From here on, a row for each slice of data.slices; `files` stays as it was given.
        self.manifest = self.cache.rows_of(manifest)
        self.splits = [self.file_splits[place] for place in self.cache.source_rows]
        self.private = private
        self.image = self._image_spec()
        if private:
            self.image = unmeasured(self.image, config)
        self.num_workers = config.num_workers
        self.position = (0, 0)
        """Epoch with which training continues, and how many of its batches are skipped."""

    def rows(self, split: str) -> list[int]:
        """Indices into the manifest's rows that are in that split."""
        return [index for index, name in enumerate(self.splits) if name == split]

    @property
    def training_subjects(self) -> list[list[int]]:
        """Rows of each training subject."""
        return by_subject([row.subject for row in self.manifest.rows], self.rows("train"))

    @property
    def sides(self) -> str:
        """Sides of the images, and of the patches that are taken of them."""
        sizes = {shape[1:] for shape in self.cache.shapes}
        ends = sorted(sizes, key=math.prod)
        low, high, part = (
            " x ".join(map(str, size)) for size in (ends[0], ends[-1], self.image.size)
        )
        whole = low if len(sizes) == 1 else f"{low} to {high}"
        return f"{whole} in patches of {part}" if self.image.patches else whole

    def mask_warning(self) -> str:
        """What to add to the config if a channel looks like a mask and is read as an image."""
        first = self.files.rows[:_LOOKED_AT]
        probable = probable_masks(read_image(row.channels).tensor for row in first)
        unsaid = {i: probable[i] for i in probable if i not in self.config.channels}
        if not unsaid:
            return ""
        named = " and ".join(f"channel {channel}" for channel in unsaid)
        return (
            f"{named} of the first {len(first)} images: few whole numbers, as in a mask, and read "
            "as intensities (blurred where it is resampled, and made with values in between). For "
            f"a mask, add {mask_settings(unsaid)}; otherwise {{kind: image}} for that channel"
        )

    def setup(self, stage: str) -> None:
        _, processes = self._place()
        node = self.trainer.num_devices if self.trainer else 1
        nbytes = self._batch_bytes() // processes * node  # the processes of a node share its memory
        self.num_workers = workers_that_fit(self.config.num_workers, nbytes)

    def examples(self, rows: Sequence[int]) -> Batch:
        """Those rows of the manifest as one batch, not augmented."""
        return next(self.batches(rows, len(rows)))

    def every_image(self) -> Iterator[Batch]:
        """All rows of the manifest in order, in batches, not augmented."""
        return self.batches(range(len(self.manifest.rows)), self.batch_size)

    def batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        """Those rows of the manifest, `size` at once, not augmented."""
        images = self._images()  # once for all batches: it looks at every row
        for start in range(0, len(rows), size):
            yield images.__getitems__([(0, row) for row in rows[start : start + size]])

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("validation")

    def _loader(self, split: str) -> DataLoader[Batch]:
        is_training = split == "train"
        batches: SubjectBatches | EpochBatches
        if self.private and is_training:
            batches = SubjectBatches(self.training_subjects, self.batch_size)
        else:
            rows = self.rows(split)
            batches = EpochBatches(
                rows, self.batch_size, self.seed, self._place(), shuffle=is_training
            )
        if is_training:
            # At once, and not when the epoch starts: workers fetch ahead as soon as they are made.
            batches.epoch, batches.start = self.position
        return DataLoader(
            self._images(is_training=is_training),
            batch_sampler=batches,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            persistent_workers=False,
            # Only pinned memory is copied to a GPU while Python goes on.
            pin_memory=bool(self.trainer and self.trainer.strategy.root_device.type == "cuda"),
        )

    def _images(self, *, is_training: bool = False) -> CachedImages:
        augmentation = self.config.augmentation if is_training else ()
        return CachedImages(
            self.cache, self.manifest, self.image, augmentation, self.seed, self.config.masks,
            self.config.inpainting, is_random=is_training,
        )  # fmt: skip

    def _place(self) -> tuple[int, int]:
        """The rank of this process, and the number of processes that train together."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batch_bytes(self) -> int:
        """Bytes of a batch in shared memory: images, labels and indices, each in its own pages."""
        pages = 3 * 4096
        channels = self.image.channels + len(self.image.source_channels)
        image_bytes = channels * int(np.prod(self.image.size)) * 4
        return min(self.batch_size, len(self.rows("train"))) * image_bytes + pages

    def _split(self) -> list[str]:
        rows = self.manifest.rows
        if any(row.split for row in rows):
            splits = [row.split or "train" for row in rows]
        else:
            names = split_subjects(
                [row.subject for row in rows],
                [row.label for row in rows],
                {"validation": self.config.validation_fraction},
                self.seed,
            )
            splits = [names[row.subject] for row in rows]
        if "train" not in splits:
            raise ManifestError(
                f"{self.manifest.path} leaves nothing to train on: its splits are "
                f"{dict(Counter(splits))}; at least one subject must be in train"
            )
        return splits

    def _image_spec(self) -> ImageSpec:
        train = self.rows("train")
        target = _target_channels(self.cache.shape[1], self.config.source_channels)
        ranges, affines = self.cache.intensity_ranges[train][:, target], self.cache.affines[train]
        source = read_image(self.manifest.rows[0].channels)
        keeps = Preprocessing(self.config).keeps_intensities
        masks = self.config.target_masks
        images = [channel for place, channel in enumerate(target) if place not in masks]
        is_picture = (
            source.file_format == "png"
            and keeps
            and len(images) in (0, 1, 3)
            and (not images or images[-1] - images[0] == len(images) - 1)
            and all(0 <= value < 256 for classes in masks.values() for value in classes)
        )
        spacing = np.median(spacing_of(affines), axis=0)
        whole = self.cache.shape[2:]
        size = self.config.patches or whole
        # A patch may be of any part of an image, so that it lies in none.
        affine = generated_affine(affines, size)
        lies_there = size == whole and self.cache.is_of_one_shape
        affine = affine if lies_there else centred_affine(spacing.tolist(), size)
        return ImageSpec(
            size=size,
            channels=len(target),
            spacing_mm=tuple(np.round(spacing, 6).tolist()),
            affine=as_rows(affine),
            intensity_range=tuple(tuple(pair) for pair in ranges.mean(axis=0).tolist()),
            file_format="png" if is_picture else "nii.gz",
            integer=all(source.integers[channel] for channel in images) and keeps,
            labels=self.manifest.labels,
            conditions=self.conditions,
            # of holes: the emptied images and the mask, before the images themselves
            source_channels=tuple(range(len(target) + 1))
            if self.config.inpainting
            else self.config.source_channels,
            masks=masks,
            patches=self.config.patches is not None,
        )


def _require_room(size: Sequence[int] | None, cache: ImageCache, manifest: Manifest) -> None:
    if not size:
        return
    faults = {}
    for place, shape in zip(cache.source_rows, cache.shapes, strict=True):
        if fault := patch_fault(size, shape[1:]):
            path, shown = manifest.rows[place].channels[0], " x ".join(map(str, shape[1:]))
            faults[path] = f"{path} is {shown} as the model sees it, {fault}"
    if faults:
        raise ImageError(
            f"data.patches {list(size)} cannot be taken of {len(faults)} of the images:",
            first_faults(list(faults.values())),
        )


def _target_channels(channels: int, source: Sequence[int]) -> list[int]:
    target = [index for index in range(channels) if index not in source]
    if not target or any(index >= channels for index in source):
        raise ImageError(
            f"data.source_channels {list(source)}: the images have {channels} channel(s), counted "
            "from 0, of which one at least must be left to make"
        )
    return target


def _empty(batch: Batch) -> Batch:
    """A batch of the same kind, without images."""
    condition = batch["condition"]
    return Batch(
        image=batch["image"][:0],
        label=batch["label"][:0],
        index=batch["index"][:0],
        augmented=batch["augmented"],
        condition=Condition(values=condition["values"][:0], source=condition["source"][:0]),
    )


def _unchanged(batch: Any) -> Any:
    return batch
