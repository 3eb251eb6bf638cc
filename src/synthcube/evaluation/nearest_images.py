"""The most similar image of another set for each image, also when it is mirrored or shifted.

Two steps. Coarse copies, and their spectra, which a shift leaves alone, give a few candidates
among all images; those are compared in full by the normalised cross-correlation of slightly blurred
copies (Lewis, "Fast normalized cross-correlation", 1995), over shifts of a few voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal.windows import tukey
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from synthcube.data.cache import Float32Rows, append_rows
from synthcube.errors import ImageError
from synthcube.evaluation.arrays import Array, Ints
from synthcube.evaluation.neighbours import nearest
from synthcube.evaluation.sets import ImageSet
from synthcube.storage import scratch_folder

SHIFT = 1 / 16  # largest shift that is tried, as a share of each side
_COARSE, _MEDIUM = {2: 16, 3: 8}, {2: 64, 3: 32}  # voxels along each side, at most
_LOWEST = {2: 8, 3: 4}  # frequencies of a spectrum along each axis, in each direction
_TAPER = 0.06  # share of each axis over which images fade to 0 before their spectrum is computed
_BLUR = 2
"""Voxels that the blur of the copies reaches."""
_BY_IMAGE, _BY_SPECTRUM = 4, 4  # candidates
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class DownsampledCopies:
    """A set of images, small enough to be searched."""

    coarse: Array  # (N, C * coarse voxels): mean 0 and length 1; zeros for a constant image
    spectrum: Array  # (N, C * frequencies): square roots of the lowest amplitudes, of length 1
    grids: tuple[tuple[int, ...], tuple[int, ...]]  # (C, *coarse size) and (C, *frequencies)
    blurred: Float32Rows  # of medium size, on disk; each channel with mean 0 and spread 1
    places: Ints  # (N,) of the images in `blurred`

    def __len__(self) -> int:
        return len(self.coarse)

    def subset(self, rows: Ints) -> DownsampledCopies:
        """Those images alone; the file on disk stays one."""
        return replace(
            self, coarse=self.coarse[rows], spectrum=self.spectrum[rows], places=self.places[rows]
        )

    def read(self, rows: Ints) -> Array:
        """The blurred images, (len(rows), C, *size)."""
        return self.blurred.read(self.places[rows].tolist())


@contextmanager
def downsampled_copies(*sets: ImageSet) -> Iterator[list[DownsampledCopies]]:
    """Yield the small copies of each set; those on disk, beside the set's own file, are removed
    when the context ends.
    """
    first = sets[0]
    usual = f"{first.name} {list(first.shape)} (channels first)"
    others = (images for images in sets[1:] if images.shape != first.shape)
    faults = [f"{images.name}: shape {list(images.shape)}, {usual}" for images in others]
    if faults:
        raise ImageError("Only images of one shape can be searched for similar ones:", faults)
    with scratch_folder(first.voxels.path.parent) as folder:
        yield [_downsampled(images, folder / f"{i}.f32") for i, images in enumerate(sets)]


def _downsampled(images: ImageSet, path: Path) -> DownsampledCopies:
    channels, *sides = images.shape
    small = [min(side, _COARSE[images.rank]) for side in sides]
    medium = [min(side, _MEDIUM[images.rank]) for side in sides]
    lowest = [min(_LOWEST[images.rank], (side - 1) // 2) for side in medium]
    grids = (channels, *small), (channels, *(2 * n + 1 for n in lowest[:-1]), lowest[-1] + 1)
    tables = [np.empty((len(images), int(np.prod(grid))), np.float32) for grid in grids]
    size = max(1, _VALUES_AT_ONCE // int(np.prod(images.shape)))
    with append_rows(path) as append:
        for rows, batch in images.batches(size):
            blurred = _standardised(_blurred(_pooled(torch.from_numpy(batch), medium)))
            append(blurred.numpy())
            copies = _standardised(_pooled(blurred, small)), _amplitudes(blurred, lowest)
            for table, values in zip(tables, copies, strict=True):
                flat = values.flatten(1)
                length = flat.norm(dim=1, keepdim=True).clamp(min=1e-6)
                table[rows.start : rows.stop] = (flat / length).numpy()
    rows_on_disk = Float32Rows(path, (channels, *medium))
    return DownsampledCopies(tables[0], tables[1], grids, rows_on_disk, np.arange(len(images)))


def _amplitudes(images: torch.Tensor, lowest: list[int]) -> torch.Tensor:
    """(B, C, *2 * lowest + 1, lowest + 1): square roots of the amplitudes, from -lowest to lowest;
    of the last axis from 0, because the others are the same again."""
    axes = tuple(range(2, images.ndim))
    for axis in axes:
        # without a jump from one border to the other, which a shift would change
        window = torch.from_numpy(tukey(images.shape[axis] + 2, _TAPER)[1:-1]).to(images)
        images = images * window.view(-1, *[1] * (images.ndim - 1 - axis))
    amplitudes: torch.Tensor = torch.fft.rfftn(images, dim=axes).abs().sqrt()
    for axis, limit in zip(axes[:-1], lowest, strict=False):
        places = torch.arange(-limit, limit + 1) % images.shape[axis]
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
    """Filtered by (1, 2, 1) / 4 twice along each axis, about a Gaussian of one voxel; borders are
    repeated."""
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


@dataclass(frozen=True, slots=True)
class NearestImages:
    """For each query the most similar image among the references."""

    similarity: Array  # (N,): correlation of the part in common, at most 1
    index: Ints  # (N,) into the references
    mirrored: tuple[tuple[int, ...], ...]  # spatial axes along which each query was mirrored


def nearest_images(
    queries: DownsampledCopies, references: DownsampledCopies, *, flips: bool,
    exclude_self: bool = False,
) -> NearestImages:  # fmt: skip
    """The reference most similar to each query.

    Args:
        flips: mirror the queries along every set of spatial axes too.
        exclude_self: both are the same set, and no image is its own nearest.
    """
    rank = len(queries.blurred.row_shape) - 1
    flip_axes = [
        axes
        for number in range(rank + 1 if flips else 1)
        for axes in itertools.combinations(range(rank), number)
    ]
    # mirrored along all axes, the amplitudes are the same: half of the flips give the other half
    half = [flip for flip, axes in enumerate(flip_axes) if rank - 1 not in axes]
    lists = [
        _shortlist(queries, references, flip_axes, tried, table, exclude_self)
        for table, tried in enumerate((range(len(flip_axes)), half))
    ]
    if flips:
        axes_left = [tuple(axis for axis in range(rank) if axis not in axes) for axes in flip_axes]
        opposite = np.array([flip_axes.index(axes) for axes in axes_left])
        lists.append((lists[1][0], opposite[lists[1][1]]))
    candidates, ways = (np.concatenate(parts, axis=1) for parts in zip(*lists, strict=True))
    scores = _candidate_scores(queries, references, candidates, ways, flip_axes)
    best = scores.argmax(axis=1)
    rows = np.arange(len(scores))
    mirrored = tuple(flip_axes[flip] for flip in ways[rows, best])
    return NearestImages(scores[rows, best], candidates[rows, best], mirrored)


def _shortlist(
    queries: DownsampledCopies, references: DownsampledCopies, flip_axes: list[tuple[int, ...]],
    flips: Sequence[int], table: int, exclude_self: bool,
) -> tuple[Ints, Ints]:  # fmt: skip
    """Candidates (N, k) and the flip of each, by the coarse images (0) or spectra (1)."""
    values, known = ((copies.coarse, copies.spectrum)[table] for copies in (queries, references))
    count = min((_BY_IMAGE, _BY_SPECTRUM)[table], len(references) - exclude_self)
    by_flip = []
    for flip in flips:
        mirrored = values
        if axes := tuple(axis + 2 for axis in flip_axes[flip]):
            flipped = np.flip(values.reshape(-1, *queries.grids[table]), axes)
            mirrored = np.ascontiguousarray(flipped.reshape(len(values), -1))
        by_flip.append(nearest(mirrored, known, count, exclude_self=exclude_self))
    distances, indices = (np.concatenate(parts, axis=1) for parts in zip(*by_flip, strict=True))
    best = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(indices, best, axis=1), np.array(flips)[best // count]


def _candidate_scores(
    queries: DownsampledCopies, references: DownsampledCopies, candidates: Ints, ways: Ints,
    flip_axes: list[tuple[int, ...]],
) -> Array:  # fmt: skip
    total, count = candidates.shape
    scores = np.empty((total, count), np.float32)
    size = max(1, _VALUES_AT_ONCE // (count * int(np.prod(queries.blurred.row_shape))))
    for start in range(0, total, size):
        rows = np.arange(start, min(start + size, total))
        images = torch.from_numpy(queries.read(rows))
        others = torch.from_numpy(references.read(candidates[rows].ravel()))
        others = others.reshape(len(rows), count, *others.shape[1:])
        flips = torch.from_numpy(ways[rows])
        scores[rows] = aligned_correlation(images, others, flips, flip_axes)
    return scores


def aligned_correlation(
    images: torch.Tensor, others: torch.Tensor, flips: torch.Tensor,
    flip_axes: list[tuple[int, ...]],
) -> Array:  # fmt: skip
    """(B, K): the highest correlation of the inner part of `others` with `images`, over shifts of
    at most :data:`SHIFT` of each side; 0 where either is constant.

    Args:
        images: (B, C, *size).
        others: (B, K, C, *size), compared with each.
        flips: (B, K): the place in `flip_axes` of the axes along which the image is mirrored.
    """
    sides = images.shape[2:]
    shifts = [max(1, round(side * SHIFT)) if side >= 8 else 0 for side in sides]
    # the blur of a border sees what is beyond, so that the patch stays away from it
    margins = [shift + min(_BLUR, side // 8) for side, shift in zip(sides, shifts, strict=True)]
    inner = [side - 2 * margin for side, margin in zip(sides, margins, strict=True)]
    within: Any = (..., *(slice(m, m + n) for m, n in zip(margins, inner, strict=True)))
    tried: Any = (..., *(slice(m - n, m + n + 1) for m, n in zip(margins, shifts, strict=True)))
    last = tuple(range(-len(sides), 0))
    patch = others[within] - others[within].mean(dim=last, keepdim=True)
    rows = torch.arange(len(images))[:, None]
    # (B, flips, C, *size); a shift and its mirror image lie on either side of no shift
    dims = [[axis - len(sides) for axis in axes] for axes in flip_axes]
    mirrored = torch.stack([images.flip(flip) for flip in dims], dim=1)
    # (B, *tried): squared deviations from the mean of each channel, in every box
    sums, squares = _box_sums(images, inner), _box_sums(images.square(), inner)
    spread = (
        (squares - sums.square() / float(np.prod(inner))).sum(dim=1).clamp(min=0).float()[tried]
    )
    spreads = torch.stack([spread.flip(flip) for flip in dims], dim=1)
    spectrum = torch.fft.rfftn(mirrored, dim=last)[rows, flips]
    spectrum = (spectrum * torch.fft.rfftn(patch, s=sides, dim=last).conj()).sum(dim=2)
    # a patch of mean 0 needs no mean subtracted from the image
    product = torch.fft.irfftn(spectrum, s=sides, dim=last)[tried]
    energy = patch.square().sum(dim=(2, *last)).view(*flips.shape, *[1] * len(sides))
    norm = (spreads[rows, flips] * energy).sqrt()
    enough = norm > 1e-3 * float(np.prod(inner))
    correlation = torch.where(enough, product / norm.clamp(min=1e-9), torch.zeros(()))
    best: Array = correlation.flatten(2).amax(dim=2).clamp(max=1).numpy()
    return best


def _box_sums(image: torch.Tensor, sides: list[int]) -> torch.Tensor:
    """Sums over every box of these sides, (B, C, *places)."""
    total = image.double()
    for axis, side in enumerate(sides, start=2):
        running = torch.nn.functional.pad(total.cumsum(dim=axis).movedim(axis, -1), (1, 0))
        total = (running[..., side:] - running[..., :-side]).movedim(-1, axis)
    return total
