"""Types of arrays, and arrays of float32 on disk that are read a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthcube.storage import storage_errors

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Float32Rows:
    """An array (N, *row_shape) in a file that holds nothing else."""

    path: Path
    row_shape: tuple[int, ...]

    def read(self, rows: Sequence[int]) -> Array:
        """A copy of those rows, (len(rows), *row_shape)."""
        length = math.prod(self.row_shape)
        values = np.empty((len(rows), *self.row_shape), np.float32)
        with self.path.open("rb", buffering=0) as file:
            for place, row in enumerate(rows):
                file.seek(int(row) * length * 4)
                values[place] = np.fromfile(file, np.float32, length).reshape(self.row_shape)
        return values

    def mapped(self) -> Array:
        """The whole array, as a memory map."""
        return np.memmap(self.path, np.float32, "r").reshape(-1, *self.row_shape)


@contextmanager
def append_rows(path: Path) -> Iterator[Callable[[Array], None]]:
    """Yield a function that appends an array to a new file at `path`.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    with storage_errors(path), path.open("wb") as file:

        def append(rows: Array) -> None:
            file.write(rows.tobytes())

        yield append
