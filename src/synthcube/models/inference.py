"""Inference with a model on a device: the seed of each image, generation, reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from synthcube import compute, environment
from synthcube.models.family import Reconstructs, Samples
from synthcube.models.windows import in_windows
from synthcube.schema import Condition


def image_seeds(seed: int, num_images: int) -> list[int]:
    """The seed of each image, in [0, 2**63): a longer list begins with the shorter one."""
    return [environment.derived_seed(seed, "image", index) for index in range(num_images)]


def generate(
    family: Samples, seeds: Sequence[int], values: npt.NDArray[np.float32],
    precision: str, device: torch.device, source: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Generate one batch with an image for each seed: (B, C, *spatial) in [-1, 1] on the CPU.

    `values` are the conditions, (B, K); `source` images to translate, (B, S, *spatial) in [-1, 1].
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    source = torch.zeros(len(seeds), 0) if source is None else source
    condition = Condition(values=torch.from_numpy(values).to(device), source=source.to(device))
    with compute.inference(precision, device):
        images = family.sample(generators, condition)
    return images.float().cpu()


def reconstruct(
    family: Reconstructs, originals: Tensor, precision: str, device: torch.device,
    window: Sequence[int] | None = None, at_once: int = 1,
) -> Tensor:  # fmt: skip
    """Reconstructions of a batch of images: (B, C, *spatial) in [-1, 1] on the CPU.

    Args:
        window: the patch that the model was trained on, `at_once` of which are reconstructed
            together; None: whole images.
    """
    images = originals.to(device)
    with compute.inference(precision, device):
        if window is None:
            images = family.reconstruct(images)
        else:
            windows = partial(in_windows, family.reconstruct, size=window, at_once=at_once)
            images = torch.cat([windows(image[None]) for image in images])
    return images.float().cpu()
