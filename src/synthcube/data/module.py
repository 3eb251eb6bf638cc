"""The data of a run: images preprocessed once, split by subject, and handed out in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from synthcube.data.batches import EpochBatches, Images
from synthcube.data.conditions import condition_specs
from synthcube.data.images import read_image
from synthcube.data.loading import load_images
from synthcube.data.manifest import Manifest
from synthcube.data.named_transforms import TransformConfig
from synthcube.data.splitting import split_subjects
from synthcube.data.transforms import DataConfig, Preprocessing
from synthcube.errors import ImageError, ManifestError
from synthcube.runtime import workers_that_fit
from synthcube.schema import Batch, ImageSpec


class DataModule(pl.LightningDataModule):
    """Images of a manifest for training and validation.

    Raises, at construction:
        ImageError: images that cannot be read, are constant, or differ in shape; all at once.
        ManifestError: no subject is left to train on.
    """

    def __init__(
        self, manifest: Manifest, config: DataConfig, *, batch_size: int, seed: int, cache: Path
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.config = config
        self.batch_size = batch_size
        self.seed = seed
        self.cache = load_images(manifest, config, cache)
        self.splits = self._split()
        self.image = self._image_spec()
        self.num_workers = config.num_workers
        self.position = (0, 0)
        """Epoch, and batches of it to leave out, that the training goes on with."""

    def rows(self, split: str) -> list[int]:
        """Indices into the manifest's rows that are in that split."""
        return [index for index, name in enumerate(self.splits) if name == split]

    def setup(self, stage: str) -> None:
        _, processes = self._place()
        node = self.trainer.num_devices if self.trainer else 1
        # The processes of a node share its memory.
        self.num_workers = workers_that_fit(
            self.config.num_workers, self._batch_bytes() // processes * node
        )

    def examples(self, rows: Sequence[int]) -> Batch:
        """Those rows of the manifest as one batch, not augmented."""
        return next(self._batches(rows, len(rows)))

    def every_image(self) -> Iterator[Batch]:
        """All rows of the manifest in order, in batches, not augmented."""
        yield from self._batches(range(len(self.manifest.rows)), self.batch_size)

    def _batches(self, rows: Sequence[int], size: int) -> Iterator[Batch]:
        images = Images(self.cache, self.manifest, self.image, (), self.seed)  # looks at every row
        for start in range(0, len(rows), size):
            yield images.__getitems__([(0, row) for row in rows[start : start + size]])

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", self.config.augmentation)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("validation", ())

    def _loader(self, split: str, augmentation: Sequence[TransformConfig]) -> DataLoader[Batch]:
        batches = EpochBatches(
            self.rows(split), self.batch_size, self.seed, self._place(), shuffle=split == "train"
        )
        if split == "train":
            # At once, and not when the epoch starts: workers fetch ahead as soon as they are made.
            batches.epoch, batches.start = self.position
        return DataLoader(
            Images(self.cache, self.manifest, self.image, augmentation, self.seed),
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            persistent_workers=False,
        )

    def _place(self) -> tuple[int, int]:
        """This process among those that train together: its rank, and how many they are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batch_bytes(self) -> int:
        """A batch in shared memory: images, labels and indices, each in pages of its own."""
        pages = 3 * 4096
        image_bytes = int(np.prod(self.cache.shape[1:])) * 4
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
        made = _made_channels(self.cache.shape[1], self.config.source_channels)
        ranges, affines = self.cache.intensity_ranges[train][:, made], self.cache.affines[train]
        source = read_image(self.manifest.rows[0].channels)
        keeps = Preprocessing(self.config).keeps_intensities
        is_picture = source.file_format == "png" and len(made) in (1, 3) and keeps
        spacing = np.median(np.linalg.norm(affines[:, :3, :3], axis=1), axis=0)
        return ImageSpec(
            size=self.cache.shape[2:],
            channels=len(made),
            spacing_mm=tuple(np.round(spacing, 6).tolist()),
            affine=_common_affine(affines, spacing, self.cache.shape[2:]),
            intensity_range=tuple(tuple(pair) for pair in ranges.mean(axis=0).tolist()),
            file_format="png" if is_picture else "nii.gz",
            integer=source.integer and keeps,
            labels=self.manifest.labels,
            conditions=condition_specs(self.manifest, train, self.config.conditions),
            source_channels=self.config.source_channels,
        )


def _made_channels(channels: int, source: Sequence[int]) -> list[int]:
    made = [index for index in range(channels) if index not in source]
    if not made or any(index >= channels for index in source):
        raise ImageError(
            f"data.source_channels {list(source)}: the images have {channels} channel(s), counted "
            "from 0, of which one at least must be left to make"
        )
    return made


def _common_affine(
    affines: np.ndarray, spacing: np.ndarray, size: Sequence[int]
) -> tuple[tuple[float, ...], ...]:
    """The affine of all images where they share one, else an upright one around the origin."""
    if np.allclose(affines, affines[0], atol=1e-4):
        return tuple(map(tuple, affines[0].tolist()))
    affine = np.diag([*spacing, 1.0])
    centre = (np.array([*size, 1][:3]) - 1) / 2
    affine[:3, 3] = -centre * spacing
    return tuple(map(tuple, affine.tolist()))


def _as_it_is(batch: Any) -> Any:
    return batch
