"""The images of each step: every row once an epoch, or subjects by chance if it is private."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from synthcube.environment import derived_seed


def evenly_spaced(rows: Sequence[int], number: int) -> list[int]:
    """At most `number` of `rows`, spread over all of them so that sorted classes all appear."""
    number = min(number, len(rows))
    return [rows[i * len(rows) // number] for i in range(number)]


class _Batches:
    """Batches of one epoch after the other.

    Attributes:
        start: batches of this epoch that are skipped because they were trained on before.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.start = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0


class EpochBatches(_Batches):
    """Batches of (epoch, row) pairs whose order depends on the seed and the epoch alone.

    Args:
        batch_size: rows of a batch over all processes, each of which takes its share.
        place: rank of this process, and how many share each batch.
    """

    def __init__(
        self,
        rows: Sequence[int],
        batch_size: int,
        seed: int,
        place: tuple[int, int] = (0, 1),
        *,
        shuffle: bool,
    ) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)
        self.rank, self.processes = place
        fitting = min(batch_size, len(rows))
        self.batch_size = max(1, fitting - fitting % self.processes)
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + int(not self.shuffle and rest >= self.processes) or min(1, len(self.rows))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = self.rows
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", self.epoch))
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for number in range(self.start, len(self)):
            # Every process needs its share: a rest too small for that joins the last batch.
            takes_rest = not self.shuffle and number + 1 == len(self)
            start, size = number * self.batch_size, self.batch_size
            batch = rows[start:] if takes_rest else rows[start : start + size]
            share = batch[self.rank :: self.processes] if len(batch) >= self.processes else batch
            yield [(self.epoch, row) for row in share.tolist()]


class SubjectBatches(_Batches):
    """Batches of (epoch, row) pairs that each subject joins with the same probability.

    A batch has `batch_size` subjects on average, at most one image of each, and may be empty. The
    choice is the operating system's, never the seed's: who knows which subjects were drawn could
    subtract the noise that hides them. It is neither recorded nor repeated.

    Args:
        subjects: rows of each training subject.
    """

    def __init__(self, subjects: Sequence[Sequence[int]], batch_size: int) -> None:
        super().__init__()
        self.subjects = subjects
        self.threshold = batch_size / len(subjects)
        self.number = steps_per_epoch(len(subjects), batch_size)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for _ in range(self.start, self.number):
            chosen = np.flatnonzero(uniform(len(self.subjects)) < self.threshold).tolist()
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
