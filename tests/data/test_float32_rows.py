"""Rows of float32 come back from disk as they were written."""

from __future__ import annotations

import numpy as np
import pytest

from synthcube.data.cache import Float32Rows, append_rows
from synthcube.errors import OutputError


def test_rows_are_read_in_the_order_that_is_wanted(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    path = tmp_path / "rows.f32"
    with append_rows(path) as append:
        for start in (0, 2, 4):
            append(values[start : start + 2])
    rows = Float32Rows(path, (2, 3))
    assert np.array_equal(rows.read([4, 0, 4]), values[[4, 0, 4]])
    assert np.array_equal(rows.mapped, values)
    assert rows.read([]).shape == (0, 2, 3)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "nowhere" / "rows.f32"
    with pytest.raises(OutputError, match=r"Cannot write .*rows\.f32"), append_rows(path):
        pass
