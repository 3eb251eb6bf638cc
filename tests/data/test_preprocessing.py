from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from synthcube import plugins
from synthcube.data.images import Image
from synthcube.data.preprocessing import DataConfig, Prepared, Preprocessing, to_intensities
from synthcube.errors import ImageError

RANDOM = np.random.default_rng(0)
ANISOTROPIC = np.diag([1, 1.5, 3, 1.0])
ANISOTROPIC[:3, 3] = [-5, 3, 7]
_C, _S = np.cos(0.4), np.sin(0.4)
OBLIQUE = np.array([[_C, -_S, 0, 4], [_S, _C, 0, -5], [0, 0, -1, 6], [0, 0, 0, 1]]) @ np.diag(
    [0.8, 1.2, 3, 1]
)
FLIPPED = np.array([[-1, 0, 0, 50], [0, 2, 0, 3], [0, 0, -4, 9], [0, 0, 0, 1.0]])
SAGITTAL = np.array([[0, 0, 3, -20], [-1, 0, 0, 30], [0, -1, 0, 40], [0, 0, 0, 1.0]])
PICTURE = np.diag([-1.0, -1, 1, 1])


def volume(data: Any, affine: np.ndarray = ANISOTROPIC) -> Image:
    """A NIfTI image of (C, X, Y, Z) or (X, Y, Z)."""
    tensor = torch.as_tensor(np.asarray(data, dtype=np.float32))
    return Image(tensor[None] if tensor.ndim == 3 else tensor, affine, "nii.gz", False, False)


def picture(data: Any) -> Image:
    """An 8-bit picture of (X, Y) or (C, X, Y)."""
    tensor = torch.as_tensor(np.asarray(data, dtype=np.float32))[..., None]
    return Image(tensor[None] if tensor.ndim == 3 else tensor, PICTURE, "png", True, True)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.normal(100, 20, shape).astype(np.float32)


def prepared(image: Image, **settings: Any) -> Prepared:
    return Preprocessing(DataConfig(**settings))(image)


def spatial(result: Prepared) -> torch.Tensor:
    """(C, X, Y, Z), whatever the rank."""
    return result.tensor if result.tensor.ndim == 4 else result.tensor[..., None]


def positions(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """World position of every voxel, (3, X, Y, Z)."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    return np.einsum("ij,j...->i...", affine[:3, :3], index) + affine[:3, 3].reshape(3, 1, 1, 1)


def corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """World positions of the eight outer corners of the voxel grid."""
    ends = itertools.product(*((-0.5, side - 0.5) for side in shape))
    return np.array([affine[:3, :3] @ end + affine[:3, 3] for end in ends])


def blob(shape: tuple[int, ...], affine: np.ndarray, centre: np.ndarray, sigma: float) -> Any:
    offset = positions(shape, affine) - np.reshape(centre, (3, 1, 1, 1))
    return np.exp(-(offset**2).sum(axis=0) / (2 * sigma**2))


def centroid(result: Prepared) -> np.ndarray:
    """World position of the bright spot."""
    data = spatial(result)[0].double().numpy()
    weights = np.clip((data + 1) / 2 - 0.2, 0, None)
    where = positions(weights.shape, result.affine)
    return np.asarray((where * weights).sum(axis=(1, 2, 3)) / weights.sum())


# -- intensities -------------------------------------------------------------------------------


def test_8_bit_pictures_map_0_to_255_exactly_and_back() -> None:
    values = np.arange(256, dtype=np.float32).reshape(16, 16)
    result = prepared(picture(values))
    assert result.tensor.shape == (1, 16, 16)
    assert result.tensor.dtype == torch.float32
    assert float(result.tensor[0, 0, 0]) == -1.0
    assert float(result.tensor[0, -1, -1]) == 1.0
    np.testing.assert_allclose(result.tensor[0].numpy(), values / 127.5 - 1, atol=1e-6)
    assert result.intensity_range == ((0.0, 255.0),)
    back = to_intensities(result.tensor, result.intensity_range)
    np.testing.assert_array_equal(back.round()[0].numpy(), values)
    np.testing.assert_allclose(back[0].numpy(), values, atol=2e-5)


def test_a_dim_picture_stays_dim() -> None:
    result = prepared(picture(np.arange(100, 116).reshape(4, 4)))
    np.testing.assert_allclose(float(result.tensor.min()), 100 / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(float(result.tensor.max()), 115 / 127.5 - 1, atol=1e-6)


def test_percentiles_are_those_of_each_channel_and_clip() -> None:
    data = np.stack([noise(7, 8, 9), 1000 * noise(7, 8, 9) - 5])
    result = prepared(volume(data, np.eye(4)), percentiles=[2, 95])
    for channel, source, pair in zip(result.tensor, data, result.intensity_range, strict=True):
        low, high = np.percentile(source, [2, 95])
        np.testing.assert_allclose(pair, (low, high), rtol=1e-6)
        expected = np.clip((source - low) / (high - low) * 2 - 1, -1, 1)
        np.testing.assert_allclose(channel.numpy(), expected, atol=2e-6)
        assert (channel == -1).float().mean() == pytest.approx(0.02, abs=0.003)
        assert (channel == 1).float().mean() == pytest.approx(0.05, abs=0.003)
    back = to_intensities(result.tensor, result.intensity_range)
    for channel, source in zip(back, data, strict=True):
        low, high = np.percentile(source, [2, 95])
        np.testing.assert_allclose(channel.numpy(), np.clip(source, low, high), rtol=1e-5)


def test_fixed_range_for_every_channel_and_for_8_bit() -> None:
    data = np.array([-2000, -1000, -500, 0, 500, 1000, 3000, 7]).reshape(2, 2, 2)
    result = prepared(volume(data, np.eye(4)), intensity_range=[-1000, 1000])
    np.testing.assert_allclose(
        result.tensor.flatten().numpy(), [-1, -1, -0.5, 0, 0.5, 1, 1, 0.007], atol=1e-6
    )
    assert result.intensity_range == ((-1000.0, 1000.0),)
    eight_bit = prepared(picture([[0, 50], [100, 255]]), intensity_range=[0, 100])
    np.testing.assert_allclose(eight_bit.tensor.flatten().numpy(), [-1, 0, 1, 1], atol=1e-6)


def test_nearly_all_background_falls_back_to_minimum_and_maximum() -> None:
    data = np.zeros((10, 10, 10))
    data[5, 5, 5] = 8
    result = prepared(volume(data))
    assert result.intensity_range == ((0.0, 8.0),)
    assert float(result.tensor[0, 5, 5, 5]) == 1.0
    assert int((result.tensor == -1).sum()) == 999


@pytest.mark.parametrize("settings", [{}, {"intensity_range": [0, 9]}, {"size": [5, 7, 3]}])
def test_a_constant_image_is_refused(settings: dict[str, Any]) -> None:
    message = r"^constant image: every voxel is 7; leave it out of the manifest$"
    with pytest.raises(ImageError, match=message):
        prepared(volume(np.full((8, 8, 8), 7)), **settings)


def test_rounding_errors_are_no_contrast() -> None:
    data = np.full((8, 8, 8), 100, dtype=np.float32)
    data[0] = np.nextafter(np.float32(100), np.float32(101))
    with pytest.raises(ImageError, match="constant image: every voxel is 100"):
        prepared(volume(data))


def test_a_constant_channel_is_refused_where_it_has_no_range() -> None:
    data = np.stack([noise(4, 4, 4), np.full((4, 4, 4), 3.0)])
    with pytest.raises(ImageError, match="constant channel: every voxel is 3"):
        prepared(volume(data))
    rgb = prepared(picture(np.stack([np.arange(16).reshape(4, 4)] * 2 + [np.zeros((4, 4))])))
    assert bool((rgb.tensor[2] == -1).all())  # a picture without blue is a picture


def test_to_intensities_in_2d_and_3d_channel_by_channel() -> None:
    for shape in [(2, 3, 4), (2, 3, 4, 5)]:
        back = to_intensities(torch.zeros(shape), ((0.0, 10.0), (-1000.0, 3000.0)))
        assert back.shape == shape
        assert bool((back[0] == 5).all())
        assert bool((back[1] == 1000).all())


# -- geometry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "affine",
    [ANISOTROPIC, OBLIQUE, FLIPPED, SAGITTAL],
    ids=["plain", "oblique", "flipped", "sagittal"],
)
def test_volumes_become_canonical_and_every_voxel_stays_where_it_is(affine: np.ndarray) -> None:
    data = noise(4, 5, 6)
    expected = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    result = prepared(volume(data, affine), intensity_range=[0, 200])
    np.testing.assert_allclose(result.affine, expected.affine, atol=1e-5)
    assert nib.aff2axcodes(result.affine) == ("R", "A", "S")
    np.testing.assert_allclose((result.tensor[0] + 1) * 100, expected.get_fdata(), atol=1e-4)

    def by_place(values: np.ndarray, matrix: np.ndarray) -> dict[tuple[float, ...], float]:
        places = positions(values.shape, matrix).reshape(3, -1).T.round(3) + 0.0
        return dict(zip(map(tuple, places.tolist()), values.flatten().tolist(), strict=True))

    before = by_place(data, affine)
    after = by_place(((result.tensor[0] + 1) * 100).numpy(), result.affine)
    assert len(before) == data.size
    assert after == pytest.approx(before, abs=1e-4)


def test_pictures_and_single_slices_are_never_flipped() -> None:
    values = np.arange(20).reshape(4, 5)
    result = prepared(picture(values))
    np.testing.assert_array_equal(((result.tensor[0] + 1) * 127.5).round().numpy(), values)
    np.testing.assert_array_equal(result.affine, PICTURE)
    pages = Image(torch.arange(60.0).reshape(1, 4, 5, 3), PICTURE, "nii.gz", True, True)
    result = prepared(pages, intensity_range=[0, 60])
    np.testing.assert_allclose((result.tensor + 1) * 30, pages.tensor, atol=1e-5)
    one_slice = volume(np.arange(20.0).reshape(4, 5, 1), FLIPPED)
    result = prepared(one_slice, intensity_range=[0, 20])
    np.testing.assert_allclose((result.tensor + 1) * 10, one_slice.tensor[..., 0], atol=1e-5)
    np.testing.assert_array_equal(result.affine, FLIPPED)


@pytest.mark.parametrize("size", [(16, 16, 16), (40, 33, 10), (13, 17, 9), (24, 20, 12)])
@pytest.mark.parametrize("affine", [ANISOTROPIC, OBLIQUE], ids=["aniso", "oblique"])
def test_resize_keeps_extent_and_a_blob_in_place(size: tuple[int, ...], affine: np.ndarray) -> None:
    shape = (24, 20, 12)
    centre = affine[:3, :3] @ [11, 8, 6] + affine[:3, 3]
    result = prepared(
        volume(blob(shape, affine, centre, 3.5), affine), size=size, intensity_range=[0, 1]
    )
    assert result.tensor.shape == (1, *size)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(np.zeros(shape), affine)).affine
    np.testing.assert_allclose(
        corners(size, result.affine), corners(shape, canonical), rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(centroid(result), centre, atol=0.3)


@pytest.mark.parametrize("size", [(16, 16), (48, 20), (13, 17), (24, 20), (96, 80)])
def test_resize_of_pictures_keeps_extent_and_a_blob_in_place(size: tuple[int, ...]) -> None:
    centre = np.array([-9.0, -12.0, 0])
    result = prepared(picture(255 * blob((24, 20, 1), PICTURE, centre, 2.5)[..., 0]), size=size)
    assert result.tensor.shape == (1, *size)
    np.testing.assert_allclose(
        corners((*size, 1), result.affine), corners((24, 20, 1), PICTURE), rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(centroid(result), centre, atol=0.15)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_thin_volumes_are_resized(side: int) -> None:
    data = np.broadcast_to(np.arange(8.0)[:, None, None], (8, 8, side))
    result = prepared(volume(data, np.eye(4)), size=[4, 4, side], intensity_range=[0, 7])
    assert spatial(result).shape == (1, 4, 4, side)
    np.testing.assert_allclose(
        spatial(result)[0, 1:3, 0, 0], np.array([2.5, 4.5]) / 3.5 - 1, atol=1e-6
    )


def test_resize_reaches_every_size_and_invents_nothing() -> None:
    """Bright everywhere: a filled-in border would be dark. A ramp in the world stays one."""
    for old, new in itertools.product((5, 7, 12, 25), (2, 3, 10, 11, 29)):
        ramp = 100 + np.broadcast_to(np.arange(old)[:, None] * 0.7, (old, 9))
        image = volume(ramp[..., None], np.diag([0.7, 1.1, 2, 1]))
        result = prepared(image, size=[new, 9], intensity_range=[0, 200])
        assert result.tensor.shape == (1, new, 9)
        values = (result.tensor[0, :, 0].double().numpy() + 1) * 100
        assert values.min() >= 100 - 1e-4
        assert values.max() <= 100 + (old - 1) * 0.7 + 1e-4
        places = positions((new, 9, 1), result.affine)[0, :, 0, 0] + 100
        reach = max(old / new, 1) * 0.7  # of the kernel: nearer the border it is cut off
        whole = (places - 100 >= reach) & (100 + (old - 1) * 0.7 - places >= reach)
        tolerance = 2e-4 if new >= old else 0.1 * 0.7  # sampled kernels wobble by a tenth voxel
        np.testing.assert_allclose(values[whole], places[whole], rtol=0, atol=tolerance)


def test_resize_does_not_alias() -> None:
    stripes = np.broadcast_to(200.0 * (np.arange(64) % 2)[:, None], (64, 64))
    result = prepared(picture(stripes), size=[16, 16])
    np.testing.assert_allclose(((result.tensor + 1) * 127.5)[0, 1:-1], 100, atol=0.01)


@pytest.mark.parametrize("fit", ["resize", "crop_or_pad"])
def test_the_right_size_is_left_alone(fit: str) -> None:
    data = noise(6, 7, 8)
    plain = prepared(volume(data))
    sized = prepared(volume(data), size=[6, 7, 8], fit=fit)
    assert torch.equal(plain.tensor, sized.tensor)
    np.testing.assert_array_equal(plain.affine, sized.affine)
    assert plain.intensity_range == sized.intensity_range


def test_spacing_resamples_and_keeps_the_centre() -> None:
    shape = (24, 20, 12)
    centre = ANISOTROPIC[:3, :3] @ [11, 9, 6] + ANISOTROPIC[:3, 3]
    image = volume(blob(shape, ANISOTROPIC, centre, 4.0))
    result = prepared(image, spacing_mm=[2, 2, 2], intensity_range=[0, 1])
    assert result.tensor.shape == (1, 12, 15, 18)
    np.testing.assert_allclose(np.linalg.norm(result.affine[:3, :3], axis=0), 2, atol=1e-9)
    np.testing.assert_allclose(centroid(result), centre, atol=0.3)
    np.testing.assert_allclose(
        corners((12, 15, 18), result.affine), corners(shape, ANISOTROPIC), atol=1e-6
    )
    same = prepared(image, spacing_mm=[1, 1.5, 3], intensity_range=[0, 1])
    np.testing.assert_allclose(same.tensor, image.tensor * 2 - 1, atol=1e-6)


def test_spacing_that_does_not_divide_the_extent_is_exact_about_the_centre() -> None:
    result = prepared(volume(noise(10, 10, 10), np.eye(4)), spacing_mm=[3, 3, 7])
    assert result.tensor.shape == (1, 3, 3, 1)[: result.tensor.ndim]
    np.testing.assert_allclose(np.diag(result.affine), [3, 3, 7, 1], atol=1e-9)
    middle = positions(spatial(result).shape[1:], result.affine).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(middle, [4.5, 4.5, 4.5], atol=1e-6)


def test_spacing_of_a_picture_and_then_size() -> None:
    result = prepared(picture(noise(20, 10)), spacing_mm=[2, 0.5])
    assert result.tensor.shape == (1, 10, 20)
    np.testing.assert_allclose(np.diag(result.affine), [-2, -0.5, 1, 1], atol=1e-9)
    result = prepared(picture(noise(20, 10)), spacing_mm=[2, 2], size=[16, 16], fit="crop_or_pad")
    assert result.tensor.shape == (1, 16, 16)
    np.testing.assert_allclose(np.diag(result.affine), [-2, -2, 1, 1], atol=1e-9)


def test_crop_or_pad_moves_no_voxel_and_pads_with_the_minimum() -> None:
    data = 1000 + noise(2, 9, 6, 5)
    data[1] -= 5000
    image = volume(data)
    result = prepared(image, size=[5, 8, 5], fit="crop_or_pad", intensity_range=[-5000, 2000])
    assert result.tensor.shape == (2, 5, 8, 5)
    values = to_intensities(result.tensor, result.intensity_range).numpy()
    np.testing.assert_allclose(values[:, :, 1:7], data[:, 2:7], atol=2e-3)
    for channel in (0, 1):
        np.testing.assert_allclose(values[channel, :, [0, 7]], data[channel].min(), atol=2e-3)
    moved = ANISOTROPIC[:3, :3] @ [2, -1, 0] + ANISOTROPIC[:3, 3]
    np.testing.assert_allclose(result.affine[:3, 3], moved, atol=1e-9)
    np.testing.assert_array_equal(result.affine[:3, :3], ANISOTROPIC[:3, :3])


@pytest.mark.parametrize("fit", ["resize", "crop_or_pad"])
def test_a_size_of_another_rank_is_refused(fit: str) -> None:
    message = r"data\.size \[8, 8\] has 2 sides, the image is a volume of \[6, 7, 8\]"
    with pytest.raises(ImageError, match=message):
        prepared(volume(noise(6, 7, 8)), size=[8, 8], fit=fit)
    message = r"data\.size \[8, 8, 8\] has 3 sides, the image is 2D, \[6, 7\]"
    with pytest.raises(ImageError, match=message):
        prepared(picture(noise(6, 7)), size=[8, 8, 8], fit=fit)


# -- TorchIO's and the user's transforms -------------------------------------------------------


def test_a_transform_by_name_with_arguments() -> None:
    data = noise(6, 6, 6)
    result = prepared(
        volume(data),
        preprocessing=[
            {"name": "CropOrPad", "target_shape": [4, 4, 4]},
            {"name": "Clamp", "out_min": 90, "out_max": 110},
        ],
        intensity_range=[90, 110],
    )
    expected = (np.clip(data[1:5, 1:5, 1:5], 90, 110) - 100) / 10
    np.testing.assert_allclose(result.tensor[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"name": "RandomFlp"}, "torchio has no transform 'RandomFlp'; did you mean RandomFlip"),
        ({"name": "Xyzzy"}, r"Value error, torchio has no transform 'Xyzzy' \["),
        ({"name": "Compose"}, "there is no transform 'Compose': it takes other"),
        (
            {"name": "RandomFlip", "axs": 0},
            "RandomFlip does not take these arguments: .*unexpected keyword argument 'axs'",
        ),
        ({"name": "RandomFlip", "axes": 7}, "RandomFlip does not take these arguments: .*0, 1 or"),
        ({"name": "no_such_package:T"}, "no_such_package:T is code that does not belong to Synth"),
        ({"name": "os:system", "command": "exit 9"}, "os:system cannot be used: what belongs to"),
        ({"axes": 0}, r"preprocessing\.0\.name\n.*Field required"),
    ],
)
def test_a_transform_that_cannot_be_built(transform: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(preprocessing=[transform])


def test_a_users_transform_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "my_transforms_xyz.py").write_text(
        "import torchio\n"
        "def function(): pass\n"
        "class Doubled(torchio.Transform):\n"
        "    def __init__(self, times=2, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.times = times\n"
        "    def apply_transform(self, subject):\n"
        "        for image in subject.get_images():\n"
        "            image.set_data(image.data * self.times)\n"
        "        return subject\n"
        "class Sums(Doubled):\n"
        "    def apply_transform(self, subject):\n"
        "        raise ValueError('no sums today')\n"
        "class Logs(Doubled):\n"
        "    def apply_transform(self, subject):\n"
        "        for image in subject.get_images():\n"
        "            image.set_data((image.data - 5).log())\n"
        "        return subject\n"
    )
    plugins.vouch([tmp_path])
    data = np.arange(27.0).reshape(3, 3, 3)
    transform = {"name": "my_transforms_xyz:Doubled", "times": 3}
    result = prepared(volume(data), preprocessing=[transform], intensity_range=[0, 78])
    np.testing.assert_allclose(result.tensor[0], data / 13 - 1, atol=1e-6)
    failing = [{"name": "my_transforms_xyz:Sums"}]
    with pytest.raises(ImageError, match="my_transforms_xyz:Sums cannot be applied: no sums today"):
        prepared(volume(data), preprocessing=failing)
    with pytest.raises(ImageError, match="preprocessing leaves voxels that are not a number"):
        prepared(volume(data), preprocessing=[{"name": "my_transforms_xyz:Logs"}])
    for name, message in (
        ("NoSuchThing", "does not exist: my_transforms_xyz has no NoSuchThing"),
        ("function", "my_transforms_xyz:function is no transform: a class whose instances are"),
    ):
        with pytest.raises(ValidationError, match=message):
            DataConfig(preprocessing=[{"name": f"my_transforms_xyz:{name}"}])


# -- the config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentiles": [90, 10]}, r"percentiles \[90.0, 10.0\]: the first must be below"),
        ({"percentiles": [-1, 50]}, r"percentiles \[-1.0, 50.0\] must lie in 0 to 100"),
        ({"percentiles": [1, 100.5]}, r"percentiles \[1.0, 100.5\] must lie in 0 to 100"),
        ({"intensity_range": [5, 5]}, r"intensity_range \[5.0, 5.0\]: the first must be below"),
        ({"size": [16]}, r"size \[16\]: two or three positive values are needed"),
        ({"size": [1, 2, 3, 4]}, r"size \[1, 2, 3, 4\]: two or three positive values"),
        ({"size": []}, r"size \[\]: two or three positive values"),
        ({"size": [16, -1]}, r"size \[16, -1\]: two or three positive values"),
        ({"size": [16, 0]}, r"size \[16, 0\]: two or three positive values"),
        ({"spacing_mm": [1, 0, 1]}, r"spacing_mm \[1.0, 0.0, 1.0\]: two or three positive"),
        ({"size": ["16", 16]}, r"size\.0\n.*valid integer"),
        ({"fit": "stretch"}, "'resize' or 'crop_or_pad'"),
        ({"num_workers": -1}, "greater than or equal to 0"),
        ({"cache_gb": -1}, "greater than or equal to 0"),
        ({"validation_fraction": 1.0}, "less than 1"),
        ({"sizes": [1, 2]}, r"sizes\n.*Extra inputs are not permitted"),
    ],
)
def test_config_faults(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(**settings)


def test_preprocessing_key_holds_what_matters_and_only_that() -> None:
    key = DataConfig().preprocessing_key
    changes: dict[str, Any] = {
        "spacing_mm": [1, 1],
        "size": [4, 4],
        "fit": "crop_or_pad",
        "intensity_range": [0, 1],
        "percentiles": [1, 99],
        "preprocessing": [{"name": "RandomFlip", "axes": 0}],
    }
    for name, value in changes.items():
        assert DataConfig(**{name: value}).preprocessing_key != key, name
    flip = [{"name": "RandomFlip", "axes": 1}]
    again = DataConfig(preprocessing=flip).preprocessing_key
    assert again != DataConfig(preprocessing=changes["preprocessing"]).preprocessing_key
    others = DataConfig(augmentation=flip, validation_fraction=0.5, num_workers=2, cache_gb=1)
    assert others.preprocessing_key == key
