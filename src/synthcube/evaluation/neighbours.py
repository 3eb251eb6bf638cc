"""Exact nearest neighbours between two tables, in pieces of bounded size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_PIECE_BYTES = 1 << 26  # of rows held at once, however long they are
_SPARE = 8  # candidates beyond k whose distances are computed once more


def nearest(
    queries: Array,
    references: Array,
    k: int,
    *,
    chunk: int = 2048,
    exclude_self: bool = False,
    owners: tuple[Ints, Ints] | None = None,
) -> tuple[Array, Ints]:
    """The `k` rows of `references` nearest to each row of `queries`, by Euclidean distance.

    Candidates are found by |q|^2 + |r|^2 - 2qr in float32 around the mean of the references; the
    distances to them are then taken from the differences, so that a copy has distance 0 and not
    a rounding error. Neighbours that are equally far to about 1e-3 of the spread of the tables
    may stand for each other.

    Args:
        queries: (N, D), float32; may be a memory map.
        references: (M, D), float32; may be a memory map.
        chunk: rows of either table taken at once at most; fewer where rows are long.
        exclude_self: both are the same table, and row i is no neighbour of row i.
        owners: (N,) and (M,): rows of the same owner are no neighbours.

    Returns:
        distances (N, k), rising, and indices (N, k) into `references`; where owners leave fewer
        than k rows, inf and -1.

    Raises:
        ValueError: k is not between 1 and the rows there are.
    """
    available = len(references) - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"k={k}: it must be between 1 and the {available} rows to choose from")
    rows = max(16, min(chunk, _PIECE_BYTES // (4 * max(1, queries.shape[1]))))
    centre = _mean(references, rows)
    distances = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), rows):
        piece = slice(start, start + rows)
        owned = None if owners is None else (owners[0][piece], owners[1])
        count = min(k + _SPARE, available)
        block = np.asarray(queries[piece], np.float32)
        first = start if exclude_self else None
        found = _candidates(block, references, count, rows, centre, first, owned)
        distances[piece], indices[piece] = _exact(block, references, found, k)
    return distances, indices


def _mean(table: Array, rows: int) -> Array:
    total = np.zeros(table.shape[1], np.float64)
    for start in range(0, len(table), rows):
        total += table[start : start + rows].sum(axis=0, dtype=np.float64)
    return (total / len(table)).astype(np.float32)


def _candidates(
    block: Array, references: Array, count: int, rows: int, centre: Array,
    first: int | None, owners: tuple[Ints, Ints] | None,
) -> Ints:  # fmt: skip
    """(n, count) indices, -1 for none. `first`: the row of block[0], which is not its own match."""
    q = torch.from_numpy(block - centre)
    squares = q.square().sum(dim=1, keepdim=True)
    best = torch.empty(len(q), 0)
    places = torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(references), rows):
        r = torch.from_numpy(np.asarray(references[start : start + rows], np.float32) - centre)
        d = torch.addmm(squares + r.square().sum(dim=1), q, r.T, alpha=-2)  # (n, rows)
        if first is not None:
            _barred(d, first - start)
        if owners is not None:
            of_r = owners[1][start : start + rows]
            d[torch.from_numpy(owners[0][:, None] == of_r[None, :])] = torch.inf
        near, where = d.topk(min(count, d.shape[1]), dim=1, largest=False)
        best = torch.cat([best, near], dim=1)
        places = torch.cat([places, where + start], dim=1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1, largest=False)
        places = places.gather(1, kept)
    places[best == torch.inf] = -1
    found: Ints = places.numpy()
    return found


def _barred(d: torch.Tensor, offset: int) -> None:
    """Row i is no match of itself: column i + offset, where the piece has it."""
    rows = torch.arange(len(d))
    rows = rows[(rows + offset >= 0) & (rows + offset < d.shape[1])]
    d[rows, rows + offset] = torch.inf


def _exact(block: Array, references: Array, found: Ints, k: int) -> tuple[Array, Ints]:
    distances = np.full(found.shape, np.inf, np.float32)
    for place in range(found.shape[1]):
        there = found[:, place] >= 0
        difference = block[there] - references[found[there, place]]
        distances[there, place] = _norms(difference)
    # of equal distances the lower index, so that the answer does not hang on the pieces
    order: Any = np.lexsort((found, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(found, order, 1)


def _norms(rows: Array) -> Array:
    norms: Array = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)).astype(np.float32)
    return norms
