"""How many images that a model draws during its training are copies of training images.

An image is a copy if its nearest training image is less than a third as far as the nearest of any
other subject: the criterion of Yoon et al., "Diffusion Probabilistic Models Generalize when They
Fail to Memorize" (2023), and of Gu et al., "On Memorization in Diffusion Models" (2023), with
subjects in place of images. A blurred image is near to many, and is none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional

from synthcube.data.batches import evenly_spaced
from synthcube.data.module import DataModule
from synthcube.environment import derived_seed
from synthcube.errors import ConfigError
from synthcube.training.config import COPIES

log = logging.getLogger("synthcube")

_NEAR = 1 / 3
_SIDE = {2: 32, 3: 16}  # of the small images that are compared
_MOST_VALUES = 1 << 25  # of all small training images: 128 MB
_MOST_HELD_OUT = 256
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class NearestSubjects:
    """Small training images, to find the nearest two subjects of others.

    Args:
        images: (N, D).
        subjects: (N,), of two subjects at least.
    """

    images: Tensor
    subjects: Tensor

    def copies(self, images: Tensor) -> Tensor:
        """(n,): which of the small images (n, D) are copies."""
        distances = torch.cdist(images, self.images)
        _, number = self.subjects.unique(return_inverse=True)
        nearest = distances.new_full((len(images), int(number.max()) + 1), torch.inf)
        nearest.scatter_reduce_(1, number.expand_as(distances), distances, "amin")
        first, second = nearest.topk(2, largest=False).values.unbind(1)
        return first < _NEAR * second


def small(images: Tensor) -> Tensor:
    """(n, D): images (n, C, *spatial), pooled to at most 32 pixels, or 16 voxels, along a side."""
    most = _SIDE[images.ndim - 2]
    sides = [min(side, most) for side in images.shape[2:]]
    return functional.interpolate(images.float(), sides, mode="area").flatten(1)


@dataclass(eq=False, repr=False)
class CopyWatch(Callback):
    """Draws images at each validation, and adds the share of copies to its means.

    The share of copies among the validation images is taken off: a subject whose images are there
    twice makes no alarm. Images that the training augments may be copied with a turn or a shift
    that this does not see.

    Args:
        num_images: drawn in all, by all processes.
    """

    data: DataModule
    num_images: int
    seed: int
    _known: tuple[NearestSubjects, float] | None = field(default=None, init=False)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if len(self.data.training_subjects) < 2:
            raise ConfigError(
                "training.early_stop.metric copies: a copy is told by its distance to another "
                "subject, and all training images are of one; leave it out."
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.sanity_checking:
            return
        if self._known is None:
            self._known = self._training_images()
        training, chance = self._known
        number, processes = max(self.num_images, trainer.world_size), trainer.world_size
        places = range(trainer.global_rank, number, processes)
        with trainer.precision_plugin.forward_context():
            parts = [
                self._drawn(module, places[start : start + _AT_ONCE])
                for start in range(0, len(places), _AT_ONCE)
            ]
        drawn = torch.cat(parts)
        share = training.copies(drawn).double().mean() - chance
        module.means["validation"].add(
            {COPIES: share.clamp(min=0).to(module.device)}, num_images=len(drawn)
        )

    def _drawn(self, module: Any, places: range) -> Tensor:
        """Small images drawn with the weights that are validated, always of the same seeds."""
        rows = evenly_spaced(self.data.rows("train"), self.num_images)
        examples = self.data.examples([rows[place % len(rows)] for place in places])
        condition = move_data_to_device(examples["condition"], module.device)
        generators = [
            torch.Generator().manual_seed(derived_seed(self.seed, "copies", place))
            for place in places
        ]
        return small(module.sample(generators, condition)).cpu()

    def _training_images(self) -> tuple[NearestSubjects, float]:
        """The training images, and the share of copies among those that validate."""
        rows = self.data.rows("train")
        first = small(self.data.examples(rows[:1])["image"])
        rows = evenly_spaced(rows, _MOST_VALUES // first.shape[1])
        names = [self.data.manifest.rows[row].subject for row in rows]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        training = NearestSubjects(
            self._images(rows), torch.tensor([numbers[name] for name in names])
        )
        held_out = self._images(evenly_spaced(self.data.rows("validation"), _MOST_HELD_OUT))
        chance = float(training.copies(held_out).double().mean())
        if chance:
            log.warning(
                "%.0f%% of the validation images are copies of training images themselves: that "
                "share of copies among generated images is not counted.", 100 * chance,
            )  # fmt: skip
        return training, chance

    def _images(self, rows: list[int]) -> Tensor:
        return torch.cat([small(part["image"]) for part in self.data.batches(rows, _AT_ONCE)])
