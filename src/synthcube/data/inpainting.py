"""Holes that are cut into whole images, so that a model learns to fill them.

As the winners of BraTS's local inpainting of 2024 train: another hole in healthy tissue in every
epoch (arXiv:2507.18126).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.schema import Schema

_TRIES = 100  # to find a voxel that is not background
_BACKGROUND = -1 + 1e-3  # the lowest intensity of the model's range, and rounding errors


class InpaintingConfig(Schema):
    """The holes: ellipsoids whose centre is not in the background."""

    max_holes: int = Field(
        default=1, ge=1, le=64, description="An image gets one hole to so many, at random."
    )
    min_size: float = Field(
        default=0.1, gt=0, le=1,
        description="Smallest diameter of a hole along an axis, as a share of that side of the "
        "image; each axis has a diameter of its own.",
    )  # fmt: skip
    max_size: float = Field(default=0.35, gt=0, le=1, description="Largest diameter, likewise.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size:g} is above max_size {self.max_size:g}")
        return self


def cut_holes(images: torch.Tensor, config: InpaintingConfig, seeds: Sequence[int]) -> torch.Tensor:
    """Images with holes, and the mask of the holes as last channel: (B, C + 1, *spatial).

    The holes of an image depend on its voxels and its seed alone, and are the same in all channels.

    Args:
        images: (B, C, *spatial) in [-1, 1].
        seeds: one for each image.
    """
    masks = [_holes(image, config, seed) for image, seed in zip(images, seeds, strict=True)]
    return voided(images, torch.stack(masks)[:, None])


def voided(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Images (B, C, *spatial) with the lowest intensity, -1, where `mask` (B, 1, *spatial) is true.

    The mask comes as last channel, 1 in the holes and -1 elsewhere.
    """
    return torch.cat([images.masked_fill(mask, -1), mask.to(images) * 2 - 1], dim=1)


def _holes(image: torch.Tensor, config: InpaintingConfig, seed: int) -> torch.Tensor:
    """(*spatial) of bool: the holes of an image, (C, *spatial)."""
    generator = torch.Generator().manual_seed(seed)
    sides, rank = image.shape[1:], image.ndim - 1
    mask = torch.zeros(sides, dtype=torch.bool)
    for _ in range(int(torch.randint(1, config.max_holes + 1, (), generator=generator))):
        for _ in range(_TRIES):
            centre = tuple(int(torch.randint(side, (), generator=generator)) for side in sides)
            if (image.movedim(0, -1)[centre] > _BACKGROUND).any():
                break
        spread = config.max_size - config.min_size
        shares = config.min_size + spread * torch.rand(rank, generator=generator)
        distance = torch.zeros(())
        for axis, (side, middle) in enumerate(zip(sides, centre, strict=True)):
            radius = max(float(shares[axis]) * side / 2, 0.5)
            along = ((torch.arange(side) - middle) / radius) ** 2
            distance = distance + along.view([-1 if i == axis else 1 for i in range(rank)])
        mask |= distance <= 1
    return mask
