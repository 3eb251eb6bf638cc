"""Equal samples of predictions and of real images, the latter in halves of different subjects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from synthcube.evaluation.images import ImageSet
from synthcube.runtime import derived_seed

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Places of m images each."""

    predictions: Ints
    """(m,), of no subject that is in `half`."""
    half: Ints
    """(m,), labels that both others are compared with."""
    other: Ints
    """(m,), labels of other subjects: what real images come to."""


def joint_subjects(predictions: ImageSet, labels: ImageSet) -> tuple[Ints, Ints]:
    """(N,) and (M,): numbers of subjects, the same where both sets have the same."""
    numbers: dict[str, int] = {}
    both = [
        np.array([numbers.setdefault(row.subject, len(numbers)) for row in images.rows], np.int64)
        for images in (predictions, labels)
    ]
    return both[0], both[1]


def draw_splits(subjects: tuple[Ints, Ints], number: int, seed: int) -> list[Split]:
    """`number` random splits, all of the same m: as many as every one of them allows.

    A prediction that was made from a subject (a translation) is nearer to that subject's images
    than another real image could be, so it stands on the side of the other half.

    Args:
        subjects: of predictions and labels, as :func:`joint_subjects` numbers them.
    """
    rng = np.random.default_rng(derived_seed(seed, "fidelity", "splits"))
    drawn = []
    for _ in range(number):
        half, other = _halves(subjects[1], rng)
        allowed = np.flatnonzero(~np.isin(subjects[0], subjects[1][half]))
        drawn.append((allowed, half, other))
    m = min(len(part) for parts in drawn for part in parts)
    return [Split(*(_sample(part, m, rng) for part in parts)) for parts in drawn]


def _halves(subjects: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Places of two halves: subjects at random, but the larger ones first, each to the side that
    has fewer images."""
    names, of_image = np.unique(subjects, return_inverse=True)
    sizes = np.bincount(of_image)
    order = rng.permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    side = np.zeros(len(names), np.int64)
    held = [0, 0]
    for subject in order:
        fewer = int(rng.integers(2)) if held[0] == held[1] else int(held[1] < held[0])
        side[subject] = fewer
        held[fewer] += int(sizes[subject])
    return np.flatnonzero(side[of_image] == 0), np.flatnonzero(side[of_image] == 1)


def _sample(images: Ints, number: int, rng: np.random.Generator) -> Ints:
    chosen: Ints = np.sort(rng.choice(images, number, replace=False))
    return chosen
