"""Which prediction is whose: what infer wrote, other tools' folders, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from synthcube.data.manifest import read_manifest
from synthcube.data.transforms import DataConfig
from synthcube.errors import ManifestError
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.images import open_sets
from synthcube.evaluation.pairs.findings import compare
from synthcube.evaluation.pairs.pairing import paired

VOXELS = np.zeros((3, 1, 4, 4))


@pytest.fixture
def labels(image_set):
    return image_set("labels", VOXELS, subjects=["a", "b", "c"])


def sources(labels, order):
    return [{"Source": str(labels.rows[i].channels[0])} for i in order]


def test_translations_find_the_file_they_were_made_from(image_set, labels) -> None:
    made = image_set(
        "made", VOXELS, subjects=["x", "x", "x"], conditions=sources(labels, (2, 0, 1))
    )
    assert paired(made, labels, None) == [(0, 2), (1, 0), (2, 1)]
    assert paired(made, labels, False) is None


def test_a_source_elsewhere_is_found_by_subject_then_by_name(image_set, labels) -> None:
    elsewhere = [{"Source": f"/mnt/data/{name}.nii.gz"} for name in ("t2", "t3", "t1")]
    made = image_set("made", VOXELS, subjects=["b", "c", "a"], conditions=elsewhere)
    assert paired(made, labels, None) == [(0, 1), (1, 2), (2, 0)]
    names = [{"Source": f"/mnt/data/0000{i}.png"} for i in (1, 2, 0)]
    made = image_set("named", VOXELS, subjects=["s", "s", "s"], conditions=names)
    assert paired(made, labels, None) == [(0, 1), (1, 2), (2, 0)]


def test_images_out_of_noise_are_not_paired_by_their_running_numbers(image_set) -> None:
    numbers = ["00000", "00001", "00002"]
    labels = image_set("labels", VOXELS, subjects=numbers)
    made = image_set("made", VOXELS, subjects=numbers, conditions=[{"Seed": "1"}] * 3)
    assert paired(made, labels, None) is None
    assert paired(made, labels, True) == [(0, 0), (1, 1), (2, 2)]


def test_another_tools_folder_is_paired_where_all_names_match(image_set, labels) -> None:
    files = ["00002.nii.gz", "00000.nii.gz", "00001.nii.gz"]
    made = image_set("made", VOXELS, files=files)
    assert paired(made, labels, None) == [(0, 2), (1, 0), (2, 1)]
    files[0] = "other.nii.gz"
    assert paired(image_set("unlike", VOXELS, files=files), labels, None) is None


def test_row_numbers_are_no_subjects(image_set) -> None:
    """Two CSVs without SubjectID that are sorted differently."""
    numbers = [f"row-{i + 2}" for i in range(3)]
    labels = image_set("labels", VOXELS, subjects=numbers, files=["c.png", "a.png", "b.png"])
    made = image_set(
        "made", VOXELS, subjects=numbers, files=["00002-row-2.png", "00003-row-3.png", "x.png"],
        conditions=[{"Source": f"/in/{name}.png"} for name in "abc"],
    )  # fmt: skip
    assert paired(made, labels, None) == [(0, 1), (1, 2), (2, 0)]


def test_all_that_is_missing_extra_or_ambiguous_is_named_at_once(image_set) -> None:
    labels = image_set("labels", np.zeros((4, 1, 4, 4)), subjects=["a", "b", "c", "d"])
    made = image_set(
        "made", np.zeros((4, 1, 4, 4)), subjects=["a", "b", "b", "stranger"],
        conditions=[{"Source": f"/in/{name}.png"} for name in ("p", "q", "r", "s")],
    )  # fmt: skip
    with pytest.raises(ManifestError, match="do not belong together") as raised:
        paired(made, labels, None)
    text = str(raised.value)
    assert "by SubjectID" in text
    assert "made/00003.png has no label" in text
    assert "labels/00002.png has no prediction" in text
    assert "labels/00003.png has no prediction" in text
    assert "labels/00001.png fits 2 predictions" in text
    assert "made/00002.png" in text


def test_wanted_pairs_that_are_none_are_refused(image_set, labels) -> None:
    made = image_set("made", VOXELS, files=["x.png", "y.png", "z.png"])
    with pytest.raises(ManifestError, match="3 predictions and 3 labels do not belong together"):
        paired(made, labels, True)


def test_what_infer_writes_is_paired(cli, first_stage, phantoms, tmp_path) -> None:
    """A real reconstruction finds its originals; the labels are shuffled in between."""
    run = first_stage("autoencoder_kl")
    assert cli("infer", "-m", run, "-d", phantoms, "-o", tmp_path / "made")[0] == 0
    lines = (phantoms / "manifest.csv").read_text().splitlines()
    (phantoms / "shuffled.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    work = tmp_path / "work"
    work.mkdir()
    paths = {"predictions": tmp_path / "made", "labels": phantoms / "shuffled.csv"}
    manifests = {name: read_manifest(path) for name, path in paths.items()}
    sets, faults = open_sets(manifests, DataConfig(), work)
    assert not faults
    made, labels = sets["predictions"], sets["labels"]
    pairs = paired(made, labels, None)
    assert pairs == [(i, 11 - i) for i in range(12)]
    section = compare(made, labels, pairs, EvaluationConfig())
    for case in section.cases:
        assert case["subject"] in str(case["prediction"])
    assert section.facts["data_range_is"] == "pictures of 8 bits"
