"""Batches of a private training: subjects join each step by chance, as its accountant assumes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


class SubjectBatches:
    """Batches of (epoch, row) pairs that each subject joins with the same probability.

    A batch has `batch_size` subjects on average, at most one image of each, and may be empty. The
    choice is the operating system's, never the seed's: who knows which subjects were drawn could
    subtract the noise that hides them. It is neither recorded nor repeated.

    Args:
        subjects: rows of each training subject.

    Attributes:
        start: batches of this epoch that are skipped because they were trained on before.
    """

    def __init__(self, subjects: Sequence[Sequence[int]], batch_size: int) -> None:
        self.subjects = subjects
        self.threshold = batch_size / len(subjects)
        self.number = steps_per_epoch(len(subjects), batch_size)
        self.epoch = 0
        self.start = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for _ in range(self.start, self.number):
            joins = uniform(len(self.subjects)) < self.threshold
            chosen = np.flatnonzero(joins).tolist()
            yield [(self.epoch, secrets.choice(self.subjects[place])) for place in chosen]


def steps_per_epoch(subjects: int, batch_size: int) -> int:
    """Steps of an epoch, in which each subject joins about once."""
    return max(1, subjects // batch_size)


def by_subject(names: Sequence[str], rows: Sequence[int]) -> list[list[int]]:
    """Those rows, grouped by subject; `names` has the subject of every row."""
    grouped: dict[str, list[int]] = {}
    for row in rows:
        grouped.setdefault(names[row], []).append(row)
    return list(grouped.values())


def uniform(number: int) -> npt.NDArray[np.float64]:
    """Secret random numbers in [0, 1), with all the bits of a float64."""
    words = np.frombuffer(secrets.token_bytes(8 * number), np.uint64)
    numbers: npt.NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers
