from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from synthcube.data.pictures import (
    GAP,
    LINE,
    MIN_TILE,
    PLANES,
    WRITTEN_TILE,
    ascii_text,
    axial_slices,
    grid,
    plane_of,
    save_animation,
    save_picture,
    tile,
)
from synthcube.errors import ImageError, OutputError

GREY = (128, 128, 128)  # what 0 looks like
MAGENTA = (255, 0, 255)


def shown(*args: object, **kwargs: object) -> np.ndarray:
    return np.asarray(grid(*args, **kwargs))  # type: ignore[arg-type]


def test_raster_is_upright() -> None:
    image = torch.zeros(1, 48, 32)
    image[0, 40:, :8] = 1  # x large = right, y small = top
    tile = shown([image])
    assert tile.shape == (96, 144, 3)
    assert tile[0, -1].tolist() == [255] * 3
    assert tuple(tile[-1, -1]) == tuple(tile[0, 0]) == GREY


def test_nifti_slice_has_y_up() -> None:
    image = torch.zeros(1, 48, 32, 1)
    image[0, 40:, 24:] = -1
    tile = shown([image], raster=False)
    assert tile[0, -1].tolist() == [0] * 3
    assert tuple(tile[-1, -1]) == GREY


def test_colours_and_channels_side_by_side() -> None:
    red = torch.stack([torch.ones(96, 96), -torch.ones(96, 96), -torch.ones(96, 96)])
    assert shown([red]).shape == (96, 96, 3)
    assert (shown([red]) == (255, 0, 0)).all()
    two = shown([red[:2]])
    assert two.shape == (96, 2 * 96 + 1, 3)
    assert (two[:, :96] == 255).all()
    assert (two[:, -96:] == 0).all()
    assert shown([torch.zeros(5, 96, 96)]).shape == (96, 5 * 96 + 4, 3)


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    image = torch.rand(1, 7, 7) * 2 - 1
    tile = shown([image])
    assert tile.shape == (98, 98, 3)
    np.testing.assert_array_equal(tile[::14, ::14], tile[13::14, 13::14])
    np.testing.assert_array_equal(
        tile[::14, ::14, 0], np.rint((image[0].numpy().T + 1) * 127.5).astype("u1")
    )
    assert shown([torch.zeros(1, 200, 150)]).shape == (150, 200, 3)


def test_spacing_of_a_slice() -> None:
    for spacing in ((1, 3), np.array([1, 3, 1])):
        assert shown([torch.zeros(1, 100, 100)], spacing_mm=spacing).shape == (300, 100, 3)


def test_tiles_do_not_touch() -> None:
    images = [torch.full((1, 96, 96), i / 4 - 1) for i in range(8)]
    picture = shown(images, 3)
    assert picture.shape == (3 * 96 + 2 * GAP, 3 * 96 + 2 * GAP, 3)
    for i in range(8):
        top, left = (i // 3) * (96 + GAP), (i % 3) * (96 + GAP)
        level = round(i / 4 * 127.5)
        assert (abs(picture[top : top + 96, left : left + 96].astype(int) - level) <= 1).all()
    between = picture[:, 96 : 96 + GAP].reshape(-1, 3)
    assert len(np.unique(between, axis=0)) == 1
    assert len(set(between[0].tolist())) > 1  # not a grey that an image could have


@pytest.mark.parametrize(
    ("num", "columns", "shape"),
    [
        (9, None, (3, 3)),
        (12, None, (3, 4)),
        (7, None, (4, 2)),
        (2, None, (1, 2)),
        (2, 5, (1, 2)),
        (3, 1, (3, 1)),
    ],
)
def test_columns(num: int, columns: int | None, shape: tuple[int, int]) -> None:
    picture = shown([torch.zeros(1, 96, 96)] * num, columns)
    assert tuple((side + GAP) // (96 + GAP) for side in picture.shape[:2]) == shape


def test_images_of_different_sizes() -> None:
    picture = shown([torch.zeros(1, 96, 96), torch.zeros(1, 120, 130)], 2)
    assert picture.shape == (130, 240 + GAP, 3)


def planes(picture: np.ndarray) -> np.ndarray:
    """The tiles of one row of volumes, without the names above and the note below."""
    return picture[LINE:-LINE]


def test_planes_of_a_volume() -> None:
    """RAS: x grows to the patient's right, which is on the left of the picture."""
    volume = torch.zeros(1, 96, 100, 98)
    volume[:, 90:, :, :] = 1  # the patient's right
    volume[:, :, 90:, 0:48] = -1  # front, lower half
    tile = planes(shown([volume]))
    assert tile.shape[0] == 100
    # widths: 96, 96 * 100 / 98 and 100 * 100 / 98, a pixel between them
    axial, coronal, sagittal = tile[:, :96], tile[:, 97:195], tile[:, 196:]
    assert tile.shape[1] == 96 + 1 + 98 + 1 + 102
    assert coronal[50, 1].tolist() == axial[99, 1].tolist() == [255] * 3
    assert tuple(coronal[50, 96]) == tuple(axial[99, -1]) == GREY
    assert sagittal[99, 1].tolist() == [0] * 3  # the front is on the left; feet are down
    assert tuple(sagittal[0, 1]) == tuple(sagittal[99, -1]) == GREY


def test_front_is_up_in_the_axial_plane() -> None:
    volume = torch.zeros(1, 96, 96, 96)
    volume[:, :, 90:] = 1
    axial = planes(shown([volume]))[:, :96]
    assert axial[0, 48].tolist() == [255] * 3
    assert tuple(axial[-1, 48]) == GREY


def test_planes_are_the_slices_of_the_volume() -> None:
    volume = torch.rand(2, 5, 6, 7) * 2 - 1
    tile = planes(shown([volume]))
    levels = np.rint((volume.numpy() + 1) * 127.5).astype("u1")
    left = 0
    for channel in levels:
        for cut in (channel[:, :, 3], channel[:, 3], channel[2]):
            across, down = cut.shape
            width = round(tile.shape[0] * across / down)
            part = tile[:, left : left + width, 0]
            places = (np.arange(len(part)) + 0.5) * down / len(part)
            across_places = (np.arange(width) + 0.5) * across / width
            expected = cut.T[::-1, ::-1][np.ix_(places.astype(int), across_places.astype(int))]
            np.testing.assert_array_equal(part, expected)
            left += width + 1
    assert left == tile.shape[1] + 1


def test_anisotropic_volume_keeps_its_proportions() -> None:
    tile = planes(shown([torch.zeros(1, 100, 100, 20)], spacing_mm=(1, 1, 5)))
    assert tile.shape == (100, 3 * 100 + 2, 3)
    assert planes(shown([torch.zeros(1, 10, 10, 2)], spacing_mm=(1, 1, 5))).shape == (100, 302, 3)
    wide = planes(shown([torch.zeros(2, 100, 200, 100)]))
    assert wide.shape == (200, 2 * (100 + 200 + 400) + 5, 3)


def has_text(part: np.ndarray) -> bool:
    return bool((part.min(axis=-1) > 200).any())


def test_captions_stand_below_their_tiles_alone() -> None:
    texts = ["Hand\nseed 9223372036854775807", "HeadCT", "Ödem " + "x" * 80, ""]
    picture = shown([torch.full((1, 64, 64), -1.0)] * 4, 2, captions=texts)
    side = WRITTEN_TILE
    lines = (len(picture) - 2 * side - GAP) // 2 // LINE
    assert picture.shape == (2 * (side + lines * LINE) + GAP, 2 * side + GAP, 3)
    assert lines > 3, "eighty letters are broken into lines"
    pitch = side + lines * LINE + GAP
    for number, text in enumerate(texts):
        top, left = number // 2 * pitch, number % 2 * (side + GAP)
        assert (picture[top : top + side, left : left + side] == 0).all(), "no text on an image"
        below = picture[top + side : top + pitch - GAP, left : left + side]
        assert has_text(below) == bool(text)
        assert not has_text(below[:, -1:]), "nothing is cut off at the right"
    between = picture[:, side : side + GAP]
    assert not has_text(between)
    first = picture[side : side + lines * LINE, :side]
    assert [has_text(first[n * LINE : (n + 1) * LINE]) for n in range(4)] == [True] * 3 + [False]


def test_headings_title_and_the_names_of_planes() -> None:
    flat = [torch.zeros(1, 96, 96)] * 6
    picture = shown(flat, headings=["Source", "Generated", "Truth"], title="Epoch 3")
    assert picture.shape == (2 * LINE + 2 * 96 + GAP, 3 * 96 + 2 * GAP, 3)
    assert has_text(picture[:LINE])
    for column in range(3):
        left = column * (96 + GAP)
        assert has_text(picture[LINE : 2 * LINE, left : left + 96])
        assert (picture[2 * LINE :][:96, left : left + 96] == GREY).all()
    volumes = shown([torch.zeros(1, 96, 96, 96)] * 2, 1)
    assert volumes.shape == (2 * LINE + 2 * 96 + GAP, 3 * 96 + 2, 3)
    for start in (0, 97, 194):
        assert has_text(volumes[:LINE, start : start + 60])
    assert has_text(volumes[-LINE:]), "the note on the convention"


def test_text_that_the_font_has_not() -> None:
    assert ascii_text("Ödem µ é") == "Odem ? e"
    assert ascii_text("脑") == "?"


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_has_every_frame(tmp_path: Path, channels: int) -> None:
    steps = [torch.full((channels, 96, 96), level) for level in (-1.0, -0.2, 0.5)]
    if channels == 3:
        steps = [step * torch.tensor([1.0, -1.0, 0.3])[:, None, None] for step in steps]
    frames = [[tile(step, least=192)] for step in steps]
    save_animation(tmp_path / "a.gif", frames, ["step 0 of 2", "step 1 of 2", "step 2 of 2"])
    with PIL.Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (3, 0)
        durations = []
        for number, frame in enumerate(frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
            shown = np.asarray(gif.convert("RGB"))
            error = np.abs(shown[LINE : LINE + 192].astype(int) - frame[0].pixels)
            assert error.max() <= (0 if channels == 1 else 4)
            assert has_text(shown[:LINE])
    assert durations[-1] > durations[0]


def test_slices_go_from_the_feet_to_the_head() -> None:
    volume = torch.rand(1, 128, 140, 4) * 2 - 1
    cuts = axial_slices(volume, range(4), spacing_mm=(1, 1, 5))
    levels = np.rint((volume[0].numpy() + 1) * 127.5).astype("u1")
    assert len(cuts) == 4
    for z, cut in enumerate(cuts):
        np.testing.assert_array_equal(cut.pixels[..., 0], levels[:, :, z].T[::-1, ::-1])
    assert axial_slices(volume, [3], spacing_mm=(2, 1, 5))[0].pixels.shape == (140, 256, 3)


def test_values_that_are_not_numbers() -> None:
    image = torch.zeros(1, 96, 96)
    image[0, 0, 0], image[0, 1, 0], image[0, 2, 0], image[0, 3, 0] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        9,
    )
    row = shown([image])[0]
    assert [tuple(pixel) for pixel in row[:5].tolist()] == [
        *(MAGENTA, (255,) * 3, (0,) * 3, (255,) * 3, GREY)
    ]
    colour = torch.zeros(3, 96, 96)
    colour[1, 0, 0] = torch.nan
    assert tuple(shown([colour])[0, 0]) == MAGENTA
    volume = torch.full((1, 8, 8, 8), torch.nan)
    assert tuple(planes(shown([volume]))[0, 0]) == MAGENTA


def test_tensors_of_a_running_model() -> None:
    image = torch.zeros(1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    assert shown([image]).shape == (MIN_TILE, MIN_TILE, 3)


@pytest.mark.parametrize("shape", [(8, 8), (1, 2, 8, 8, 8), (1, 0, 8)])
def test_what_cannot_be_shown(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match=r"An image of shape .* cannot be shown"):
        grid([torch.zeros(shape)])


def test_no_images() -> None:
    with pytest.raises(ImageError, match="no image to show"):
        grid([])


def test_save(tmp_path: Path) -> None:
    images = [torch.zeros(1, 8, 8)] * 4
    save_picture(tmp_path / "a.png", grid(images, 2, raster=False))
    with PIL.Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), shown(images, 2))
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputError, match="Cannot write"):
        save_picture(tmp_path / "no" / "a.png", grid(images))


def test_a_plane_has_a_pixel_for_each_voxel_head_up() -> None:
    volume = torch.full((2, 4, 6, 8), -1.0)
    volume[0, :, :, 7] = 1  # the top of the head
    volume[1, :, 5] = 1  # the front
    coronal = np.asarray(plane_of(volume, "coronal", spacing_mm=(1, 1, 2)))
    assert coronal.shape == (16, 4 + 1 + 4), "twice as high as wide voxels; channels side by side"
    assert (coronal[:2, :4] == 255).all()
    assert (coronal[2:, :4] == 0).all()
    axial = np.asarray(plane_of(volume, "axial"))
    assert axial.shape == (6, 9)
    assert (axial[0, 5:] == 255).all(), "the front is up"
    assert (axial[1:, 5:] == 0).all()


def test_a_flat_image_has_no_other_plane() -> None:
    image = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    for plane in PLANES:
        shown = np.asarray(plane_of(image, plane, spacing_mm=(1, 1, 5)))
        assert shown.shape == (4, 3)
        assert shown[-1, 0] == 0, "y is up"
        assert shown[0, -1] == 255
    with pytest.raises(ImageError, match="plane is 'z': use axial, coronal, sagittal"):
        plane_of(image, "z")
