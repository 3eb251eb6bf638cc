"""Images small enough to search: coarse ones, their spectra, and blurred ones of medium size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.signal.windows import tukey
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from synthcube.errors import ImageError
from synthcube.evaluation.images import ImageSet
from synthcube.storage import explained, scratch_folder

Array = npt.NDArray[np.float32]

_COARSE = {2: 16, 3: 8}
_MEDIUM = {2: 64, 3: 32}
"""Voxels along each side, at most."""
_LOWEST = {2: 8, 3: 4}
"""Frequencies of a spectrum along each axis, in each direction."""
_TAPER = 0.06
"""Share of each axis over which images fade to 0 before their spectrum is taken."""
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Views:
    """A set of images, small."""

    coarse: Array
    """(N, C * coarse voxels): mean 0 and length 1; zeros for a constant image."""
    spectrum: Array
    """(N, C * frequencies): square roots of the lowest amplitudes, of length 1."""
    grids: tuple[tuple[int, ...], tuple[int, ...]]
    """(C, *coarse size) and (C, *frequencies)."""
    fine: ImageSet
    """Blurred, each channel with mean 0 and spread 1."""
    places: npt.NDArray[np.int64]
    """(N,) of the images in `fine`."""

    def __len__(self) -> int:
        return len(self.coarse)

    def taken(self, rows: npt.NDArray[np.int64]) -> Views:
        """Those images alone; what is on disk stays one file."""
        return replace(
            self, coarse=self.coarse[rows], spectrum=self.spectrum[rows], places=self.places[rows]
        )

    def read(self, rows: npt.NDArray[np.int64]) -> Array:
        """The blurred images, (len(rows), C, *size)."""
        return self.fine.read(self.places[rows].tolist())


@contextmanager
def views(*sets: ImageSet) -> Iterator[list[Views]]:
    """The small versions of each set; those on disk, beside the set's own file, go with the
    context.

    Raises:
        ImageError: the sets differ in shape.
        OutputError: the folder of a set is full.
    """
    _check_shapes(sets)
    with scratch_folder(sets[0].path.parent) as folder:
        yield [_made(each, folder / f"{i}.f32") for i, each in enumerate(sets)]


def _made(images: ImageSet, path: Path) -> Views:
    channels, *sides = images.shape
    small = [min(side, _COARSE[images.rank]) for side in sides]
    middle = [min(side, _MEDIUM[images.rank]) for side in sides]
    lowest = [min(_LOWEST[images.rank], (side - 1) // 2) for side in middle]
    grids = (channels, *small), (channels, *(2 * each + 1 for each in lowest[:-1]), lowest[-1] + 1)
    tables = [np.empty((len(images), int(np.prod(grid))), np.float32) for grid in grids]
    size = max(1, _VALUES_AT_ONCE // int(np.prod(images.shape)))
    with explained(path), path.open("wb") as file:
        for rows, batch in images.batches(size):
            fine = _standardised(_blurred(_pooled(torch.from_numpy(batch), middle)))
            file.write(fine.numpy().tobytes())
            made = _standardised(_pooled(fine, small)), _amplitudes(fine, lowest)
            for table, each in zip(tables, made, strict=True):
                flat = each.flatten(1)
                length = flat.norm(dim=1, keepdim=True).clamp(min=1e-6)
                table[rows.start : rows.stop] = (flat / length).numpy()
    fine_set = replace(images, path=path, shape=(channels, *middle))
    return Views(tables[0], tables[1], grids, fine_set, np.arange(len(images)))


def _amplitudes(images: torch.Tensor, lowest: list[int]) -> torch.Tensor:
    """(B, C, *2 * lowest + 1, lowest + 1): square roots of the amplitudes, from -lowest to lowest;
    of the last axis from 0, because the others are the same again."""
    axes = tuple(range(2, images.ndim))
    for axis in axes:
        # without a jump from one border to the other, which a shift would change
        window = torch.from_numpy(tukey(images.shape[axis] + 2, _TAPER)[1:-1]).to(images)
        images = images * window.view(-1, *[1] * (images.ndim - 1 - axis))
    amplitudes: torch.Tensor = torch.fft.rfftn(images, dim=axes).abs().sqrt()
    for axis, each in zip(axes[:-1], lowest, strict=False):
        places = torch.arange(-each, each + 1) % images.shape[axis]
        amplitudes = amplitudes.index_select(axis, places)
    amplitudes = amplitudes[..., : lowest[-1] + 1].clone()
    amplitudes[..., 1:] *= 2**0.5  # each stands for two
    return amplitudes


def _pooled(images: torch.Tensor, sides: list[int]) -> torch.Tensor:
    if list(images.shape[2:]) == sides:
        return images
    pool: Any = adaptive_avg_pool2d if len(sides) == 2 else adaptive_avg_pool3d
    pooled: torch.Tensor = pool(images, tuple(sides))
    return pooled


def _blurred(images: torch.Tensor) -> torch.Tensor:
    """By (1, 2, 1) / 4 twice along each axis, a Gaussian of one voxel; borders are repeated."""
    for axis in range(2, images.ndim):
        moved = images.movedim(axis, -1)
        for _ in range(2):
            padded = torch.cat([moved[..., :1], moved, moved[..., -1:]], dim=-1)
            moved = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
        images = moved.movedim(-1, axis)
    return images.contiguous()


def _standardised(images: torch.Tensor) -> torch.Tensor:
    """Mean 0 and spread 1 in each channel; what is nearly constant becomes 0."""
    axes = tuple(range(2, images.ndim))
    mean = images.mean(dim=axes, keepdim=True)
    spread = (images - mean).square().mean(dim=axes, keepdim=True).sqrt()
    limit = 1e-5 * mean.abs() + 1e-12
    return torch.where(spread > limit, (images - mean) / spread.clamp(min=1e-12), torch.zeros(()))


def _check_shapes(sets: tuple[ImageSet, ...]) -> None:
    faults = [
        f"{each.name}: shape {list(each.shape)}, {sets[0].name} {list(sets[0].shape)} (channels "
        "first)"
        for each in sets[1:]
        if each.shape != sets[0].shape
    ]
    if faults:
        raise ImageError("Only images of one shape can be looked for among each other:", faults)
