"""From a trained model to true images: one seed each, in batches, with their provenance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import compute, runtime
from synthcube.data.cache import ImageCache
from synthcube.family import Reconstructs, Samples
from synthcube.schema import Condition


def image_seeds(seed: int, num_images: int) -> list[int]:
    """The seed of each image: a longer list begins with the shorter one."""
    return [runtime.derived_seed(seed, "image", index) for index in range(num_images)]


def generate(
    family: Samples,
    seeds: list[int],
    values: npt.NDArray[np.float32],
    batch_size: int,
    precision: str,
    device: torch.device,
    sources: tuple[ImageCache, list[int]] | None = None,
) -> Iterator[torch.Tensor]:
    """One image for each seed, (C, *spatial) in [-1, 1] on the CPU.

    Args:
        values: what each image follows, (len(seeds), K); see Condition.
        sources: images to translate, one for each seed, and which of their channels are meant.
    """
    for start in range(0, len(seeds), batch_size):
        rows = range(start, min(start + batch_size, len(seeds)))
        generators = [torch.Generator().manual_seed(seeds[row]) for row in rows]
        source = torch.zeros(len(rows), 0)
        if sources:
            images, channels = sources
            source = torch.from_numpy(images.read(rows)[:, channels])
        condition = Condition(
            values=torch.from_numpy(values[start : rows.stop]).to(device),
            source=source.to(device),
        )
        with compute.inference(precision, device):
            made = family.sample(generators, condition)
        yield from made.float().cpu()


def reconstruct(
    family: Reconstructs, images: ImageCache, batch_size: int, precision: str, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Original and reconstruction of every image, each (C, *spatial) in [-1, 1] on the CPU."""
    for start in range(0, len(images), batch_size):
        rows = range(start, min(start + batch_size, len(images)))
        originals = torch.from_numpy(images.read(rows))
        with compute.inference(precision, device):
            made: Any = family.reconstruct(originals.to(device))
        yield from zip(originals, made.float().cpu(), strict=True)
