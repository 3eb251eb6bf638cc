"""From a trained model to true images: one seed each, in batches, with their provenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import compute, runtime
from synthcube.models.family import Reconstructs, Samples
from synthcube.schema import Condition


def image_seeds(seed: int, num_images: int) -> list[int]:
    """The seed of each image: a longer list begins with the shorter one."""
    return [runtime.derived_seed(seed, "image", index) for index in range(num_images)]


def generate(
    family: Samples,
    seeds: Sequence[int],
    values: npt.NDArray[np.float32],
    precision: str,
    device: torch.device,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """One image for each seed, (len(seeds), C, *spatial) in [-1, 1] on the CPU, made at once.

    Args:
        values: what each image follows, (len(seeds), K); see Condition.
        source: the images to translate, (len(seeds), S, *spatial) in [-1, 1].
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    source = torch.zeros(len(seeds), 0) if source is None else source
    condition = Condition(values=torch.from_numpy(values).to(device), source=source.to(device))
    with compute.inference(precision, device):
        made = family.sample(generators, condition)
    return made.float().cpu()


def reconstruct(
    family: Reconstructs, originals: torch.Tensor, precision: str, device: torch.device
) -> torch.Tensor:
    """The reconstruction of every image, (B, C, *spatial) in [-1, 1] on the CPU, made at once."""
    with compute.inference(precision, device):
        made: Any = family.reconstruct(originals.to(device))
    reconstructed: torch.Tensor = made.float().cpu()
    return reconstructed
