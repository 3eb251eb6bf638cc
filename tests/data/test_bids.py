"""A BIDS data set from folder to manifest: raw images, runs, entities, participants."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from synthcube.data.manifest import read_manifest
from synthcube.data.preparation import Preparation, prepare
from synthcube.errors import ManifestError

RANDOM = np.random.default_rng(0)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def nifti(path: Path, *shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = RANDOM.integers(0, 1000, shape or (8, 8, 8)).astype("i2")
    nib.save(nib.Nifti1Image(data, AFFINE), path)
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects of two sessions with anatomy, and what else lies in such a folder."""
    root = tmp_path_factory.mktemp("bids")
    for subject in ("01", "02"):
        for session in ("pre", "post"):
            folder = root / f"sub-{subject}" / f"ses-{session}"
            stem = f"sub-{subject}_ses-{session}"
            for run in (1, 2):
                nifti(folder / "anat" / f"{stem}_acq-mprage_run-{run}_T1w.nii.gz")
                nifti(folder / "anat" / f"{stem}_acq-space_run-0{run}_FLAIR.nii.gz")
            nifti(folder / "func" / f"{stem}_task-rest_bold.nii.gz", 8, 8, 8, 6)
            (folder / "func" / f"{stem}_task-rest_bold.json").write_text("{}")
            mask = f"{stem}_run-1_space-T1w_desc-manual_dseg.nii.gz"
            nifti(root / "derivatives" / "masks" / f"sub-{subject}" / mask)
        nifti(root / "derivatives" / "freesurfer" / f"sub-{subject}" / "mri" / "brain.nii.gz")
        nifti(root / "sourcedata" / f"sub-{subject}" / f"sub-{subject}_raw.nii.gz")
    nifti(root / "code" / "template.nii.gz")
    nifti(root / "logo.nii.gz")
    (root / "dataset_description.json").write_text('{"Name": "made", "BIDSVersion": "1.9.0"}')
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-01\t61\tF\nsub-02\t47\tM\n"
    )
    return root


def rows_of(done: Preparation) -> list[dict[str, str]]:
    return [
        {"SubjectID": row.subject, "files": " ".join(path.name for path in row.channels)}
        | dict(row.conditions)
        for row in read_manifest(done.manifest_path).rows
    ]


def told(done: Preparation, root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): reason for path, reason in done.left_out}


def test_runs_are_rows_with_their_entities_and_participants(dataset: Path, tmp_path: Path) -> None:
    done = prepare(dataset, tmp_path, channels=["T1w", "FLAIR"])
    rows = rows_of(done)
    assert len(rows) == 2 * 2 * 2
    assert rows[0] == {
        "SubjectID": "sub-01", "ses": "post", "age": "61", "sex": "F", "run": "1",
        "files": "sub-01_ses-post_acq-mprage_run-1_T1w.nii.gz "
        "sub-01_ses-post_acq-space_run-01_FLAIR.nii.gz",
    }  # fmt: skip
    assert [row["run"] for row in rows] == ["1", "2"] * 4
    assert done.subjects == 2
    reasons = told(done, dataset)
    assert reasons["derivatives"] == (
        "6 images beside the raw ones of a BIDS data set; --derivatives adds them"
    )
    assert reasons["sourcedata"] == "2 images beside the raw ones of a BIDS data set"
    assert reasons["code"] == "1 image beside the raw ones of a BIDS data set"
    assert reasons["logo.nii.gz"] == "no name of BIDS, which begins with sub-LABEL_"
    bold = "sub-01/ses-pre/func/sub-01_ses-pre_task-rest_bold.nii.gz"
    assert reasons[bold] == "matches no channel"


@pytest.fixture
def own_copy(dataset: Path, tmp_path: Path) -> Path:
    """For tests that change it."""
    return Path(shutil.copytree(dataset, tmp_path / "bids"))


def test_sessions_and_scans_are_joined(own_copy: Path, tmp_path: Path) -> None:
    """The nearest table counts: of a file, then of its session, then of its subject."""
    dataset, out = own_copy, tmp_path / "out"
    first = dataset / "sub-01"
    (first / "sub-01_sessions.tsv").write_text(
        "session_id\tage\tweight\tacq_time\nses-pre\t59\tn/a\t2019-01-02\nses-post\t60\t71\t\n"
    )
    names = [
        f"anat/sub-01_ses-pre_acq-{kind}_T1w.nii.gz" for kind in ("mprage_run-1", "mprage_run-2")
    ]
    flair = "anat/sub-01_ses-pre_acq-space_run-01_FLAIR.nii.gz"
    (first / "ses-pre" / "sub-01_ses-pre_scans.tsv").write_text(
        f"filename\tquality\tcoil\n{names[0]}\tgood\tA\n{names[1]}\tpoor\tA\n{flair}\tgood\tB\n"
    )
    done = prepare(dataset, out, channels=["T1w", "FLAIR"])
    rows = {(row["SubjectID"], row["ses"], row["run"]): row for row in rows_of(done)}
    pre = rows["sub-01", "pre", "1"]
    assert (pre["age"], pre["weight"], pre["sex"], pre["quality"]) == ("59", "", "F", "good")
    assert "coil" not in pre, "the channels have different ones"
    assert rows["sub-01", "pre", "2"]["quality"] == "", "its FLAIR is not in scans.tsv"
    assert rows["sub-01", "post", "1"]["weight"] == "71"
    assert rows["sub-02", "pre", "1"]["age"] == "47"
    assert "2019" not in done.manifest_path.read_text()
    told_of = told(done, dataset)
    assert told_of["sub-01/sub-01_sessions.tsv"] == (
        "the column acq_time has dates, which may identify a person"
    )
    assert not [path for path in told_of if path.endswith((".json", "_scans.tsv"))]


def test_a_session_that_is_there_twice_is_refused(own_copy: Path, tmp_path: Path) -> None:
    path = own_copy / "sub-01" / "sub-01_sessions.tsv"
    path.write_text("session_id\tage\nses-pre\t59\npre\t60\n")
    with pytest.raises(ManifestError, match="row 3: ses-pre is there twice"):
        prepare(own_copy, tmp_path / "out")
    path.write_text("session\tage\nses-pre\t59\n")
    with pytest.raises(ManifestError, match="it has no column session_id; it has: session, age"):
        prepare(own_copy, tmp_path / "out")


def test_each_file_is_a_row_with_the_suffix_of_its_name(dataset: Path, tmp_path: Path) -> None:
    done = prepare(dataset, tmp_path, channels=[], volume="first")
    rows = rows_of(done)
    assert len(rows) == 2 * 2 * 5
    assert {row["suffix"] for row in rows} == {"T1w", "FLAIR", "bold"}
    bold = next(row for row in rows if row["suffix"] == "bold")
    assert (bold["task"], bold["run"], bold["age"]) == ("rest", "", "61")
    assert bold["files"] == "sub-01_ses-post_task-rest_volume-0000_bold.nii.gz"
    first = next(row for row in rows if row["suffix"] == "T1w")
    assert (first["acq"], first["run"]) == ("mprage", "1")


def test_derivatives_are_channels_where_they_are_asked_for(dataset: Path, tmp_path: Path) -> None:
    done = prepare(dataset, tmp_path, channels=["T1w", "dseg"], derivatives=True)
    rows = rows_of(done)
    assert len(rows) == 2 * 2, "only the first run has a mask"
    assert rows[0]["files"] == (
        "sub-01_ses-post_acq-mprage_run-1_T1w.nii.gz "
        "sub-01_ses-post_run-1_space-T1w_desc-manual_dseg.nii.gz"
    )
    assert rows[0]["run"] == "1"
    reasons = told(done, dataset)
    brain = "derivatives/freesurfer/sub-01/mri/brain.nii.gz"
    assert reasons[brain].startswith("no name of BIDS")
    second = "sub-02/ses-pre/anat/sub-02_ses-pre_acq-mprage_run-2_T1w.nii.gz"
    assert reasons[second] == "channel 'dseg' has no file"
    assert "derivatives" not in reasons
    # The folder of a pipeline is a data set of its own.
    (tmp_path / "own").mkdir()
    own = prepare(dataset / "derivatives" / "masks", tmp_path / "own")
    assert own.rows == 4


def test_a_run_without_its_partner_is_never_paired_with_another(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for run in (1, 2):
        nifti(root / "sub-1" / "anat" / f"sub-1_run-{run}_T1w.nii.gz")
    nifti(root / "sub-1" / "anat" / "sub-1_run-2_FLAIR.nii.gz")
    nifti(root / "sub-2" / "anat" / "sub-2_T1w.nii.gz")
    nifti(root / "sub-2" / "anat" / "sub-2_FLAIR.nii.gz")
    done = prepare(root, tmp_path / "out", channels=["T1w", "FLAIR"])
    assert [row["files"] for row in rows_of(done)] == [
        "sub-1_run-2_T1w.nii.gz sub-1_run-2_FLAIR.nii.gz", "sub-2_T1w.nii.gz sub-2_FLAIR.nii.gz"
    ]  # fmt: skip
    assert told(done, root) == {"sub-1/anat/sub-1_run-1_T1w.nii.gz": "channel 'FLAIR' has no file"}


def test_a_folder_called_derivatives_in_other_data_counts(tmp_path: Path) -> None:
    root = tmp_path / "data"
    nifti(root / "derivatives" / "a.nii.gz")
    nifti(root / "p1" / "b.nii.gz")
    assert prepare(root, tmp_path / "out").rows == 2


@pytest.mark.slow
def test_bids_goes_from_folder_to_generated_images(cli: Any, dataset: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    words = ("prepare", "-d", dataset, "-o", out, "--channels", "bold", "--volume", "mean")
    code, said, err = cli(*words)
    assert code == 0, err
    assert "4 images of 2 subjects\nChannels: Channel_0 bold\nColumns: ses, task, age, sex" in said
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {name: rectified_flow, channels: [8, 8], num_res_blocks: 1, num_norm_groups: 4,"
        " num_head_channels: 8}\n"
        "data: {size: [8, 8, 8], conditions: {sex: class}, validation_fraction: 0}\n"
        "training: {max_epochs: 1, batch_size: 2, sample_every_n_epochs: 0}\n"
    )
    code, said, err = cli("train", "-c", config, "-d", out, "-o", tmp_path / "run")
    assert code == 0, err
    code, said, err = cli("infer", "-m", tmp_path / "run", "-o", tmp_path / "images", "-n", 2)
    assert code == 0, err
    image = nib.load(tmp_path / "images" / "images" / "00000.nii.gz")
    assert image.shape == (8, 8, 8)
    np.testing.assert_allclose(image.header.get_zooms(), (2, 2, 3))
    assert {path: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == before
