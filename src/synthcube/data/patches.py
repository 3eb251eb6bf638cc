"""The places of patches in images: the middle, or one that is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def middle(shape: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """The first voxel of the middle patch of `size` in an image of `shape` (spatial axes)."""
    return tuple((side - part) // 2 for side, part in zip(shape, size, strict=True))


def drawn(shape: Sequence[int], size: Sequence[int], seed: int) -> tuple[int, ...]:
    """The first voxel of a patch; every place in the image is equally likely.

    It depends on the sides and the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        int(torch.randint(side - part + 1, (), generator=generator))
        for side, part in zip(shape, size, strict=True)
    )


def cut(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """The index of a patch in an image, (C, *spatial)."""
    sides = (slice(first, first + part) for first, part in zip(start, size, strict=True))
    return (slice(None), *sides)
