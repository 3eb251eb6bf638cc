"""Nearest neighbours in pieces are those of the whole table of distances."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from synthcube.evaluation.neighbours import nearest

RNG = np.random.default_rng(0)


def table(rows: int, length: int = 24, offset: float = 0.0) -> np.ndarray:
    return (RNG.standard_normal((rows, length)) + offset).astype(np.float32)


@pytest.mark.parametrize("chunk", [16, 31, 4096])
def test_nearest_are_those_of_all_distances(chunk):
    queries, references = table(70), table(50)
    distances, indices = nearest(queries, references, 5, chunk=chunk)
    whole = cdist(queries.astype(np.float64), references.astype(np.float64))
    assert np.array_equal(indices, np.argsort(whole, axis=1)[:, :5])
    assert np.allclose(distances, np.sort(whole, axis=1)[:, :5], rtol=1e-6)


@pytest.mark.parametrize("chunk", [16, 4096])
def test_a_row_is_not_its_own_neighbour(chunk):
    rows = table(80)
    rows[7] = rows[61]
    distances, indices = nearest(rows, rows, 3, chunk=chunk, exclude_self=True)
    whole = cdist(rows, rows)
    np.fill_diagonal(whole, np.inf)
    assert np.array_equal(indices[:, 0], whole.argmin(axis=1))
    assert indices[7, 0] == 61
    assert distances[7, 0] == 0
    assert indices[61, 0] == 7


def test_rows_of_the_same_owner_are_no_neighbours():
    rows = table(60)
    owners = np.repeat(np.arange(20), 3)
    distances, indices = nearest(rows, rows, 4, chunk=16, owners=(owners, owners))
    whole = cdist(rows, rows)
    whole[owners[:, None] == owners] = np.inf
    assert np.array_equal(indices, np.argsort(whole, axis=1)[:, :4])
    assert np.isfinite(distances).all()


def test_where_owners_leave_too_few_there_is_no_neighbour():
    rows, owners = table(5), np.array([0, 0, 0, 0, 1])
    distances, indices = nearest(rows, rows, 3, owners=(owners, owners))
    assert indices[0].tolist() == [4, -1, -1]
    assert np.isfinite(distances[0, 0])
    assert np.isinf(distances[0, 1:]).all()


def test_a_copy_far_from_the_origin_has_distance_zero():
    """The squares of such numbers differ by less than float32 can tell."""
    references = table(200, offset=1e4)
    queries = references[[5, 150]].copy()
    queries[1, 0] += 0.25
    distances, indices = nearest(queries, references, 1)
    assert indices[:, 0].tolist() == [5, 150]
    assert distances[:, 0].tolist() == [0, 0.25]


def test_equal_distances_go_by_index():
    references = np.zeros((40, 8), np.float32)
    _, indices = nearest(np.ones((1, 8), np.float32), references[:9], 9)
    assert indices.tolist() == [list(range(9))]


@pytest.mark.parametrize(("k", "exclude_self"), [(0, False), (6, False), (5, True)])
def test_more_neighbours_than_rows_are_refused(k, exclude_self):
    rows = table(5)
    with pytest.raises(ValueError, match=f"k={k}"):
        nearest(rows, rows, k, exclude_self=exclude_self)


def test_tables_may_lie_on_disk(tmp_path):
    rows = table(300)
    rows.tofile(tmp_path / "t.f32")
    mapped = np.memmap(tmp_path / "t.f32", np.float32, "r", shape=rows.shape)
    assert np.array_equal(nearest(mapped, mapped, 2)[1], nearest(rows, rows, 2)[1])
