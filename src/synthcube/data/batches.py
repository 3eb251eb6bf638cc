"""Batches of images: read from the cache, augmented, in an order that the seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from synthcube.data.cache import ImageCache
from synthcube.data.conditions import condition_values
from synthcube.data.manifest import Manifest
from synthcube.data.named_transforms import TransformConfig
from synthcube.errors import ImageError
from synthcube.runtime import derived_seed
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

    Attributes:
        start: batches of this epoch to leave out, for they were trained on before.
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
        self.start = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + int(not self.shuffle and rest >= self.processes) or min(1, len(self.rows))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = self.rows
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for number in range(self.start, len(self)):
            # Every process needs its share: a rest too small for that joins the last batch.
            takes_rest = not self.shuffle and number + 1 == len(self)
            start, size = number * self.batch_size, self.batch_size
            batch = rows[start:] if takes_rest else rows[start : start + size]
            share = batch[self.rank :: self.processes] if len(batch) >= self.processes else batch
            yield [(self.epoch, row) for row in share.tolist()]
