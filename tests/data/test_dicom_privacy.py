"""What identifies a person in DICOM files reaches nothing that is written or printed."""

from __future__ import annotations

import csv
import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pydicom
import pytest
from pydicom._dicom_dict import DicomDictionary

from synthcube.data.preparation import Preparation, prepare

Cli = Callable[..., tuple[int, str, str]]


def rows(done: Preparation) -> list[dict[str, str]]:
    with done.manifest_path.open(newline="") as file:
        return list(csv.DictReader(file))


PLANTED = "Zq9Planted"
"""In every tag that may identify somebody."""


KINDS = {
    **dict.fromkeys(("PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE"), PLANTED),
    "DA": "19031207",
    "TM": "123456.789",
    "UI": "1.2.3.9990999",
}


def save_planted(dicom: ModuleType, patient: str, folder: Path, *, mixed: bool = False) -> Path:
    """A series with a recognisable text in every tag of names, ids, dates, places and free text."""
    frames = dicom.slices(dicom.ct((4, 16, 16), seed=len(patient)), patient=patient)
    with pydicom.config.disable_value_validation():
        for number, data in enumerate(frames):
            for tag, (kind, _, _, retired, keyword) in DicomDictionary.items():
                known = keyword in data or not keyword or retired or tag >> 16 in (0, 2, 4)
                if kind in KINDS and not known:
                    setattr(data, keyword, KINDS[kind])
            data.StudyInstanceUID = f"1.2.3.9990999.1.{len(patient)}"
            data.SeriesInstanceUID = f"1.2.3.9990999.2.{len(patient)}"
            data.SOPInstanceUID = f"1.2.3.9990999.3.{len(patient)}.{number}"
            data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
            data.private_block(0x0011, PLANTED, create=True).add_new(1, "LO", PLANTED)
            data.PatientAge = PLANTED[:4]  # not an age: a warning of pydicom would quote it
        if mixed:
            frames[2].ImageOrientationPatient = list(dicom.SAGITTAL)
        return Path(dicom.save_series(frames, folder))


SECRETS = (b"Zq9P", b"19031207", b"123456.789", b"9990999", b"MRN")


def assert_free_of_secrets(folder: Path, *texts: str) -> None:
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        content += gzip.decompress(content) if content.startswith(b"\x1f\x8b") else b""
        content += str(path.relative_to(folder)).encode()
        assert not [secret for secret in SECRETS if secret in content], path
    for text in texts:
        assert not [secret for secret in SECRETS if secret.decode() in text], text


def test_what_identifies_reaches_no_output(
    cli: Cli, tmp_path: Path, dicom: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for number, patient in enumerate(("MRN1", "MRN22")):
        save_planted(dicom, patient, tmp_path / "in" / f"scan{number}")
    save_planted(dicom, "MRN333", tmp_path / "in" / "scan3", mixed=True)
    file = save_planted(dicom, "MRN4444", tmp_path / "in" / "scan4") / "IM0000.dcm"
    content = file.read_bytes()
    assert all(secret in content for secret in SECRETS)
    file.write_bytes(content[:-100])
    code, printed, errors = cli(
        "prepare", "-d", tmp_path / "in", "-o", tmp_path / "out", "--verify",
        "--dicom_columns", "PatientAge,Modality",
    )  # fmt: skip
    assert code == 0, errors
    assert "2 images of 2 subjects" in printed
    assert printed.count("Left out: ") == 2
    assert_free_of_secrets(tmp_path / "out", printed, errors, caplog.text)


@pytest.mark.slow
def test_what_identifies_reaches_no_artifact(cli: Cli, tmp_path: Path, dicom: ModuleType) -> None:
    for number in range(1, 7):
        save_planted(dicom, "MRN" + "9" * number, tmp_path / "in" / f"scan{number}")
    data, run, shared = (tmp_path / name for name in ("out", "run", "shared"))
    (tmp_path / "c.yaml").write_text(
        "data: {size: [16, 16, 4], intensity_range: [-1024, 2000]}\n"
        "model: {name: rectified_flow, channels: [8, 8], num_res_blocks: 1, attention_from: 2}\n"
        "training: {max_epochs: 1, batch_size: 2, num_sample_images: 1}\n"
        "sampling: {steps: 2}\ncompute: {accelerator: cpu}\n"
    )
    for words in (
        ("prepare", "-d", tmp_path / "in", "-o", data),
        ("train", "-c", tmp_path / "c.yaml", "-d", data, "-o", run),
        ("export", "-m", run, "-o", shared),
    ):
        code, printed, errors = cli(*words)
        assert code == 0, errors
        assert_free_of_secrets(Path(words[-1]), printed, errors)


def test_pseudonyms_do_not_follow_the_ids(tmp_path: Path, dicom: ModuleType) -> None:
    for number in range(12):
        (data,) = dicom.slices(dicom.ct((1, 4, 5)), patient=f"P{number:02d}")
        dicom.save(data, tmp_path / "in" / f"{number:02d}" / "a.dcm")
    done = prepare(tmp_path / "in", tmp_path / "out", dicom_columns=["SeriesNumber"])
    names = [row["SubjectID"] for row in rows(done)]
    assert len(set(names)) == 12
    assert all(len(name) == 16 and name.startswith("sub-") for name in names)
    again = prepare(tmp_path / "in", tmp_path / "again")
    assert [row["SubjectID"] for row in rows(again)] == names
    # of the same patient with other files the name is another: it is no hash of the id
    (data,) = dicom.slices(dicom.ct((1, 4, 5), seed=9), patient="P00")
    dicom.save(data, tmp_path / "other" / "a.dcm")
    assert rows(prepare(tmp_path / "other", tmp_path / "o"))[0]["SubjectID"] not in names
