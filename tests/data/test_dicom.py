from __future__ import annotations

import csv
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pydicom
import pytest
import SimpleITK as sitk

from synthcube.data.manifest import SUFFIXES, read_manifest
from synthcube.data.preparation import Preparation, prepare
from synthcube.errors import ManifestError, OutputError


def rows(done: Preparation) -> list[dict[str, str]]:
    with done.manifest_path.open(newline="") as file:
        return list(csv.DictReader(file))


def images(done: Preparation) -> list[Path]:
    return [done.manifest_path.parent / row["Channel_0"] for row in rows(done)]


def by_gdcm(folder: Path) -> sitk.Image:
    """The only series of a folder as SimpleITK reads it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def assert_same(path: Path, reference: sitk.Image, tolerance: float = 0.0) -> None:
    """The file has the reference's voxels at the same places in the world."""
    image = sitk.ReadImage(str(path))
    assert image.GetSize() == reference.GetSize()
    voxels, expected = map(sitk.GetArrayFromImage, (image, reference))
    np.testing.assert_allclose(voxels, expected, rtol=0, atol=tolerance)
    for of in (sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection):
        np.testing.assert_allclose(of(image), of(reference), rtol=0, atol=2e-5)


@pytest.mark.parametrize("orientation", ["AXIAL", "SAGITTAL", "CORONAL", "OBLIQUE"])
@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_a_series_is_what_gdcm_reads(
    tmp_path: Path, dicom: ModuleType, orientation: str, suffix: str
) -> None:
    frames = dicom.slices(
        dicom.ct(), orientation=getattr(dicom, orientation), RescaleSlope=2, RescaleIntercept=-1024
    )
    folder = dicom.save_series(frames, tmp_path / "ct", suffix)
    done = prepare(folder, tmp_path / "out")
    assert (done.rows, done.subjects, done.left_out) == (1, 1, ())
    (path,) = images(done)
    assert path.parent == tmp_path / "out" / "images"
    assert path.name.endswith("_001.nii.gz")
    assert_same(path, by_gdcm(folder))
    assert sitk.ReadImage(str(path)).GetPixelID() == sitk.sitkInt16


def test_values_that_are_no_whole_numbers(tmp_path: Path, dicom: ModuleType) -> None:
    frames = dicom.slices(dicom.ct(), RescaleSlope="0.0123", RescaleIntercept="-7.25")
    folder = dicom.save_series(frames, tmp_path / "pet")
    (path,) = images(prepare(folder, tmp_path / "out"))
    assert_same(path, by_gdcm(folder), tolerance=1e-5)
    assert sitk.ReadImage(str(path)).GetPixelID() == sitk.sitkFloat32


def test_each_slice_has_a_slope_of_its_own(tmp_path: Path, dicom: ModuleType) -> None:
    pixels = np.full((3, 4, 4), 10, np.uint16)
    frames = dicom.slices(pixels)
    for index, data in enumerate(frames):
        data.RescaleSlope, data.RescaleIntercept = index + 0.5, index
    (path,) = images(prepare(dicom.save_series(frames, tmp_path / "pet"), tmp_path / "out"))
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(voxels[:, 0, 0], [5, 16, 27])


def test_a_single_slice_with_its_thickness(tmp_path: Path, dicom: ModuleType) -> None:
    (data,) = dicom.slices(dicom.ct((1, 5, 6)), SpacingBetweenSlices=2.5)
    folder = dicom.save_series([data], tmp_path / "ct")
    (path,) = images(prepare(folder, tmp_path / "out"))
    assert_same(path, by_gdcm(folder))
    del data.SpacingBetweenSlices  # GDCM then takes 1 mm
    dicom.save_series([data], folder)
    assert sitk.ReadImage(str(images(prepare(folder, tmp_path / "out"))[0])).GetSpacing()[2] == 3


def test_an_enhanced_object(tmp_path: Path, dicom: ModuleType) -> None:
    pixels = np.random.default_rng(0).integers(0, 4000, (5, 6, 7)).astype(np.uint16)
    file = dicom.save(dicom.enhanced(pixels), tmp_path / "ct" / "enhanced.dcm")
    (path,) = images(prepare(file.parent, tmp_path / "out"))
    image, reference = sitk.ReadImage(str(path)), sitk.ReadImage(str(file))
    voxels = sitk.GetArrayFromImage(image)
    np.testing.assert_array_equal(voxels, pixels.astype(int) - 1024)
    # GDCM leaves the frames in the order of the file, and turns the third axis round
    assert image.GetDirection()[:2] == reference.GetDirection()[:2]
    turned = sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor, -9999)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(turned), sitk.GetArrayFromImage(reference))


def test_monochrome1_is_inverted_as_by_gdcm(tmp_path: Path, dicom: ModuleType) -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (7, 9)).astype(np.uint16)
    data = dicom.radiograph(pixels, PhotometricInterpretation="MONOCHROME1")
    file = dicom.save(data, tmp_path / "cr" / "a.dcm")
    (path,) = images(prepare(file.parent, tmp_path / "out"))
    assert_same(path, sitk.ReadImage(str(file)))
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0], 4095 - pixels
    )


def test_signed_monochrome1(tmp_path: Path, dicom: ModuleType) -> None:
    frames = dicom.slices(
        dicom.ct((2, 3, 3)), PhotometricInterpretation="MONOCHROME1", RescaleIntercept=5,
        RescaleSlope=1,
    )  # fmt: skip
    (path,) = images(prepare(dicom.save_series(frames, tmp_path / "ct"), tmp_path / "out"))
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(voxels, -1 - dicom.ct((2, 3, 3)).astype(int) + 5)


def test_pictures_become_png(tmp_path: Path, dicom: ModuleType) -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 5, 3)).astype(np.uint8)
    grey = rng.integers(0, 256, (6, 5)).astype(np.uint8)
    dicom.save(dicom.picture(colour, series="1"), tmp_path / "in" / "a")
    dicom.save(dicom.picture(grey, series="2"), tmp_path / "in" / "b")
    first, second = images(prepare(tmp_path / "in", tmp_path / "out"))
    assert (first.name[-8:], second.name[-8:]) == ("_001.png", "_002.png")
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(first)), colour)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(second)), grey)


def test_a_palette_and_ybr_become_rgb(tmp_path: Path, dicom: ModuleType) -> None:
    indices = np.arange(4, dtype=np.uint8).reshape(2, 2)
    data = dicom.picture(indices, PhotometricInterpretation="PALETTE COLOR")
    for colour, values in (
        ("Red", [0, 255, 0, 9]),
        ("Green", [0, 0, 255, 8]),
        ("Blue", [1, 2, 3, 4]),
    ):
        setattr(data, f"{colour}PaletteColorLookupTableDescriptor", [4, 0, 16])
        table = (np.array(values, np.uint16) * 257).tobytes()
        setattr(data, f"{colour}PaletteColorLookupTableData", table)
    dicom.save(data, tmp_path / "in" / "palette")
    grey = np.full((2, 2, 3), 128, np.uint8)
    ybr = dicom.picture(grey, series="2", PhotometricInterpretation="YBR_FULL")
    dicom.save(ybr, tmp_path / "in" / "ybr")
    first, second = images(prepare(tmp_path / "in", tmp_path / "out"))
    assert np.asarray(PIL.Image.open(first)).tolist() == [
        [[0, 0, 1], [255, 0, 2]],
        [[0, 255, 3], [9, 8, 4]],
    ]
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(second)), grey)


def test_several_pictures_of_a_series_are_images_apart(tmp_path: Path, dicom: ModuleType) -> None:
    for number in (1, 2):
        data = dicom.radiograph(np.full((4, 4), number, np.uint16))
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = dicom.uid("view", number)
        data.InstanceNumber = number
        dicom.save(data, tmp_path / "in" / f"{number}.dcm")
    done = prepare(tmp_path / "in", tmp_path / "out")
    endings = [path.name.partition("_")[2] for path in images(done)]
    assert endings == ["001.nii.gz", "001-2.nii.gz"]
    assert done.subjects == 1


COMPRESSIONS = {
    "JPEG2000": pydicom.uid.JPEG2000Lossless,
    "JPEG": pydicom.uid.JPEGLosslessSV1,
}


def compressed(source: Path, target: Path, compressor: str) -> None:
    """Write a DICOM file anew, compressed by GDCM, with its own header."""
    original = pydicom.dcmread(source)
    image = sitk.ReadImage(str(source))
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(str(target))
    writer.Execute(image)
    written = pydicom.dcmread(target)
    original.PixelData = written.PixelData
    original.file_meta.TransferSyntaxUID = written.file_meta.TransferSyntaxUID
    original["PixelData"].VR = "OB"
    original["PixelData"].is_undefined_length = True
    original.save_as(target, enforce_file_format=True)


@pytest.fixture(params=[True, False])
def plugin_of_lossless_jpeg(request: pytest.FixtureRequest) -> Iterator[None]:
    """With a decoder of pydicom where there is one, and without."""
    decoder = pydicom.pixels.get_decoder(pydicom.uid.JPEGLosslessSV1)
    names = decoder.available_plugins if not request.param else ()
    removed = {name: decoder._available.pop(name) for name in names}
    yield
    decoder._available.update(removed)


@pytest.mark.usefixtures("plugin_of_lossless_jpeg")
@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG"])
def test_compressed_slices(tmp_path: Path, dicom: ModuleType, compressor: str) -> None:
    plain = dicom.save_series(dicom.slices(dicom.ct((3, 16, 16))), tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for file in plain.iterdir():
        compressed(file, tmp_path / "packed" / file.name, compressor)
        uid = pydicom.dcmread(tmp_path / "packed" / file.name).file_meta.TransferSyntaxUID
        assert uid == COMPRESSIONS[compressor]
    (path,) = images(prepare(tmp_path / "packed", tmp_path / "out"))
    assert_same(path, by_gdcm(plain))


def test_rle(tmp_path: Path, dicom: ModuleType) -> None:
    frames = dicom.slices(dicom.ct((3, 16, 16)))
    plain = dicom.save_series(frames, tmp_path / "plain")
    reference = by_gdcm(plain)
    for data in frames:
        data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    (path,) = images(prepare(dicom.save_series(frames, tmp_path / "rle"), tmp_path / "out"))
    assert_same(path, reference)


# Real files, which come with pydicom: byte orders, compressions, colours.
REAL = {
    "693_J2KI": 0, "CT_small": 0, "ExplVR_BigEnd": 0, "GDCMJ2K_TextGBR": 0, "JPEG-lossy": 0,
    "JPEG2000": 0, "JPGExtended": 1, "J2K_pixelrep_mismatch": 0, "MR_small": 0, "MR_small_RLE": 0,
    "MR_small_bigendian": 0, "MR_small_implicit": 0, "MR_small_jp2klossless": 0,
    "MR_small_jpeg_ls_lossless": 0, "SC_rgb_dcmtk_+eb+cy+n1": 2, "SC_rgb_gdcm_KY": 0,
    "SC_rgb_jpeg": 1, "SC_rgb_jpeg_lossy_gdcm": 2, "SC_rgb_rle": 0,
    "SC_rgb_small_odd_big_endian": 0, "SC_ybr_full_422_uncompressed": 0, "examples_jpeg2k": 0,
    "examples_palette": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", [*REAL])
def test_real_files_are_what_gdcm_reads(tmp_path: Path, name: str) -> None:
    file = Path(str(pydicom.data.get_testdata_file(f"{name}.dcm", download=False)))
    (tmp_path / "in").mkdir()
    shutil.copy(file, tmp_path / "in" / "file")
    (path,) = images(prepare(tmp_path / "in", tmp_path / "out"))
    image, reference = sitk.ReadImage(str(path)), sitk.ReadImage(str(file))
    voxels, expected = (
        sitk.GetArrayFromImage(of).squeeze().astype(float) for of in (image, reference)
    )
    np.testing.assert_allclose(voxels, expected, rtol=0, atol=REAL[name])
    if path.suffix != ".png":
        np.testing.assert_allclose(image.GetOrigin(), reference.GetOrigin(), atol=1e-3)
        np.testing.assert_allclose(image.GetSpacing()[:2], reference.GetSpacing()[:2], atol=1e-4)
        np.testing.assert_allclose(image.GetDirection(), reference.GetDirection(), atol=1e-4)


def left_out(folder: Path, out: Path) -> list[str]:
    """Names and reasons of what prepare leaves out of a folder, where one good series stays."""
    done = prepare(folder, out)
    assert done.rows == 1
    return [f"{path.name}: {reason}" for path, reason in done.left_out]


def good(dicom: ModuleType, folder: Path) -> Path:
    frames = dicom.slices(dicom.ct((3, 4, 5)), patient="good", series="9")
    return dicom.save_series(frames, folder / "good")


def gap(dicom: ModuleType, frames: list[Any]) -> None:
    del frames[2:4]


def uneven(dicom: ModuleType, frames: list[Any]) -> None:
    frames[2].ImagePositionPatient = [-20.0, 31.5, -7.25 + 6.5]


def repeated(dicom: ModuleType, frames: list[Any]) -> None:
    for data in dicom.slices(dicom.ct(seed=1)):
        data.InstanceNumber += 6
        uid = dicom.uid("second", data.InstanceNumber)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid
        frames.append(data)


def tilted(dicom: ModuleType, frames: list[Any]) -> None:
    for index, data in enumerate(frames):
        data.ImagePositionPatient = [-20.0, 31.5 + index / 2, data.ImagePositionPatient[2]]


def mixed(dicom: ModuleType, frames: list[Any]) -> None:
    frames[5].ImageOrientationPatient = list(dicom.SAGITTAL)


def of_two_sizes(dicom: ModuleType, frames: list[Any]) -> None:
    frames[5] = dicom.slices(dicom.ct((6, 4, 10)))[5]


def of_two_spacings(dicom: ModuleType, frames: list[Any]) -> None:
    frames[5].PixelSpacing = [0.7, 0.95]


def skewed(dicom: ModuleType, frames: list[Any]) -> None:
    for data in frames:
        data.ImageOrientationPatient = [1, 0, 0, 0.3, 1, 0]


def of_two_patients(dicom: ModuleType, frames: list[Any]) -> None:
    frames[5].PatientID = "P2"


def compressed_as_a_film(dicom: ModuleType, frames: list[Any]) -> None:
    for data in frames:
        data.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
        data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
        data["PixelData"].VR = "OB"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (gap, "4 files: 2 slices are missing: after slice 2 of 4 is a gap of 9 mm, else of 3 mm"),
        (uneven, "6 files: the distance of its slices is uneven: 2.5 to 3.5 mm"),
        (
            repeated,
            "12 files: 6 of its 12 slices lie where another one does, as in a series of several "
            "time points, echoes or b-values",
        ),
        (
            tilted,
            "6 files: the gantry was tilted by 9.5 degrees: its slices are shifted against each "
            "other, which resampling to upright slices would undo",
        ),
        (mixed, "6 files: its 6 slices have mixed orientations, as those of a localizer have"),
        (of_two_sizes, "6 files: its slices have different sizes ((4, 10), (8, 10))"),
        (of_two_spacings, "6 files: the slices have different pixel spacings"),
        (skewed, "6 files: ImageOrientationPatient is not two directions at a right angle"),
        (of_two_patients, "6 files: the files of one series are of different patients"),
        (
            compressed_as_a_film,
            "6 files: IM0000.dcm: its compression (MPEG2 Main Profile / Main Level) cannot be read "
            "here, or it is damaged",
        ),
    ],
)
def test_a_series_that_is_no_volume_is_one_line(
    tmp_path: Path, dicom: ModuleType, change: Callable[[ModuleType, list[Any]], None], reason: str
) -> None:
    frames = dicom.slices(dicom.ct())
    change(dicom, frames)
    dicom.save_series(frames, tmp_path / "in" / "bad")
    good(dicom, tmp_path / "in")
    (line,) = left_out(tmp_path / "in", tmp_path / "out")
    assert line == f"IM0000.dcm: a series of {reason}"
    assert len([*(tmp_path / "out" / "images").iterdir()]) == 1


def test_faults_of_single_files(tmp_path: Path, dicom: ModuleType) -> None:
    folder = good(dicom, tmp_path / "in").parent
    whole = dicom.save_series(dicom.slices(dicom.ct()), tmp_path / "whole")
    content = (whole / "IM0000.dcm").read_bytes()
    (folder / "cut.dcm").write_bytes(content[:-100])
    (folder / "header.dcm").write_bytes(content[:300])
    (folder / "text.dcm").write_text("no DICOM")
    (folder / "empty.dcm").write_bytes(b"")
    shutil.copy(folder / "good" / "IM0000.dcm", folder / "same.dcm")
    film = dicom.picture(np.zeros((4, 5, 6), np.uint8), series="2")
    film.NumberOfFrames = 4
    dicom.save(film, folder / "film")
    burned = dicom.picture(np.zeros((5, 6), np.uint8), series="3", BurnedInAnnotation="YES")
    dicom.save(burned, folder / "burned")
    report = dicom.picture(np.zeros((5, 6), np.uint8), series="4")
    report.SOPClassUID = pydicom.uid.EncapsulatedPDFStorage
    for keyword in ("Rows", "Columns", "PixelData"):
        delattr(report, keyword)
    dicom.save(report, folder / "report")
    mask = dicom.picture(np.zeros((5, 6), np.uint8), series="5")
    mask.SOPClassUID = pydicom.uid.SegmentationStorage
    dicom.save(mask, folder / "mask")
    huge = dicom.picture(np.zeros((5, 6), np.uint8), series="6")
    huge.Rows = huge.Columns = 60000
    dicom.save(huge, folder / "huge")
    odd = dicom.slices(dicom.ct((1, 4, 5)), series="7")[0]
    odd.ImagePositionPatient = [1, 2]
    dicom.save(odd, folder / "odd")
    packed = bytearray(content).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    (folder / "deflated").write_bytes(packed)
    (folder / "notes.doc").write_text("no image")
    lines = dict(line.split(": ", 1) for line in left_out(folder, tmp_path / "out"))
    assert lines == {
        "cut.dcm": "cut short or damaged: its pixels (Explicit VR Little Endian) cannot be decoded",
        "header.dcm": "cut short or damaged: its header ends early",
        "text.dcm": "it does not begin as DICOM does (DICM after 128 bytes); export it again",
        "empty.dcm": "it does not begin as DICOM does (DICM after 128 bytes); export it again",
        "same.dcm": "a copy of IM0000.dcm",
        "film": "its 4 frames have no place in space, as those of a film",
        "burned": "text that may identify the person is burned into its pixels",
        "report": "it holds no image (Encapsulated PDF Storage)",
        "mask": "it is a segmentation, not an image",
        "huge": "is 60000 x 60000 x 1 x 1 by its header; an image may have 1073741824 voxels at "
        "most.",
        "odd": "ImagePositionPatient is 2 numbers, 3 are needed",
        "deflated": "its header is packed (deflated); export it uncompressed",
        "notes.doc": f"not a known image; names end in {', '.join(SUFFIXES)}",
    }


def test_nothing_left_is_a_fault(tmp_path: Path, dicom: ModuleType) -> None:
    frames = dicom.slices(dicom.ct())
    gap(dicom, frames)
    folder = dicom.save_series(frames, tmp_path / "in")
    with pytest.raises(ManifestError, match="holds no image that can be used") as error:
        prepare(folder, tmp_path / "out")
    (fault,) = error.value.faults
    assert fault.startswith(f"{folder / 'IM0000.dcm'}: a series of 4 files: 2 slices are missing")
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_writes_the_same(tmp_path: Path, dicom: ModuleType) -> None:
    folder = good(dicom, tmp_path / "in").parent
    before = {path: path.read_bytes() for path in images(prepare(folder, tmp_path / "out"))}
    dicom.save_series(dicom.slices(dicom.ct()), folder / "new")
    done = prepare(folder, tmp_path / "out")
    after = {path: path.read_bytes() for path in images(done)}
    assert (len(before), len(after)) == (1, 2)
    assert before.items() <= after.items()
    assert not list((tmp_path / "out").rglob(".synthcube-*"))


def test_images_are_not_written_into_the_data(tmp_path: Path, dicom: ModuleType) -> None:
    folder = good(dicom, tmp_path / "in").parent
    with pytest.raises(OutputError, match="What is read would be written to"):
        prepare(folder, folder / "out")
    prepare(folder, tmp_path)
    assert (tmp_path / "manifest.csv").is_file()


def test_classes_of_folders(tmp_path: Path, dicom: ModuleType) -> None:
    for label, patient in (("ill", "A"), ("well", "B")):
        frames = dicom.slices(dicom.ct((3, 4, 5)), patient=patient)
        dicom.save_series(frames, tmp_path / "in" / label / "scan")
    both = dicom.slices(dicom.ct((2, 4, 5)), patient="C")
    for label, data in zip(("ill", "well"), both, strict=True):
        dicom.save(data, tmp_path / "in" / label / "both")
    done = prepare(tmp_path / "in", tmp_path / "out", paradigm="custom")
    assert done.labels == {"ill": 1, "well": 1}
    ((_, reason),) = done.left_out
    assert reason == "a series of 2 files: its files are not all in the folder of one class"
    done = prepare(tmp_path / "in", tmp_path / "patients", paradigm="patient")
    assert [row["LabelMapping"] for row in rows(done)] == [row["SubjectID"] for row in rows(done)]


def test_patients_are_subjects(tmp_path: Path, dicom: ModuleType) -> None:
    for patient, series in (("A", "1"), ("A", "2"), ("B", "1"), ("", "1"), ("", "2")):
        data = dicom.slices(dicom.ct((1, 4, 5)), patient=patient or f"none {series}", series=series)
        data[0].PatientID = patient
        dicom.save(data[0], tmp_path / "in" / f"{patient}{series}")
    done = prepare(tmp_path / "in", tmp_path / "out", validation=0.5)
    assert (done.rows, done.subjects) == (5, 4)  # a study without an id is a person
    assert len(read_manifest(done.manifest_path).rows) == 5


def test_columns(tmp_path: Path, dicom: ModuleType) -> None:
    ages = {"A": "045Y", "B": "018M", "C": "093Y", "D": "old"}
    for patient, age in ages.items():
        with pydicom.config.disable_value_validation():
            (data,) = dicom.slices(
                dicom.ct((1, 4, 5)), patient=patient, PatientAge=age, PatientSex="F",
                ManufacturerModelName="Scanner  7", KVP="120.0", PixelSpacing=[0.7, 0.7],
            )  # fmt: skip
            dicom.save(data, tmp_path / "in" / patient)
    enhanced = dicom.enhanced(np.zeros((3, 4, 5), np.uint16), patient="E")
    dicom.save(enhanced, tmp_path / "in" / "E")
    names = [
        "PatientAge",
        "Modality",
        "ManufacturerModelName",
        "PixelSpacing",
        "KVP",
        "SliceThickness",
    ]
    done = prepare(tmp_path / "in", tmp_path / "out", dicom_columns=names)
    assert done.columns == tuple(names)
    assert sorted(tuple(row[name] for name in names) for row in rows(done)) == [
        ("", "CT", "", "0.7 0.9", "", "2"),
        ("", "CT", "Scanner 7", "0.7", "120", "3"),
        ("1.5", "CT", "Scanner 7", "0.7", "120", "3"),
        ("45", "CT", "Scanner 7", "0.7", "120", "3"),
        ("90", "CT", "Scanner 7", "0.7", "120", "3"),
    ]


IDENTIFYING = [
    "PatientName", "PatientID", "PatientBirthDate", "StudyDate", "AcquisitionTime",
    "AccessionNumber", "StudyInstanceUID", "InstitutionName", "ReferringPhysicianName",
    "StationName", "DeviceSerialNumber", "PatientComments", "SeriesDescription", "PatientAddress",
    "OtherPatientIDs", "RequestAttributesSequence",
]  # fmt: skip


def test_columns_that_identify_are_refused_by_name(tmp_path: Path, dicom: ModuleType) -> None:
    folder = good(dicom, tmp_path / "in").parent
    with pytest.raises(ManifestError, match="keywords of DICOM that are numbers or codes") as error:
        prepare(folder, tmp_path / "out", dicom_columns=["Modality", *IDENTIFYING, "PatientAgee"])
    assert error.value.faults == (
        *(
            f"{name} may identify a person, as names, dates, numbers of documents, UIDs and free "
            "text do; it is never written to a manifest"
            for name in IDENTIFYING
        ),
        "PatientAgee is no keyword of DICOM; did you mean PatientAge?",
    )


def test_without_pydicom(
    tmp_path: Path, dicom: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = good(dicom, tmp_path / "in").parent
    monkeypatch.setattr("synthcube.data.dicom.is_readable", lambda: False)
    monkeypatch.setattr("synthcube.data.dicom_columns.is_readable", lambda: False)
    with pytest.raises(
        ManifestError, match=r"reading DICOM needs pydicom: pip install 'synthcube\["
    ):
        prepare(folder, tmp_path / "out")
    with pytest.raises(ManifestError, match="--dicom_columns: reading DICOM needs pydicom"):
        prepare(folder, tmp_path / "out", dicom_columns=["Modality"])


def test_one_series_at_a_time_is_in_memory(tmp_path: Path, dicom: ModuleType) -> None:
    def peak(folder: Path) -> int:
        tracemalloc.start()
        prepare(folder, tmp_path / f"out of {folder.name}")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    voxels = np.zeros((6, 256, 256), np.int16)
    for number in range(4):
        frames = dicom.slices(voxels, patient=f"P{number}")
        dicom.save_series(frames, tmp_path / "four" / str(number))
    dicom.save_series(frames, tmp_path / "one")
    peak(tmp_path / "one")  # what the first call imports
    assert peak(tmp_path / "four") < 1.5 * peak(tmp_path / "one")


def test_dicom_and_other_images_in_one_folder(tmp_path: Path, dicom: ModuleType) -> None:
    folder = good(dicom, tmp_path / "in").parent
    PIL.Image.new("L", (4, 4)).save(folder / "other.png")
    done = prepare(folder, tmp_path / "out", dicom_columns=["Modality"])
    assert sorted((row["SubjectID"][:3], row["Modality"]) for row in rows(done)) == [
        ("oth", ""),
        ("sub", "CT"),
    ]


def test_requests_that_do_not_fit(tmp_path: Path, dicom: ModuleType) -> None:
    folder = good(dicom, tmp_path / "in").parent
    table = tmp_path / "list.csv"
    table.write_text("Channel_0\na.png\n")
    with pytest.raises(ManifestError, match="--dicom_columns is for folders with DICOM files"):
        prepare(table, tmp_path / "out", dicom_columns=["Modality"])
    for name in ("p1_t1.png", "p1_seg.png"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(ManifestError, match="with the channels t1, seg; a DICOM series is one"):
        prepare(folder, tmp_path / "out")
