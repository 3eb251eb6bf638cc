from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from synthcube.data.pictures import GAP, MIN_TILE, PLANES, grid, plane_of, save_grid
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
    ("num", "columns", "shape"), [(9, None, (3, 3)), (2, 5, (1, 2)), (3, 1, (3, 1))]
)
def test_columns(num: int, columns: int | None, shape: tuple[int, int]) -> None:
    picture = shown([torch.zeros(1, 96, 96)] * num, columns)
    assert tuple((side + GAP) // (96 + GAP) for side in picture.shape[:2]) == shape


def test_images_of_different_sizes() -> None:
    picture = shown([torch.zeros(1, 96, 96), torch.zeros(1, 120, 130)], 2)
    assert picture.shape == (130, 240 + GAP, 3)


def test_planes_of_a_volume() -> None:
    volume = torch.zeros(1, 96, 100, 98)
    volume[:, 90:, :, :] = 1  # left of the patient: right in coronal and axial
    volume[:, :, 90:, 0:48] = -1  # front, lower half
    volume[0, 0, 0, 97] = 1
    tile = shown([volume])
    assert tile.shape[0] == 100
    # widths: 100 * 100/98, 96 * 100/98 and 96 * 100/100, a pixel between them
    sagittal, coronal, axial = tile[:, :102], tile[:, 103:201], tile[:, 202:]
    assert sagittal[99, 100].tolist() == [0] * 3  # front right, down
    assert tuple(sagittal[0, 100]) == tuple(sagittal[99, 0]) == GREY
    assert coronal[50, 96].tolist() == [255] * 3
    assert tuple(coronal[50, 1]) == GREY
    assert axial[99, -1].tolist() == [255] * 3
    assert tuple(axial[99, 0]) == GREY


def test_front_is_up_in_the_axial_plane() -> None:
    volume = torch.zeros(1, 96, 96, 96)
    volume[:, :, 90:] = 1
    axial = shown([volume])[:, -96:]
    assert axial[0, 48].tolist() == [255] * 3
    assert tuple(axial[-1, 48]) == GREY


def test_anisotropic_volume_keeps_its_proportions() -> None:
    tile = shown([torch.zeros(1, 100, 100, 20)], spacing_mm=(1, 1, 5))
    assert tile.shape == (100, 3 * 100 + 2, 3)
    assert shown([torch.zeros(1, 10, 10, 2)], spacing_mm=(1, 1, 5)).shape == (100, 302, 3)
    wide = shown([torch.zeros(2, 100, 200, 100)])
    assert wide.shape == (200, 2 * (400 + 200 + 100) + 5, 3)


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
    assert tuple(shown([volume])[0, 0]) == MAGENTA


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
    save_grid(tmp_path / "a.png", images, 2, raster=False, spacing_mm=(1, 1, 1))
    with PIL.Image.open(tmp_path / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), shown(images, 2))
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OutputError, match="Cannot write"):
        save_grid(tmp_path / "no" / "a.png", images)


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
    with pytest.raises(ImageError, match="plane is 'z': use sagittal, coronal, axial"):
        plane_of(image, "z")
