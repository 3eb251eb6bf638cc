"""The image of another set that looks most like each image, mirrored and shifted where that helps.

Two steps. Coarse images, and their spectra, which a shift leaves alone, find a few candidates
among all; those are compared in full by the normalised cross-correlation of slightly blurred
images (Lewis, "Fast normalized cross-correlation", 1995), over shifts of a few voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube.evaluation.copies.views import Views
from synthcube.evaluation.neighbours import nearest

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SHIFT = 1 / 16
"""Largest shift that is tried, as a share of each side."""
_BLUR = 2
"""Voxels that the blur of the views reaches."""
_BY_IMAGE, _BY_SPECTRUM = 4, 4  # candidates
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Lookalikes:
    """For each query the most alike image among the references."""

    similarity: Array
    """(N,): correlation of the part in common, at most 1."""
    index: Ints
    """(N,) into the references."""
    mirrored: tuple[tuple[int, ...], ...]
    """Spatial axes along which each query was mirrored."""


def most_alike(
    queries: Views, references: Views, *, flips: bool, exclude_self: bool = False
) -> Lookalikes:
    """The reference most like each query.

    Args:
        flips: mirror the queries along every set of spatial axes too.
        exclude_self: both are the same set, and no image is its own lookalike.
    """
    rank = queries.fine.rank
    axes = [
        each
        for number in range(rank + 1 if flips else 1)
        for each in itertools.combinations(range(rank), number)
    ]
    # mirrored along all axes, the amplitudes are the same: half of the ways find the other half
    half = [way for way, along in enumerate(axes) if rank - 1 not in along]
    by_image = _shortlist(queries, references, axes, range(len(axes)), 0, exclude_self)
    by_spectrum = _shortlist(queries, references, axes, half, 1, exclude_self)
    opposite = np.array([_place(axes, {*range(rank)} - {*along}) for along in axes])
    lists = [by_image, by_spectrum]
    if flips:
        lists.append((by_spectrum[0], opposite[by_spectrum[1]]))
    candidates, ways = (np.concatenate(each, axis=1) for each in zip(*lists, strict=True))
    return _compared(queries, references, candidates, ways, axes)


def _place(axes: list[tuple[int, ...]], along: set[int]) -> int:
    return next((place for place, each in enumerate(axes) if {*each} == along), 0)


def _shortlist(
    queries: Views, references: Views, axes: list[tuple[int, ...]], ways: Sequence[int],
    table: int, exclude_self: bool,
) -> tuple[Ints, Ints]:  # fmt: skip
    """Candidates (N, k) and the way each is mirrored, by the coarse images (0) or spectra (1)."""
    asked, known = ((each.coarse, each.spectrum)[table] for each in (queries, references))
    count = min((_BY_IMAGE, _BY_SPECTRUM)[table], len(references) - exclude_self)
    found = [
        nearest(_mirrored(asked, queries.grids[table], axes[way]), known, count,
                exclude_self=exclude_self)
        for way in ways
    ]  # fmt: skip
    distances, indices = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
    best = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(indices, best, axis=1), np.array(ways)[best // count]


def _compared(
    queries: Views, references: Views, candidates: Ints, ways: Ints, axes: list[tuple[int, ...]]
) -> Lookalikes:
    total, count = candidates.shape
    scores = np.empty((total, count), np.float32)
    size = max(1, _VALUES_AT_ONCE // (count * int(np.prod(queries.fine.shape))))
    for start in range(0, total, size):
        rows = np.arange(start, min(start + size, total))
        images = torch.from_numpy(queries.read(rows))
        others = torch.from_numpy(references.read(candidates[rows].ravel()))
        others = others.reshape(len(rows), count, *others.shape[1:])
        scores[rows] = aligned_correlation(images, others, torch.from_numpy(ways[rows]), axes)
    best = scores.argmax(axis=1)
    every = np.arange(total)
    chosen = tuple(axes[way] for way in ways[every, best])
    return Lookalikes(scores[every, best], candidates[every, best], chosen)


def aligned_correlation(
    images: torch.Tensor, others: torch.Tensor, ways: torch.Tensor, axes: list[tuple[int, ...]]
) -> Array:
    """(B, K): the highest correlation of the inner part of `others` with `images`, over shifts of
    at most :data:`SHIFT` of each side; 0 where either is constant.

    Args:
        images: (B, C, *size).
        others: (B, K, C, *size), compared with each.
        ways: (B, K): the place in `axes` of the spatial axes along which the image is mirrored.
    """
    sides = images.shape[2:]
    shifts = [max(1, round(side * SHIFT)) if side >= 8 else 0 for side in sides]
    # the blur of a border sees what is beyond, so that the patch stays away from it
    margins = [shift + min(_BLUR, side // 8) for side, shift in zip(sides, shifts, strict=True)]
    inner = [side - 2 * margin for side, margin in zip(sides, margins, strict=True)]
    windows = (slice(m, m + n) for m, n in zip(margins, inner, strict=True))
    tried = tuple(slice(m - n, m + n + 1) for m, n in zip(margins, shifts, strict=True))
    within: Any = (Ellipsis, *windows)
    places: Any = (Ellipsis, *tried)
    last = tuple(range(-len(sides), 0))
    patch = others[within]
    patch = patch - patch.mean(dim=last, keepdim=True)
    rows = torch.arange(len(images))[:, None]
    # (B, ways, C, *size); a shift and its mirror image lie on either side of no shift
    flips = [[axis - len(sides) for axis in along] for along in axes]
    mirrored = torch.stack([images.flip(each) for each in flips], dim=1)
    spread = _spread(images, inner)[places]
    spreads = torch.stack([spread.flip(each) for each in flips], dim=1)
    spectrum = torch.fft.rfftn(mirrored, dim=last)[rows, ways]
    spectrum = (spectrum * torch.fft.rfftn(patch, s=sides, dim=last).conj()).sum(dim=2)
    # a patch of mean 0 needs no mean taken from the image
    product = torch.fft.irfftn(spectrum, s=sides, dim=last)[places]
    energy = patch.square().sum(dim=(2, *last)).view(*ways.shape, *[1] * len(sides))
    norm = (spreads[rows, ways] * energy).sqrt()
    enough = norm > 1e-3 * float(np.prod(inner))
    found = torch.where(enough, product / norm.clamp(min=1e-9), torch.zeros(()))
    best: Array = found.flatten(2).amax(dim=2).clamp(max=1).numpy()
    return best


def _spread(images: torch.Tensor, sides: list[int]) -> torch.Tensor:
    """(B, *places): squared deviations from the mean of each channel, in every box."""
    sums, squares = _box_sums(images, sides), _box_sums(images.square(), sides)
    spread: torch.Tensor = (squares - sums.square() / float(np.prod(sides))).sum(dim=1)
    return spread.clamp(min=0).float()


def _box_sums(image: torch.Tensor, sides: list[int]) -> torch.Tensor:
    """Sums over every box of these sides, (B, C, *places)."""
    total = image.double()
    for axis, side in enumerate(sides, start=2):
        running = torch.nn.functional.pad(total.cumsum(dim=axis).movedim(axis, -1), (1, 0))
        total = (running[..., side:] - running[..., :-side]).movedim(-1, axis)
    return total


def _mirrored(table: Array, grid: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    if not axes:
        return table
    flipped = np.flip(table.reshape(-1, *grid), tuple(axis + 2 for axis in axes))
    return np.ascontiguousarray(flipped.reshape(len(table), -1))
