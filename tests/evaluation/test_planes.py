"""Images as a report shows them are the right way up, and in [0, 1]."""

from __future__ import annotations

import numpy as np

from synthcube.evaluation.planes import plane


def marked(shape: tuple[int, ...], *places: tuple[int, ...]) -> np.ndarray:
    image = np.zeros(shape, np.float32)
    for place in places:
        image[place] = 10
    return image


def test_pictures_run_down_and_others_up() -> None:
    image = marked((1, 4, 3), (0, 3, 0))  # x = 3, y = 0
    shown = plane(image, [(0, 10)], raster=True)
    assert shown.shape == (3, 4)
    assert shown[0, 3] == 1
    assert plane(image, [(0, 10)], raster=False)[2, 3] == 1


def test_three_channels_are_colours_and_two_stand_side_by_side() -> None:
    assert plane(np.zeros((3, 4, 5)), [(0, 1)] * 3, raster=True).shape == (5, 4, 3)
    image = marked((2, 4, 5), (1, 0, 0))
    shown = plane(image, [(0, 5), (0, 20)], raster=True)
    assert shown.shape == (5, 8)
    assert shown[0, 4] == 0.5  # in the range of its own channel


def test_a_volume_is_three_slices_with_the_head_up() -> None:
    volume = marked((1, 4, 6, 8), (0, 2, 3, 7))  # in the middle of x and y, at the top of z
    shown = plane(volume, [(0, 10)], raster=False)
    assert shown.shape == (8, 6 + 4 + 4)
    assert [tuple(place) for place in np.argwhere(shown)] == [(0, 3), (0, 6 + 2)]


def test_what_is_beyond_the_range_is_clipped_and_a_constant_is_black() -> None:
    assert plane(np.full((1, 2, 2), 99.0), [(0, 10)], raster=True).max() == 1
    assert plane(np.full((1, 2, 2), 5.0), [(5, 5)], raster=True).max() == 0
