"""From a trained model to true images: one seed each, in batches, with their provenance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from synthcube import compute, runtime
from synthcube.data.cache import ImageCache
from synthcube.family import Reconstructs, Samples


def image_seeds(seed: int, num_images: int) -> list[int]:
    """The seed of each image: a longer list begins with the shorter one."""
    return [runtime.derived_seed(seed, "image", index) for index in range(num_images)]


def generate(
    family: Samples, seeds: list[int], batch_size: int, precision: str, device: torch.device
) -> Iterator[torch.Tensor]:
    """One image for each seed, (C, *spatial) in [-1, 1] on the CPU."""
    for start in range(0, len(seeds), batch_size):
        generators = [
            torch.Generator().manual_seed(each) for each in seeds[start : start + batch_size]
        ]
        with compute.inference(precision, device):
            images = family.sample(generators)
        yield from images.float().cpu()


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
