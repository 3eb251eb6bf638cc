"""NIfTI files with volumes in time: which volumes are taken, where they lie, and bad input."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from synthcube.data.manifest import read_manifest
from synthcube.data.preparation import prepare
from synthcube.data.time_series import num_volumes
from synthcube.errors import ManifestError, OutputError

RANDOM = np.random.default_rng(0)
_C, _S = np.cos(0.4), np.sin(0.4)
OBLIQUE = np.array([[0, -_C, _S, 4], [1, 0, 0, -5], [0, _S, _C, 6], [0, 0, 0, 1]]) @ np.diag(
    [2, 1.8, 3, 1]
)


def series(path: Path, data: np.ndarray, **header: Any) -> Path:
    """A file as a scanner's: with a repetition time, and a text that is nobody's business."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, OBLIQUE)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = 2.5
    image.header["descrip"] = b"Jane Doe"
    if header:
        image.header.set_slope_inter(**header)
    nib.save(image, path)
    return path


def integers(*shape: int) -> np.ndarray:
    return RANDOM.integers(-500, 500, shape).astype("i2")


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.nii*"))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize(
    ("choice", "name"),
    [("mean", "volume-mean"), ("first", "volume-0000"), ("4", "volume-0004")],
)
def test_one_volume_is_a_3d_file_with_the_geometry_of_the_series(
    tmp_path: Path, choice: str, name: str, suffix: str
) -> None:
    data = integers(5, 6, 7, 9)
    source = series(tmp_path / "data" / "p1" / f"rest{suffix}", data)
    nib.save(nib.Nifti1Image(integers(5, 6, 7), OBLIQUE), tmp_path / "data" / "p1" / "t1.nii.gz")
    done = prepare(tmp_path / "data", tmp_path / "out", volume=choice, channels=["t1", "rest"])
    (row,) = read_manifest(done.manifest_path).rows
    anatomy, path = row.channels
    assert anatomy.name == "t1.nii.gz"
    assert path.relative_to(tmp_path / "out").as_posix() == f"volumes/p1/rest_{name}.nii.gz"
    image = nib.load(path)
    expected = data.mean(-1) if choice == "mean" else data[..., 0 if choice == "first" else 4]
    np.testing.assert_allclose(image.get_fdata(), expected, rtol=1e-6)
    assert image.get_data_dtype() == (np.float32 if choice == "mean" else np.int16)
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
    assert image.header["dim"].tolist()[:5] == [3, 5, 6, 7, 1]
    assert image.header.get_xyzt_units() == ("mm", "unknown")
    assert b"Jane" not in gzip.decompress(path.read_bytes())
    ours, theirs = sitk.ReadImage(str(path)), sitk.ReadImage(str(source))[:, :, :, 0]
    for ask in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(ours, ask)(), getattr(theirs, ask)(), atol=1e-5)


def test_each_volume_is_a_row_of_its_subject(cli: Any, tmp_path: Path) -> None:
    data = integers(4, 4, 4, 3)
    for subject in ("a", "b"):
        series(tmp_path / "data" / subject / "x.nii.gz", data)
        series(tmp_path / "data" / subject / "y.nii.gz", data + 1)
    words = ("prepare", "-d", tmp_path / "data", "-o", tmp_path / "out", "--volume", "each")
    code, said, err = cli(*words, "--channels", "x,y", "--validation", "0.5")
    assert code == 0, err
    assert "6 images of 2 subjects" in said
    assert "Columns: Volume" in said
    rows = read_manifest(tmp_path / "out").rows
    assert [(row.subject, row.conditions["Volume"]) for row in rows] == [
        (subject, number) for subject in "ab" for number in "012"
    ]
    for number in range(3):
        first, second = (nib.load(path).get_fdata() for path in rows[number].channels)
        np.testing.assert_array_equal(first, data[..., number])
        np.testing.assert_array_equal(second, first + 1)
    assert {row.split for row in rows if row.subject == "a"} != {
        row.split for row in rows if row.subject == "b"
    }
    before = {name: (tmp_path / "out" / name).read_bytes() for name in written(tmp_path / "out")}
    assert cli(*words, "--channels", "x,y", "--validation", "0.5")[0] == 0, "it may be repeated"
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}


def test_volumes_of_a_csv_without_subjects_stay_together(tmp_path: Path) -> None:
    for name in ("a", "b"):
        series(tmp_path / "data" / f"{name}.nii.gz", integers(4, 4, 4, 2))
    (tmp_path / "list.csv").write_text("Channel_0,Age\ndata/a.nii.gz,5\ndata/b.nii.gz,6\n")
    done = prepare(tmp_path / "list.csv", tmp_path / "out", volume="each")
    rows = read_manifest(done.manifest_path).rows
    assert [(row.subject, *row.conditions.values()) for row in rows] == [
        ("row-0", "5", "0"), ("row-0", "5", "1"), ("row-1", "6", "0"), ("row-1", "6", "1")
    ]  # fmt: skip
    assert written(tmp_path / "out")[0] == "volumes/data/a_volume-0000.nii.gz"


def test_scale_factors_are_applied(tmp_path: Path) -> None:
    stored = integers(3, 3, 3, 5)
    path = series(tmp_path / "data" / "a.nii", stored * 0.5 + 7.0, slope=0.5, inter=7.0)
    done = prepare(tmp_path / "data", tmp_path / "out", volume="1")
    (row,) = read_manifest(done.manifest_path).rows
    image = nib.load(row.channels[0])
    np.testing.assert_allclose(image.get_fdata(), nib.load(path).get_fdata()[..., 1], rtol=1e-6)
    assert image.get_data_dtype() == np.float32


def test_without_a_choice_a_series_is_left_out_and_told_what_to_type(
    cli: Any, tmp_path: Path
) -> None:
    series(tmp_path / "data" / "p1" / "rest.nii.gz", integers(4, 4, 4, 6))
    series(tmp_path / "data" / "p2" / "channels.nii.gz", integers(4, 4, 4, 2))
    words = ("prepare", "-d", tmp_path / "data", "-o", tmp_path / "out")
    code, said, err = cli(*words)
    assert code == 0, err
    assert "1 images of 1 subjects" in said, "two volumes are channels"
    assert "rest.nii.gz: volumes in time: --volume mean (or first, a number, each)" in said
    (tmp_path / "data" / "p2" / "channels.nii.gz").unlink()
    code, _, err = cli(*words[:-1], tmp_path / "other")
    assert code == 2
    assert "rest.nii.gz: volumes in time: --volume mean" in err
    assert not (tmp_path / "other").exists()
    config = tmp_path / "c.yaml"
    config.write_text("data: {size: [4, 4, 4]}\n")
    code, _, err = cli("check", "-c", config, "-d", tmp_path / "data")
    assert code == 2
    assert "volumes in time, or more than 4 channels" in err
    assert "synthcube prepare --volume mean" in err


def test_what_cannot_be_read_is_left_out_and_the_rest_goes_on(cli: Any, tmp_path: Path) -> None:
    folder, data = tmp_path / "data", integers(8, 8, 8, 6)
    whole = series(folder / "whole.nii.gz", data)
    (folder / "cut.nii.gz").write_bytes(whole.read_bytes()[:3000])
    plain = series(tmp_path / "plain.nii", data).read_bytes()
    (folder / "cut.nii").write_bytes(plain[:-100])
    (folder / "magic.nii").write_bytes(b"PK" + plain[2:])
    holes = data.astype("f4")
    holes[0, 0, 0, 2] = np.nan
    series(folder / "holes.nii.gz", holes)
    series(folder / "short.nii.gz", data[..., :5])
    colours = np.zeros((4, 4, 4, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, OBLIQUE), folder / "colours.nii")
    words = ("prepare", "-d", folder, "-o", tmp_path / "out", "--verify", "--volume", "5")
    code, said, err = cli(*words)
    assert code == 0, err
    assert written(tmp_path / "out") == [
        "volumes/holes_volume-0005.nii.gz", "volumes/whole_volume-0005.nii.gz"
    ]  # fmt: skip
    told = {line.split(": ")[1].rsplit("/")[-1]: line for line in said.splitlines()
            if line.startswith("Left out")}  # fmt: skip
    assert "is cut short or damaged" in told["cut.nii.gz"]
    assert "is cut short or damaged" in told["cut.nii"]
    assert "is not a NIfTI image" in told["magic.nii"]
    assert "has no volume 5: it has 5, 0 to 4" in told["short.nii.gz"]
    assert "holds colours" in told["colours.nii"]
    code, said, err = cli(*words[:3], "-o", tmp_path / "mean", "--volume", "mean")
    assert code == 0, err
    assert "holes.nii.gz: holds 1 NaN" in said
    assert written(tmp_path / "mean") == [
        f"volumes/{name}_volume-mean.nii.gz" for name in ("short", "whole")
    ]


def test_channels_of_different_lengths_are_no_rows(tmp_path: Path) -> None:
    series(tmp_path / "data" / "p" / "x.nii.gz", integers(4, 4, 4, 3))
    series(tmp_path / "data" / "p" / "y.nii.gz", integers(4, 4, 4, 2))
    with pytest.raises(ManifestError, match="its channels have 3, 2 volumes"):
        prepare(tmp_path / "data", tmp_path / "out", volume="each", channels=["x", "y"])
    assert (
        prepare(tmp_path / "data", tmp_path / "out", volume="mean", channels=["x", "y"]).rows == 1
    )


@pytest.mark.parametrize("choice", ["median", "-1", "", "1.5", "²"])
def test_an_unknown_choice_is_refused(tmp_path: Path, choice: str) -> None:
    series(tmp_path / "data" / "a.nii.gz", integers(4, 4, 4, 3))
    with pytest.raises(ManifestError, match="mean, first, each or a number is needed"):
        prepare(tmp_path / "data", tmp_path / "out", volume=choice)


def test_files_of_others_are_not_replaced_and_inputs_not_written_to(tmp_path: Path) -> None:
    series(tmp_path / "data" / "a.nii.gz", integers(4, 4, 4, 3))
    own = series(tmp_path / "out" / "volumes" / "a_volume-mean.nii.gz", integers(4, 4, 4))
    before = own.read_bytes()
    with pytest.raises(OutputError, match=r"a_volume-mean\.nii\.gz is a file that this command"):
        prepare(tmp_path / "data", tmp_path / "out", volume="mean")
    assert own.read_bytes() == before
    with pytest.raises(OutputError, match="lies in data_path"):
        prepare(tmp_path / "data", tmp_path / "data", volume="mean")
    (tmp_path / "list.csv").write_text("Channel_0,Volume\ndata/a.nii.gz,5\n")
    with pytest.raises(ManifestError, match="has a column Volume"):
        prepare(tmp_path / "list.csv", tmp_path / "two", volume="each")


def test_two_volumes_at_most_are_in_memory(tmp_path: Path) -> None:
    side, count = 48, 120  # 26 MB, of which a volume is 0.2 MB, and 0.9 MB as float64
    (tmp_path / "data").mkdir()
    image = nib.Nifti1Image(np.zeros((side, side, side, count), dtype="i2"), OBLIQUE)
    image.to_filename(tmp_path / "data" / "a.nii.gz")
    tracemalloc.start()
    try:
        for choice in ("mean", "119"):
            prepare(tmp_path / "data", tmp_path / "out", volume=choice)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6


def test_the_header_alone_tells_the_number_of_volumes(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    for shape, count in (((4, 4, 4), 1), ((4, 4, 4, 1), 1), ((4, 4, 4, 7), 7),
                         ((4, 4, 4, 7, 1), 7), ((4, 4, 4, 1, 3), 1)):  # fmt: skip
        nib.save(nib.Nifti1Image(np.zeros(shape, "u1"), OBLIQUE), path)
        path.write_bytes(path.read_bytes()[:600])  # nothing but the header
        assert num_volumes(path) == count
    path.write_bytes(b"x")
    assert num_volumes(path) == 1
    assert num_volumes(tmp_path / "a.png") == 1
