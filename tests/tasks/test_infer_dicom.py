"""Infer with --format dicom, and the way from a folder of DICOM to DICOM."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pydicom
import pytest
import SimpleITK as sitk


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_gdcm(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def assert_same(series: sitk.Image, image: sitk.Image, tolerance: float) -> None:
    voxels, expected = map(sitk.GetArrayFromImage, (series, image))
    np.testing.assert_allclose(voxels, expected, rtol=0, atol=tolerance)
    for of in (sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection):
        np.testing.assert_allclose(of(series), of(image), rtol=0, atol=1e-4)


def test_pictures_are_written_as_dicom_too(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    code, _, err = cli("train", "-c", tiny_config(), "-d", phantoms, "-o", run)
    assert code == 0, err
    words = ("infer", "-m", run, "-o", out, "-n", 3, "--format", "dicom")
    code, printed, err = cli(*words)
    assert code == 0, err
    assert f"DICOM: {out / 'dicom'}" in printed
    rows = table(out / "manifest.csv")
    assert [row["DICOM"] for row in rows] == [f"dicom/0000{i}.dcm" for i in range(3)]
    for row in rows:
        pixels = pydicom.dcmread(out / row["DICOM"]).pixel_array
        np.testing.assert_array_equal(pixels, np.asarray(PIL.Image.open(out / row["Channel_0"])))
    assert json.loads((out / "provenance.json").read_text())["request"]["format"] == "dicom"
    before = {path: path.read_bytes() for path in (out / "dicom").iterdir()}
    assert cli(*words)[0] == 0
    assert {path: path.read_bytes() for path in (out / "dicom").iterdir()} == before
    code, _, err = cli(*words[:-2])
    assert code == 2
    assert "holds other images" in err
    code, _, err = cli("evaluate", "-p", out / "dicom", "-l", phantoms, "-o", tmp_path / "e")
    assert code == 2
    assert f"synthcube prepare -d {out / 'dicom'} -o NEW_FOLDER makes images of them" in err


CONFIG = """
data: {size: [16, 16, 4], intensity_range: [-1024, 2000]}
model: {name: rectified_flow, channels: [8, 8], num_res_blocks: 1, attention_from: 2}
training: {max_epochs: 1, batch_size: 2, num_sample_images: 1}
sampling: {steps: 2}
compute: {accelerator: cpu, precision: "32"}
"""


@pytest.mark.slow
def test_from_a_folder_of_ct_to_generated_dicom(cli, tmp_path: Path, dicom: ModuleType) -> None:
    for number in range(6):
        frames = dicom.slices(
            dicom.ct((4, 16, 16), seed=number), patient=f"P{number}", PatientAge=f"0{number}0Y"
        )
        dicom.save_series(frames, tmp_path / "scans" / str(number), suffix="")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    data, run, out = (tmp_path / name for name in ("data", "run", "out"))
    for words in (
        ("prepare", "-d", tmp_path / "scans", "-o", data, "--dicom_columns", "PatientAge"),
        (
            *("train", "-c", tmp_path / "config.yaml", "-d", data, "-o", run),
            *("--set", "data.conditions={PatientAge: number}"),
        ),
        ("infer", "-m", run, "-o", out, "-n", 2, "--format", "dicom"),
        ("prepare", "-d", out / "dicom", "-o", tmp_path / "again"),
    ):
        code, printed, err = cli(*words)
        assert code == 0, err
    assert "2 images of 2 subjects" in printed
    for row in table(out / "manifest.csv"):
        image = sitk.ReadImage(str(out / row["Channel_0"]))
        np.testing.assert_allclose(image.GetSpacing(), (0.9, 0.7, 3), atol=1e-6)
        assert_same(by_gdcm(out / row["DICOM"]), image, tolerance=0)  # whole numbers
        (tags,) = (pydicom.dcmread(out / row["DICOM"] / "0001.dcm"),)
        assert tags.ImageComments == "Synthetic, for research only"
