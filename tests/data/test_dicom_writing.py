from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import PIL.Image
import pydicom
import pytest
import SimpleITK as sitk
import torch

from synthcube.data.dicom_writing import Study, require_dicom, write_dicom
from synthcube.data.images import write_image
from synthcube.data.preparation import prepare
from synthcube.errors import ConfigError, ImageError
from synthcube.storage import sha256

COSINE, SINE = np.cos(0.3), np.sin(0.3)
TURNED = np.array([[COSINE, -SINE, 0], [SINE, COSINE, 0], [0, 0, 1]])


def affine(turn: np.ndarray | None = None) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = (np.eye(3) if turn is None else turn) @ np.diag([0.9, 0.7, 2.5])
    matrix[:3, 3] = [-31.25, 17.123456, 1001.5]
    return matrix


def study(image: torch.Tensor) -> Study:
    return Study.of("a model", image)


def volume(low: float = -1000.0, high: float = 3000.0) -> torch.Tensor:
    voxels = torch.rand((1, 5, 6, 4), generator=torch.Generator().manual_seed(0))
    return voxels * (high - low) + low


def by_gdcm(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    (series,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
    return reader.Execute()


def assert_same(image: sitk.Image, reference: sitk.Image, tolerance: float = 0.0) -> None:
    assert image.GetSize() == reference.GetSize()
    voxels, expected = map(sitk.GetArrayFromImage, (image, reference))
    np.testing.assert_allclose(voxels, expected, rtol=0, atol=tolerance)
    for of in (sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection):
        np.testing.assert_allclose(of(image), of(reference), rtol=0, atol=1e-4)


@pytest.mark.parametrize("turn", [None, TURNED, np.roll(np.eye(3), 1, axis=0)])
def test_gdcm_reads_the_volume_that_the_nifti_holds(
    tmp_path: Path, turn: np.ndarray | None
) -> None:
    image = volume()
    write_image(tmp_path / "a.nii.gz", image, affine(turn))
    (folder,) = write_dicom(tmp_path / "dicom" / "a", image, affine(turn), study(image))
    assert sorted(path.name for path in folder.iterdir()) == [f"000{i}.dcm" for i in range(1, 5)]
    reference = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert_same(by_gdcm(folder), reference, tolerance=4000 / 131070 + 1e-3)


def test_an_axis_that_runs_backwards_is_the_same_place(tmp_path: Path) -> None:
    image, backwards = volume(), affine()
    backwards[:3, 2] *= -1
    write_image(tmp_path / "a.nii.gz", image, backwards)
    (folder,) = write_dicom(tmp_path / "a", image, backwards, study(image))
    series, reference = by_gdcm(folder), sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    turned = sitk.Resample(series, reference, sitk.Transform(), sitk.sitkNearestNeighbor, -9999)
    voxels, expected = map(sitk.GetArrayFromImage, (turned, reference))
    np.testing.assert_allclose(voxels, expected, atol=0.04)


@pytest.mark.parametrize(
    ("low", "high"), [(-1024, 3071), (0, 2), (-40000, 20000), (100000, 165535), (7, 7)]
)
def test_whole_numbers_are_kept(tmp_path: Path, low: int, high: int) -> None:
    image = volume(low, high).round()
    image.view(-1)[:2] = torch.tensor([low, high])
    (folder,) = write_dicom(
        tmp_path / "a", image, affine(), study(image), integer=True, must_be_exact=True
    )
    voxels = sitk.GetArrayFromImage(by_gdcm(folder)).transpose(2, 1, 0)
    np.testing.assert_array_equal(voxels, image[0].numpy())
    assert voxels.dtype.kind in "iu"


def test_numbers_of_any_size_are_kept_to_their_range(tmp_path: Path) -> None:
    for number, (low, high) in enumerate([(0, 1e-6), (-1e12, 1e12), (0.1, 0.1), (5, 5.0001)]):
        image = volume(low, high)
        (folder,) = write_dicom(tmp_path / str(number), image, affine(), study(image))
        voxels = sitk.GetArrayFromImage(by_gdcm(folder)).transpose(2, 1, 0)
        step = (high - low) / 131070
        np.testing.assert_allclose(voxels, image[0], rtol=1e-6, atol=step * 1.01)


def test_classes_that_are_too_far_apart(tmp_path: Path) -> None:
    image = volume(0, 70000).round()
    image.view(-1)[:2] = torch.tensor([0, 70000])
    with pytest.raises(ImageError, match="its classes are more than 65535 apart"):
        write_dicom(tmp_path / "a", image, affine(), study(image), integer=True, must_be_exact=True)
    assert not (tmp_path / "a").exists()


def test_the_tags_say_what_it_is(tmp_path: Path) -> None:
    image = volume()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (folder,) = write_dicom(tmp_path / "a", image, affine(), study(image))
        files = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    for number, data in enumerate(files, start=1):
        assert data.InstanceNumber == number
        assert list(data.ImageType) == ["DERIVED", "SECONDARY"]
        assert data.ImageComments == "Synthetic, for research only"
        assert data.DerivationDescription.startswith("Synthetic, for research only: made by")
        assert (data.SyntheticData, data.BurnedInAnnotation) == ("YES", "NO")
        assert data.ContentQualification == "RESEARCH"
        assert data.PatientID.startswith("SYNTHETIC-")
        assert str(data.PatientName).startswith("Synthetic^")
        assert (data.StudyDate, data.PatientBirthDate) == ("", "")
        assert data.PixelSpacing == [0.7, 0.9]
        assert data.SliceThickness == data.SpacingBetweenSlices == 2.5
    assert len({data.SOPInstanceUID for data in files}) == 4
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({data[name].value for data in files}) == 1
    uids = [files[0].SOPInstanceUID, files[0].SeriesInstanceUID, files[0].StudyInstanceUID]
    assert len({*uids}) == 3
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_uids_are_those_of_the_content(tmp_path: Path) -> None:
    image = volume()
    (first,) = write_dicom(tmp_path / "1" / "a", image, affine(), study(image))
    (again,) = write_dicom(tmp_path / "2" / "a", image, affine(), study(image))
    assert [sha256(p) for p in sorted(first.iterdir())] == [
        sha256(p) for p in sorted(again.iterdir())
    ]
    # other intensities of the same image, as other postprocessing makes them
    (clipped,) = write_dicom(tmp_path / "3" / "a", image.clip(0, 100), affine(), study(image))
    (other,) = write_dicom(tmp_path / "4" / "a", image, affine(), Study.of("another", image))

    def uids(folder: Path) -> tuple[set[str], set[str]]:
        files = [pydicom.dcmread(path) for path in folder.iterdir()]
        return {f.SOPInstanceUID for f in files}, {f.StudyInstanceUID for f in files}

    assert not uids(first)[0] & uids(clipped)[0]
    assert uids(first)[1] == uids(clipped)[1]
    assert not uids(first)[1] & uids(other)[1]


def test_a_series_is_replaced_as_a_whole(tmp_path: Path) -> None:
    image = volume()
    write_dicom(tmp_path / "a", image, affine(), study(image))
    shorter = image[..., :2]
    (folder,) = write_dicom(tmp_path / "a", shorter, affine(), study(shorter))
    assert sorted(path.name for path in folder.iterdir()) == ["0001.dcm", "0002.dcm"]
    assert by_gdcm(folder).GetSize() == (5, 6, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_kill_at_any_moment_leaves_a_whole_series_or_none(
    tmp_path: Path, kills: ModuleType
) -> None:
    image = volume()[..., :2]
    for number in itertools.count():
        target = tmp_path / str(number)
        if kills.killed_before(
            number,
            tmp_path,
            lambda: write_dicom(target, image, affine(), study(image)),  # noqa: B023
        ):
            break
        assert not target.exists() or len([*target.glob("*.dcm")]) == 2
        write_dicom(target, image, affine(), study(image))
        assert len([*target.iterdir()]) == 2
    assert number > 5


def test_pictures(tmp_path: Path) -> None:
    grey = torch.arange(15.0).reshape(1, 5, 3) * 20
    colour = torch.cat([grey, grey / 2, 255 - grey.clip(0, 255)])
    for name, image in (("grey", grey), ("colour", colour)):
        write_image(tmp_path / f"{name}.png", image, np.eye(4))
        (file,) = write_dicom(tmp_path / name, image, None, study(image))
        assert file == tmp_path / f"{name}.dcm"
        data = pydicom.dcmread(file)
        assert "ImagePositionPatient" not in data
        expected = np.asarray(PIL.Image.open(tmp_path / f"{name}.png"))
        np.testing.assert_array_equal(data.pixel_array, expected)
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(sitk.ReadImage(str(file))).squeeze(0), expected
        )


def test_a_flat_image_with_a_place(tmp_path: Path) -> None:
    image = volume()[..., 0]
    write_image(tmp_path / "a.nii.gz", image, affine(TURNED))
    (file,) = write_dicom(tmp_path / "in" / "a", image, affine(TURNED), study(image))
    assert file.name == "a.dcm"
    prepare(tmp_path / "in", tmp_path / "out")
    (again,) = (tmp_path / "out" / "images").iterdir()
    written, read = (nib.load(path) for path in (tmp_path / "a.nii.gz", again))
    np.testing.assert_allclose(read.get_fdata(), written.get_fdata(), atol=0.04)
    np.testing.assert_allclose(read.affine, written.affine, atol=1e-4)


def test_channels_are_series_of_one_study(tmp_path: Path) -> None:
    image = torch.cat([volume(), volume(0, 5)])
    folders = write_dicom(tmp_path / "a", image, affine(), study(image))
    assert [folder.name for folder in folders] == ["a_channel_0", "a_channel_1"]
    first, second = (pydicom.dcmread(folder / "0001.dcm") for folder in folders)
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID
    assert (first.SeriesNumber, second.SeriesNumber) == (1, 2)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    image = volume().round()
    for name, sign in (("a", 1), ("b", -1)):
        write_dicom(tmp_path / "in" / name, sign * image, affine(), study(image), integer=True)
    write_image(tmp_path / "a.nii.gz", image, affine())
    done = prepare(tmp_path / "in", tmp_path / "out")
    assert (done.rows, done.subjects, done.left_out) == (2, 1, ())
    paths = [str(path) for path in (tmp_path / "out" / "images").iterdir()]
    reference = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    (same,) = (p for p in paths if sitk.ReadImage(p)[0, 0, 0] == reference[0, 0, 0])
    assert_same(sitk.ReadImage(same), reference)


def test_a_sheared_grid_is_refused() -> None:
    sheared = affine()
    sheared[0, 1] = 0.2
    with pytest.raises(ConfigError, match="but the axes of the images are not at right angles"):
        require_dicom(sheared)
    require_dicom(affine(TURNED))
    require_dicom(None)


def test_without_pydicom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthcube.data.dicom_writing.is_readable", lambda: False)
    with pytest.raises(ConfigError, match=r"needs pydicom: pip install 'synthcube\[dicom\]'"):
        require_dicom(None)
