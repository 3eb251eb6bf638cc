from __future__ import annotations

import gzip
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import SimpleITK as sitk
import torch
import torchio as tio

from synthcube.data.images import Image, read_image, write_image
from synthcube.errors import ImageError, OutputError

RANDOM = np.random.default_rng(0)
ANISOTROPIC = np.array([[0.5, 0, 0, -7], [0, 2, 0, 3], [0, 0, 5, 11.5], [0, 0, 0, 1]])
_C, _S = np.cos(0.4), np.sin(0.4)
OBLIQUE = np.array([[_C, -_S, 0, 4], [_S, _C, 0, -5], [0, 0, -1, 6], [0, 0, 0, 1]]) @ np.diag(
    [0.8, 1.2, 3, 1]
)
SHIFTED = np.array([[0, 0, 0, 1 / 3], *[[0] * 4] * 3])
SHEARED = np.array([[1, 0.3, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])


def volume(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RANDOM.normal(0, 100, shape).astype(np.float32))


def nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = ANISOTROPIC) -> Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def picture(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    picture = PIL.Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)
    return path


def pixels(*shape: int, high: int = 256, dtype: str = "u1") -> np.ndarray:
    return RANDOM.integers(0, high, shape).astype(dtype)


# -- writing: every reader gets the same voxels at the same place ---------------------------


@pytest.mark.parametrize(
    "affine", [ANISOTROPIC, OBLIQUE, SHEARED], ids=["aniso", "oblique", "shear"]
)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_volume_round_trip(tmp_path: Path, channels: int, affine: np.ndarray) -> None:
    path, tensor = tmp_path / "a.nii.gz", volume(channels, 4, 5, 6)
    write_image(path, tensor, affine)
    by_nibabel = nib.load(path)
    array = by_nibabel.get_fdata().reshape(4, 5, 6, channels)
    np.testing.assert_array_equal(np.moveaxis(array, -1, 0), tensor.numpy())
    np.testing.assert_allclose(by_nibabel.affine, affine, atol=1e-5)
    assert by_nibabel.header.get_xyzt_units()[0] == "mm"
    assert int(by_nibabel.header["sform_code"]) == int(by_nibabel.header["qform_code"]) == 1
    again = read_image([path])
    assert torch.equal(again.tensor, tensor)
    np.testing.assert_allclose(again.affine, affine, atol=1e-5)
    assert (again.file_format, again.integer, again.raster) == ("nii.gz", False, False)


@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (2, 4, 5, 6), (3, 4, 5), (5, 4, 5)])
@pytest.mark.parametrize("affine", [ANISOTROPIC, OBLIQUE], ids=["aniso", "oblique"])
def test_torchio_and_simpleitk_read_the_same(
    tmp_path: Path, shape: tuple[int, ...], affine: np.ndarray
) -> None:
    path, tensor = tmp_path / "a.nii.gz", volume(*shape)
    write_image(path, tensor, affine)
    by_torchio = tio.ScalarImage(path)
    assert torch.equal(by_torchio.data.reshape(shape), tensor)
    known = 4 if len(shape) == 4 else 2  # of a slice with channels, ITK keeps the plane only
    np.testing.assert_allclose(by_torchio.affine[:known, :known], affine[:known, :known], atol=1e-4)
    by_simpleitk = sitk.ReadImage(str(path))
    assert by_simpleitk.GetNumberOfComponentsPerPixel() == shape[0]
    np.testing.assert_allclose(by_simpleitk.GetSpacing()[0], np.linalg.norm(affine[:3, 0]), 1e-4)


def test_2d_nifti_is_a_single_slice(tmp_path: Path) -> None:
    path, tensor = tmp_path / "a.nii.gz", volume(1, 4, 5)
    write_image(path, tensor, ANISOTROPIC)
    assert nib.load(path).shape == (4, 5, 1)
    assert torch.equal(read_image([path]).tensor[..., 0], tensor)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 255, "u1"), (-1024, 3000, "i2"), (0, 70000, "i4"), (0, 1e12, "f4")],
)
def test_integers_take_the_smallest_type(
    tmp_path: Path, low: float, high: float, dtype: str
) -> None:
    path, tensor = tmp_path / "a.nii.gz", torch.tensor([low, 0.4, high]).reshape(1, 3, 1, 1)
    write_image(path, tensor, np.eye(4), integer=True)
    assert nib.load(path).get_data_dtype() == np.dtype(dtype)
    again = read_image([path])
    assert torch.equal(again.tensor, tensor.round())
    assert again.integer == (dtype != "f4")


@pytest.mark.parametrize("name", ["a.png", "a.nii.gz"])
def test_same_image_same_bytes(tmp_path: Path, name: str) -> None:
    tensor = volume(3, 6, 5)
    contents = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / name, tensor, OBLIQUE)
        contents.append((tmp_path / folder / name).read_bytes())
    assert contents[0] == contents[1]
    assert [path.name for path in (tmp_path / "one").iterdir()] == [name]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "a.png"
    tensor = torch.from_numpy(pixels(channels, 7, 5).astype(np.float32))
    write_image(path, tensor, np.eye(4))
    again = read_image([path])
    assert torch.equal(again.tensor[..., 0], tensor)
    assert (again.file_format, again.integer, again.raster) == ("png", True, True)


def test_png_rounds_and_clips(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", torch.tensor([[[-5.0, 1.6, 300.0]]]), np.eye(4))
    assert read_image([tmp_path / "a.png"]).tensor.flatten().tolist() == [0, 2, 255]


def test_tensors_of_a_running_model_can_be_written(tmp_path: Path) -> None:
    tensor = torch.ones(1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    write_image(tmp_path / "a.nii.gz", tensor, np.eye(4))
    assert read_image([tmp_path / "a.nii.gz"]).tensor.unique().tolist() == [1]


@pytest.mark.parametrize(
    ("name", "tensor", "affine", "message"),
    [
        ("a.png", torch.zeros(2, 4, 4), np.eye(4), "1 or 3 channels, this one has 2"),
        ("a.png", torch.zeros(1, 4, 4, 3), np.eye(4), "and 3 slices; write it as .nii.gz"),
        ("a.jpg", torch.zeros(1, 4, 4), np.eye(4), "written as .png or .nii.gz only"),
        ("a.nii.gz", torch.zeros(4, 4), np.eye(4), r"shape \(4, 4\) cannot be written"),
        ("a.nii.gz", torch.zeros(1, 0, 4), np.eye(4), r"shape \(1, 0, 4\) cannot be written"),
        ("a.nii.gz", torch.full((1, 2, 2), torch.nan), np.eye(4), "4 NaN and 0 infinite"),
        ("a.nii.gz", torch.zeros(1, 4, 4), np.zeros((4, 4)), "affine that cannot be used"),
        ("a.nii.gz", torch.zeros(1, 4, 4), np.eye(3), "affine that cannot be used"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, name: str, tensor: torch.Tensor, affine: np.ndarray, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        write_image(tmp_path / name, tensor, affine)
    assert not list(tmp_path.iterdir())


def test_missing_output_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Cannot write"):
        write_image(tmp_path / "no" / "a.png", torch.zeros(1, 4, 4), np.eye(4))


# -- reading NIfTI --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_scale_factors_are_applied(tmp_path: Path, suffix: str) -> None:
    image = nib.Nifti1Image(np.arange(8, dtype="i2").reshape(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    image.to_filename(tmp_path / f"a{suffix}")
    stored = nib.load(tmp_path / f"a{suffix}").get_fdata()
    read = read_image([tmp_path / f"a{suffix}"])
    np.testing.assert_allclose(read.tensor[0], stored)
    assert not read.integer


def test_whole_scale_factors_keep_integers(tmp_path: Path) -> None:
    image = nib.Nifti1Image(pixels(2, 2, 2), np.eye(4))
    image.header.set_slope_inter(1, -1024)
    image.to_filename(tmp_path / "a.nii")
    assert read_image([tmp_path / "a.nii"]).integer


def test_sform_is_preferred_and_qform_is_the_fallback(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((3, 3, 3), "f4"), None)
    image.set_sform(ANISOTROPIC, 1)
    image.set_qform(OBLIQUE, 1)
    nib.save(image, tmp_path / "both.nii")
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "qform.nii")
    np.testing.assert_allclose(read_image([tmp_path / "both.nii"]).affine, ANISOTROPIC)
    np.testing.assert_allclose(read_image([tmp_path / "qform.nii"]).affine, OBLIQUE, atol=1e-5)


def test_rgb24_gives_three_channels(tmp_path: Path) -> None:
    data = pixels(4, 5, 6, 3)
    record = data.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    image = read_image([nifti(tmp_path / "a.nii.gz", record)])
    np.testing.assert_array_equal(image.tensor, np.moveaxis(data, -1, 0))
    assert image.integer


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 5), (1, 4, 5, 1)),
        ((4, 5, 1), (1, 4, 5, 1)),
        ((4, 5, 6), (1, 4, 5, 6)),
        ((4, 5, 6, 1), (1, 4, 5, 6)),
        ((4, 5, 6, 4), (4, 4, 5, 6)),
        ((4, 5, 6, 1, 7), (7, 4, 5, 6)),
        ((4, 5, 1, 1, 2), (2, 4, 5, 1)),
    ],
)
def test_shapes(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    data = RANDOM.normal(size=shape).astype("f4")
    image = read_image([nifti(tmp_path / "a.nii", data)])
    assert tuple(image.tensor.shape) == expected
    flat = np.moveaxis(data.reshape(*expected[1:], -1), -1, 0)
    np.testing.assert_array_equal(image.tensor, flat)


def test_nifti2_big_endian_and_gzip_under_another_name(tmp_path: Path) -> None:
    data = pixels(3, 4, 5)
    nib.save(nib.Nifti2Image(data, np.eye(4)), tmp_path / "two.nii")
    big = nib.Nifti1Header(endianness=">")
    nib.save(nib.Nifti1Image(data, np.eye(4), header=big), tmp_path / "big.nii")
    nifti(tmp_path / "a.nii.gz", data).rename(tmp_path / "packed.nii")
    for name in ("two.nii", "big.nii", "packed.nii"):
        np.testing.assert_array_equal(read_image([tmp_path / name]).tensor[0], data)


# -- reading pictures -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_picture_axes(tmp_path: Path, suffix: str, channels: int) -> None:
    data = pixels(5, 7, channels)  # (y, x, c): 7 wide, 5 high
    path = picture(tmp_path / f"a.{suffix}", data if channels == 3 else data[..., 0])
    image = read_image([path])
    assert tuple(image.tensor.shape) == (channels, 7, 5, 1)
    np.testing.assert_array_equal(image.tensor[..., 0], data.transpose(2, 1, 0))
    assert (image.file_format, image.integer, image.raster) == ("png", True, True)
    by_torchio = tio.ScalarImage(path)
    assert torch.equal(by_torchio.data.float(), image.tensor)
    np.testing.assert_array_equal(by_torchio.affine, image.affine)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_axes(tmp_path: Path, mode: str) -> None:
    data = np.zeros((32, 48), "u1")
    data[:8, 40:] = 255  # top right
    path = picture(tmp_path / "a.jpeg", data, mode)
    image = read_image([path])
    assert tuple(image.tensor.shape) == (len(mode), 48, 32, 1)
    assert image.tensor[:, 44, 4].min() > 200 > 50 > image.tensor[:, 4, 28].max()
    np.testing.assert_array_equal(
        image.tensor[0, :, :, 0].T, np.asarray(PIL.Image.open(path).convert("L"))
    )


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    PIL.Image.fromarray(pixels(16, 32)).save(tmp_path / "a.jpg", exif=exif)
    assert tuple(read_image([tmp_path / "a.jpg"]).tensor.shape) == (1, 16, 32, 1)


def test_16_bit_grey_and_float_are_kept(tmp_path: Path) -> None:
    data = pixels(5, 7, high=65536, dtype="u2")
    for name in ("a.png", "a.tif"):
        image = read_image([picture(tmp_path / name, data)])
        np.testing.assert_array_equal(image.tensor[0, :, :, 0].T, data)
        assert (image.file_format, image.integer) == ("nii.gz", True)
    image = read_image([picture(tmp_path / "f.tif", data.astype("f4") / 7)])
    np.testing.assert_array_equal(image.tensor[0, :, :, 0].T, data.astype("f4") / 7)
    assert not image.integer


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_colour_is_kept(tmp_path: Path, suffix: str) -> None:
    data = pixels(5, 7, 3, high=65536, dtype="u2")
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(data, isVector=True), str(path))
    image = read_image([path])
    np.testing.assert_array_equal(image.tensor[..., 0], data.transpose(2, 1, 0))
    assert image.file_format == "nii.gz"


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("P", 3), ("LA", 1), ("RGBA", 3)])
def test_other_modes(tmp_path: Path, suffix: str, mode: str, channels: int) -> None:
    picture = PIL.Image.fromarray(pixels(5, 7, 3)).convert(mode)
    if mode.endswith("A"):
        picture.putalpha(0)  # transparent: its colours are kept, and not blended into black
    picture.save(tmp_path / f"a.{suffix}")
    image = read_image([tmp_path / f"a.{suffix}"])
    expected = np.asarray(picture.convert("RGB" if channels == 3 else "L")).reshape(5, 7, channels)
    np.testing.assert_array_equal(image.tensor[..., 0], expected.transpose(2, 1, 0))
    assert image.file_format == "png"


def test_pages_of_a_tiff_are_slices(tmp_path: Path) -> None:
    pages = [PIL.Image.fromarray(pixels(5, 7)) for _ in range(4)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    image = read_image([tmp_path / "a.tif"])
    np.testing.assert_array_equal(image.tensor[0, :, :, 2].T, np.asarray(pages[2]))
    assert (tuple(image.tensor.shape), image.file_format) == ((1, 7, 5, 4), "nii.gz")


# -- several files --------------------------------------------------------------------------


def test_channel_files_are_stacked_in_order(tmp_path: Path) -> None:
    files = [
        nifti(tmp_path / f"{name}.nii", np.full((3, 4, 5), i, "f4")) for i, name in enumerate("zay")
    ]
    assert read_image(files).tensor[:, 0, 0, 0].tolist() == [0, 1, 2]
    two = read_image([picture(tmp_path / f"{i}.png", pixels(5, 7)) for i in range(2)])
    assert (len(two.tensor), two.file_format) == (2, "png")


@pytest.mark.parametrize(
    ("other", "affine", "message"),
    [
        ((3, 4, 6), ANISOTROPIC, r"a.nii has the size \(3, 4, 5\), but .*b.nii has \(3, 4, 6\)"),
        ((3, 4, 5), OBLIQUE, r"a.nii and .*b.nii lie differently in space: the .* mm; resample"),
        ((3, 4, 5), 2 * ANISOTROPIC, r"the spacing is \[.*\] and \[.*\] mm"),
        ((3, 4, 5), ANISOTROPIC + SHIFTED, r"the origin is \[.*\] and \[.*\] mm"),
        ((3, 4, 5), ANISOTROPIC @ np.diag([-1, -1, 1, 1]), "the axes point in other directions"),
    ],
)
def test_channel_files_that_differ(
    tmp_path: Path, other: tuple[int, ...], affine: np.ndarray, message: str
) -> None:
    first = nifti(tmp_path / "a.nii", np.zeros((3, 4, 5), "f4"))
    second = nifti(tmp_path / "b.nii", np.zeros(other, "f4"), affine)
    with pytest.raises(ImageError, match=message) as caught:
        read_image([first, second])
    assert len(str(caught.value)) < 250 + 2 * len(str(tmp_path))


def test_constant_images_are_read(tmp_path: Path) -> None:
    assert isinstance(read_image([picture(tmp_path / "a.png", np.zeros((4, 4), "u1"))]), Image)


# -- bad files: one clean sentence with the file's name -------------------------------------


def bad(path: Path, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImageError, match=f"{re.escape(path.name)} .*{message}") as caught:
        read_image([path])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


Captured = pytest.CaptureFixture[str]
CUT = "cut short or damaged"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.nii", "a.nii.gz"])
def test_cut_short(tmp_path: Path, name: str, capfd: Captured) -> None:
    whole = tmp_path / name
    if ".nii" in name:
        nifti(whole, RANDOM.normal(size=(12, 12, 12)).astype("f4"))
    else:
        picture(whole, pixels(64, 64))
    content = whole.read_bytes()
    for share in (0.5, 0.98):
        whole.write_bytes(content[: int(len(content) * share)])
        bad(whole, CUT, capfd)


def test_damaged_in_the_middle(tmp_path: Path, capfd: Captured) -> None:
    path = nifti(tmp_path / "a.nii.gz", pixels(9, 9, 9))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the checksum
    path.write_bytes(content)
    bad(path, CUT, capfd)


@pytest.mark.parametrize("name", ["a.png", "a.jpeg", "a.tiff", "a.nii", "a.nii.gz"])
def test_empty_missing_and_text(tmp_path: Path, name: str, capfd: Captured) -> None:
    path = tmp_path / name
    bad(path, "is missing", capfd)
    path.touch()
    bad(path, r"is empty \(0 bytes\)", capfd)
    path.write_text("not an image at all, but a text of some length")
    bad(path, r"is not a .*image, whatever its name says", capfd)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(b"not an image either"))
        bad(path, "is not a NIfTI image", capfd)


@pytest.mark.parametrize("suffix", [".nii", ".tif"])
def test_nan_and_infinite_voxels_are_counted(tmp_path: Path, suffix: str, capfd: Captured) -> None:
    data = np.zeros((4, 5), "f4")
    data[0, :2], data[1, 0] = np.nan, np.inf
    path = tmp_path / f"a{suffix}"
    nifti(path, data) if suffix == ".nii" else picture(path, data)
    bad(path, "2 NaN and 1 infinite voxels of 20", capfd)


def test_values_beyond_float32(tmp_path: Path, capfd: Captured) -> None:
    bad(nifti(tmp_path / "a.nii", np.full((2, 2, 2), 1e60)), "0 NaN and 8 infinite", capfd)


@pytest.mark.parametrize("shape", [(3, 3, 3, 5), (3, 3, 3, 2, 2)])
def test_time_series(tmp_path: Path, shape: tuple[int, ...], capfd: Captured) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.zeros(shape, "f4"))
    bad(path, r"has the shape .*volumes in time, .*prepare --volume mean", capfd)


def test_complex_and_singular(tmp_path: Path, capfd: Captured) -> None:
    bad(nifti(tmp_path / "a.nii", np.zeros((3, 3, 3), "c8")), "complex numbers", capfd)
    image = nib.Nifti1Image(np.zeros((3, 3, 3), "f4"), None)
    image.header["sform_code"] = 1
    path = tmp_path / "b.nii"
    path.write_bytes(image.to_bytes())
    bad(path, "affine that cannot be used", capfd)


def test_pictures_that_are_not_read(tmp_path: Path, capfd: Captured) -> None:
    bad(picture(tmp_path / "a.jpg", pixels(5, 7, 3), "CMYK"), "colour mode CMYK; save it as", capfd)
    pages = [PIL.Image.fromarray(pixels(5, 7)), PIL.Image.fromarray(pixels(5, 8))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    bad(tmp_path / "a.tif", "pages that differ", capfd)
    frames = [PIL.Image.fromarray(pixels(5, 7)) for _ in range(2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    bad(tmp_path / "a.png", "an animation of 2 pictures", capfd)


def test_unknown_suffix_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.dcm is not a known image; .*\.nii\.gz"):
        read_image([tmp_path / "a.dcm"])
    with pytest.raises(ImageError, match="needs at least one file"):
        read_image([])
