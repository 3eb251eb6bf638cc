"""The data of a run: images preprocessed once, split by subject, and handed out in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from synthcube.data.cache import ImageCache
from synthcube.data.conditions import condition_specs, condition_values
from synthcube.data.images import read_image
from synthcube.data.loading import load_images
from synthcube.data.manifest import Manifest
from synthcube.data.named_transforms import TransformConfig
from synthcube.data.splitting import split_subjects
from synthcube.data.transforms import DataConfig, Preprocessing
from synthcube.errors import ImageError, ManifestError
from synthcube.runtime import derived_seed, workers_that_fit
from synthcube.schema import Batch, Condition, ImageSpec


class Images(Dataset[Batch]):
    """Rows of a cache, as whole batches; augmented where the config says so."""

    def __init__(
        self,
        cache: ImageCache,
        manifest: Manifest,
        image: ImageSpec,
        augmentation: Sequence[TransformConfig],
        seed: int,
    ) -> None:
        self.cache = cache
        self.labels = torch.tensor([row.label for row in manifest.rows], dtype=torch.int64)
        self.conditions = torch.from_numpy(condition_values(image.conditions, manifest.rows))
        self.source = list(image.source_channels)
        self.made = [i for i in range(cache.shape[1]) if i not in self.source]
        self.augmentation = [transform.build() for transform in augmentation]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.cache)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> Batch:
        """The batch at these (epoch, row) pairs."""
        rows = [row for _, row in places]
        image = torch.from_numpy(self.cache.read(rows))
        if self.augmentation:
            image = torch.stack(
                [self._augmented(each, *place) for each, place in zip(image, places, strict=True)]
            )
        condition = Condition(values=self.conditions[rows], source=image[:, self.source])
        made = image[:, self.made] if self.source else image
        return Batch(
            image=made,
            label=self.labels[rows],
            index=torch.tensor(rows),
            augmented=bool(self.augmentation),
            condition=condition,
        )

    def _augmented(self, image: torch.Tensor, epoch: int, row: int) -> torch.Tensor:
        """(C, *spatial) to the same; depends on nothing but the seed, the epoch and the row."""
        import torchio as tio

        affine = self.cache.affines[row]
        volume = image if image.ndim == 4 else image[..., None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, "augmentation", epoch, row))
            scalar: Any = tio.ScalarImage(tensor=volume, affine=affine)
            for transform in self.augmentation:
                scalar = transform(scalar)
        augmented: torch.Tensor = scalar.data.float().clamp(-1, 1)
        if augmented.shape != volume.shape:
            raise ImageError(
                f"data.augmentation makes {tuple(augmented.shape)} of an image of the shape "
                f"{tuple(volume.shape)}: what changes the shape belongs in data.preprocessing"
            )
        return augmented.reshape(image.shape)


class EpochBatches:
    """Batches of (epoch, row) pairs whose order depends on the seed and the epoch alone.

    Args:
        batch_size: rows of a batch over all processes, each of which takes its share.
        place: rank of this process, and how many share each batch.
    """

    def __init__(
        self,
        rows: Sequence[int],
        batch_size: int,
        seed: int,
        place: tuple[int, int] = (0, 1),
        *,
        shuffle: bool,
    ) -> None:
        self.rows = torch.tensor(rows)
        self.rank, self.processes = place
        fitting = min(batch_size, len(rows))
        self.batch_size = max(1, fitting - fitting % self.processes)
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + int(not self.shuffle and rest >= self.processes) or min(1, len(self.rows))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = self.rows
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for number in range(len(self)):
            # Every process needs its share: a rest too small for that joins the last batch.
            takes_rest = not self.shuffle and number + 1 == len(self)
            start, size = number * self.batch_size, self.batch_size
            batch = rows[start:] if takes_rest else rows[start : start + size]
            share = batch[self.rank :: self.processes] if len(batch) >= self.processes else batch
            yield [(self.epoch, row) for row in share.tolist()]


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
        images = Images(self.cache, self.manifest, self.image, (), self.seed)
        return images.__getitems__([(0, row) for row in rows])

    def every_image(self) -> Iterator[Batch]:
        """All rows of the manifest in order, in batches, not augmented."""
        rows = range(len(self.manifest.rows))
        for start in range(0, len(rows), self.batch_size):
            yield self.examples(rows[start : start + self.batch_size])

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", self.config.augmentation)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("validation", ())

    def _loader(self, split: str, augmentation: Sequence[TransformConfig]) -> DataLoader[Batch]:
        batches = EpochBatches(
            self.rows(split), self.batch_size, self.seed, self._place(), shuffle=split == "train"
        )
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
