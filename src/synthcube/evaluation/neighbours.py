"""Exact nearest neighbours between two tables, in blocks of bounded size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from synthcube.evaluation.arrays import Array, Ints

_BLOCK_BYTES = 1 << 26  # of rows held at once, however long they are
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
        exclude_self: both are the same table, and row i is not a neighbour of row i.
        owners: (N,) and (M,): rows of the same owner are not neighbours.

    Returns:
        distances (N, k), rising, and indices (N, k) into `references`; where owners leave fewer
        than k rows, inf and -1.

    Raises:
        ValueError: k is not between 1 and the number of rows.
    """
    available = len(references) - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"k={k}: it must be between 1 and the {available} rows to choose from")
    rows = max(16, min(chunk, _BLOCK_BYTES // (4 * max(1, queries.shape[1]))))
    centre = _mean(references, rows)
    distances = np.empty((len(queries), k), np.float32)
    indices = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        block_owners = None if owners is None else (owners[0][block], owners[1])
        values = np.asarray(queries[block], np.float32)
        first = start if exclude_self else None
        count = min(k + _SPARE, available)
        candidates = _candidates(values, references, count, rows, centre, first, block_owners)
        distances[block], indices[block] = _exact(values, references, candidates, k)
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
    """(n, count) indices, -1 for none. `first`: row of block[0], not a match of itself."""
    q = torch.from_numpy(block - centre)
    squares = q.square().sum(dim=1, keepdim=True)
    best = torch.empty(len(q), 0)
    places = torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(references), rows):
        r = torch.from_numpy(np.asarray(references[start : start + rows], np.float32) - centre)
        d = torch.addmm(squares + r.square().sum(dim=1), q, r.T, alpha=-2)  # (n, rows)
        if first is not None:
            itself = torch.arange(len(d))
            itself = itself[(itself + first >= start) & (itself + first - start < d.shape[1])]
            d[itself, itself + first - start] = torch.inf
        if owners is not None:
            r_owners = owners[1][start : start + rows]
            d[torch.from_numpy(owners[0][:, None] == r_owners[None, :])] = torch.inf
        near, where = d.topk(min(count, d.shape[1]), dim=1, largest=False)
        best = torch.cat([best, near], dim=1)
        places = torch.cat([places, where + start], dim=1)
        best, kept = best.topk(min(count, best.shape[1]), dim=1, largest=False)
        places = places.gather(1, kept)
    places[best == torch.inf] = -1
    indices: Ints = places.numpy()
    return indices


def _exact(block: Array, references: Array, candidates: Ints, k: int) -> tuple[Array, Ints]:
    distances = np.full(candidates.shape, np.inf, np.float32)
    for column in range(candidates.shape[1]):
        valid = candidates[:, column] >= 0
        difference = block[valid] - references[candidates[valid, column]]
        squares = np.einsum("ij,ij->i", difference, difference, dtype=np.float64)
        distances[valid, column] = np.sqrt(squares).astype(np.float32)
    # of equal distances the lower index, so that the answer does not depend on the blocks
    order: Any = np.lexsort((candidates, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(candidates, order, 1)
