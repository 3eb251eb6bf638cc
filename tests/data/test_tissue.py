"""The tissue of a slide's thumbnail."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from skimage.filters import threshold_otsu

from synthcube.data.tissue import otsu, tissue_mask, tissue_shares

GLASS, EOSIN, HEMATOXYLIN = (243, 242, 244), (224, 150, 190), (120, 80, 160)


def painted(*areas: tuple[slice, slice, tuple[int, int, int]]) -> PIL.Image.Image:
    """Glass with a little noise, and areas of a colour."""
    pixels = np.empty((200, 300, 3), np.int16)
    pixels[:] = GLASS
    for rows, columns, colour in areas:
        pixels[rows, columns] = colour
    pixels += np.random.default_rng(0).integers(-3, 4, pixels.shape, dtype=np.int16)
    return PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_the_threshold_is_that_of_scikit_image() -> None:
    generator = np.random.default_rng(1)
    for place in (40, 90, 200):
        values = np.concatenate([generator.normal(12, 4, 5000), generator.normal(place, 15, 3000)])
        values = values.clip(0, 255).astype(np.uint8)
        assert otsu(values) == pytest.approx(threshold_otsu(values), abs=1)


@pytest.mark.parametrize("colour", [EOSIN, HEMATOXYLIN, (150, 100, 60)], ids=["H", "E", "DAB"])
def test_stained_tissue_is_found_where_it_is(colour: tuple[int, int, int]) -> None:
    mask = tissue_mask(painted((slice(50, 150), slice(100, 220), colour)))
    expected = np.zeros((200, 300), bool)
    expected[50:150, 100:220] = True
    assert (mask != expected).mean() < 0.01


def test_glass_alone_is_no_tissue_and_tissue_alone_is_all() -> None:
    assert tissue_mask(painted()).mean() < 0.001
    whole = painted(
        (slice(0, 120), slice(None), EOSIN), (slice(120, 200), slice(None), HEMATOXYLIN)
    )
    assert tissue_mask(whole).mean() > 0.999


def test_black_borders_and_pen_marks_are_no_tissue() -> None:
    marked = painted(
        (slice(50, 150), slice(100, 220), EOSIN),
        (slice(0, 20), slice(None), (4, 0, 2)),  # a border
        (slice(160, 170), slice(None), (20, 140, 40)),  # a green pen
        (slice(180, 190), slice(None), (20, 40, 190)),  # a blue pen
        (slice(192, 198), slice(None), (60, 62, 58)),  # a black pen
    )
    mask = tissue_mask(marked)
    assert mask[52:148, 102:218].all()
    for rows in (slice(0, 19), slice(156, 174), slice(176, 191), slice(193, 197)):
        assert not mask[rows].any()


def test_a_picture_of_one_colour_needs_no_threshold() -> None:
    assert not tissue_mask(PIL.Image.new("RGB", (8, 8), "black")).any()
    assert not tissue_mask(PIL.Image.new("RGB", (8, 8), "white")).any()
    assert tissue_mask(PIL.Image.new("RGB", (8, 8), EOSIN)).all()


def test_shares_are_the_means_of_the_mask_below_each_patch() -> None:
    mask = np.random.default_rng(2).random((40, 60)) < 0.5
    x, y = np.array([0, 100, 250]), np.array([0, 320])
    shares = tissue_shares(mask, x, y, 80.0, (600, 400))  # ten pixels of the slide for one
    for row, top in enumerate(y // 10):
        for column, left in enumerate(x // 10):
            assert shares[row, column] == mask[top : top + 8, left : left + 8].mean()
