"""Affines of generated images."""

from __future__ import annotations

import numpy as np
import pytest

from synthcube.data.geometry import centred_affine, generated_affine, spacing_of

OBLIQUE = np.array([[0, -2, 0, 4], [1.5, 0, 0, -5], [0, 0, 3, 6], [0, 0, 0, 1.0]])


def test_spacing_is_the_length_of_each_axis() -> None:
    assert spacing_of(OBLIQUE).tolist() == [1.5, 2, 3]
    assert spacing_of(np.stack([OBLIQUE, np.eye(4)])).tolist() == [[1.5, 2, 3], [1, 1, 1]]


@pytest.mark.parametrize(
    ("spacing", "size", "origin"),
    [((1, 2, 3), (3, 5, 7), [-1, -4, -9]), ((2,), (4, 3), [-3, -1, 0])],
)
def test_the_centre_of_the_voxels_is_the_origin(
    spacing: tuple[float, ...], size: tuple[int, ...], origin: list[float]
) -> None:
    affine = centred_affine(spacing, size)
    assert affine[:3, 3].tolist() == origin
    assert spacing_of(affine).tolist() == [*spacing, 1, 1, 1][:3]


def test_a_shared_affine_is_kept_and_others_give_a_centred_one_of_median_spacing() -> None:
    assert np.array_equal(generated_affine(np.stack([OBLIQUE] * 3), (4, 4, 4)), OBLIQUE)
    affines = np.stack([np.diag([side, 1, 1, 1.0]) for side in (1, 2, 9)])
    assert np.array_equal(
        generated_affine(affines, (3, 3, 3)), centred_affine((2, 1, 1), (3, 3, 3))
    )
