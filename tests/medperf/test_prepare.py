"""Prepare: a site's raw images, checked and brought to one form."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from synthcube.data.images import read_image, write_image
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError, ImageError, ManifestError, OutputError


def test_prepared_pictures_are_those_of_the_site_and_its_conditions(prepared) -> None:
    for raw, folder in ((prepared.raw, prepared.data), (prepared.raw_labels, prepared.labels)):
        before, after = read_manifest(raw), read_manifest(folder)
        for old, new in zip(before.rows, after.rows, strict=True):
            assert (old.subject, old.label_name) == (new.subject, new.label_name)
            assert old.conditions == new.conditions
            assert torch.equal(read_image(old.channels).tensor, read_image(new.channels).tensor)
            assert read_image(new.channels).file_format == "png"
    assert prepared.check() == "6 images of data_path, 6 images of labels_path"


def test_volumes_get_one_orientation_spacing_and_size_and_keep_their_units(
    tmp_path: Path, new_site
) -> None:
    site = new_site()
    ramp = torch.arange(12.0).view(1, 12, 1, 1).expand(1, 12, 10, 8) * 100 - 500
    flipped = np.diag([-1.0, 1, 2, 1])
    site.raw.mkdir()
    write_image(site.raw / "a.nii.gz", ramp, np.diag([1.0, 1, 2, 1]))
    write_image(site.raw / "b.nii.gz", ramp.flip(1) + 7, flipped)
    shutil.copytree(site.raw, site.raw_labels)
    site.parameters.write_text(
        "data: {spacing_mm: [2, 2, 2], size: [6, 6, 8], fit: crop_or_pad}\nsmallest_group: 2\n"
    )
    site.prepare()
    first, second = (read_image(row.channels) for row in read_manifest(site.data).rows)
    for image in (first, second):
        assert tuple(image.tensor.shape) == (1, 6, 6, 8)
        assert image.tensor[0, :, 3, 4].diff().gt(0).all(), "to the right, whatever the file's way"
        np.testing.assert_allclose(np.diag(image.affine)[:3], [2, 2, 2])
    assert -500 <= float(first.tensor.min()) < -300
    assert 400 < float(first.tensor.max()) <= 600
    assert site.check() == "2 images of data_path, 2 images of labels_path"
    summary = site.statistics()["data"]
    assert summary["size"] == {"6 x 6 x 8": 2}
    assert summary["spacing_mm"][2] == {"mean": 2.0, "std": 0.0}


def test_channels_in_files_of_their_own_stay_so(tmp_path: Path, new_site) -> None:
    site = new_site()
    for folder in (site.raw, site.raw_labels):
        write_phantoms(folder, num=2, size=(16, 16), channels=2)
    site.prepare()
    rows = read_manifest(site.data).rows
    assert {len(row.channels) for row in rows} == {2}
    assert torch.equal(
        read_image(rows[0].channels).tensor,
        read_image(read_manifest(site.raw).rows[0].channels).tensor,
    )


def test_a_table_of_conditions_in_place_of_reference_images(site) -> None:
    subjects = [row["SubjectID"] for row in site.rows(site.raw)]
    write_manifest(
        site.raw / "manifest.csv",
        [{"Channel_0": row["Channel_0"], "SubjectID": row["SubjectID"]}
         for row in site.rows(site.raw)],
    )  # fmt: skip
    shutil.rmtree(site.raw_labels)
    site.raw_labels.mkdir()
    ages = [{"SubjectID": name, "Age": str(40 + i)} for i, name in enumerate(reversed(subjects))]
    write_manifest(site.raw_labels / "ages.csv", ages)
    site.parameters.write_text("data: {conditions: {Age: number}}\n")
    site.prepare()
    by_subject = {row["SubjectID"]: row["Age"] for row in ages}
    for folder in (site.data, site.labels):
        conditions = {row.subject: row.conditions["Age"] for row in read_manifest(folder).rows}
        assert conditions == by_subject
    assert site.statistics()["labels"]["conditions"]["Age"]["mean"] == 42.5

    table = (site.raw_labels / "ages.csv").read_text().replace(",", "\t")
    (site.raw_labels / "ages.csv").unlink()
    (site.raw_labels / "ages.tsv.gz").write_bytes(gzip.compress(table.encode()))
    site.prepare()
    assert site.statistics()["labels"]["conditions"]["Age"]["mean"] == 42.5
    (site.raw_labels / "ages.tsv.gz").unlink()

    write_manifest(site.raw_labels / "ages.csv", [*ages[1:], ages[1]])
    with pytest.raises(ImageError) as caught:
        site.prepare()
    assert len(caught.value.faults) == 2
    assert "is there already" in caught.value.faults[0]
    assert f"{subjects[-1]!r} of the data is not in it" in caught.value.faults[1]


def test_all_faults_at_once_a_report_and_nothing_that_passes_for_good(site, tmp_path: Path) -> None:
    site.prepare()
    names = [row["Channel_0"] for row in site.rows(site.raw)]
    (site.raw / names[0]).write_bytes(b"")
    write_image(site.raw / names[1], torch.full((1, 16, 16), 7.0), np.eye(4))
    (site.raw_labels / names[2]).write_bytes(b"no picture at all")
    write_image(site.raw_labels / names[3], torch.rand(1, 20, 16) * 255, np.eye(4))
    report = tmp_path / "report.yaml"
    with pytest.raises(ImageError, match="The raw images have 4 faults") as caught:
        site.prepare(report_file=report)
    for name, text in zip(names, ("empty", "constant", "", "shape (20, 16)"), strict=False):
        assert sum(name in fault and text in fault for fault in caught.value.faults) == 1
    assert [path.name for folder in (site.data, site.labels) for path in folder.iterdir()] == []
    statuses = yaml.safe_load(report.read_text())
    assert [status["status"] for status in statuses.values()] == ["faulty"] * 4 + ["prepared"] * 2
    assert "constant" in statuses["phantom-00001"]["comment"]
    with pytest.raises(ManifestError, match=r"interrupted: it has no prepared\.json"):
        site.check()


def test_a_preparation_that_was_killed_is_not_taken_for_good(prepared) -> None:
    (prepared.data / "prepared.json").unlink()
    with pytest.raises(ManifestError, match=r"data_path: .*was not prepared, or its preparation"):
        prepared.check()
    with pytest.raises(ManifestError, match="was not prepared"):
        prepared.statistics()
    with pytest.raises(OutputError, match=r"holds files other than prepared images \(images/"):
        prepared.prepare()
    assert len(list((prepared.data / "images").iterdir())) == 6


def test_the_same_again_gives_the_same_and_never_the_input(prepared, new_site, hashes) -> None:
    """MedPerf takes data whose files are the same before and after for unprepared."""
    once = [hashes(prepared.data), hashes(prepared.labels)]
    prepared.prepare()
    assert [hashes(prepared.data), hashes(prepared.labels)] == once
    again = new_site("again")
    again.raw, again.raw_labels = prepared.data, prepared.labels
    again.prepare()
    for before, after in ((prepared.data, again.data), (prepared.labels, again.labels)):
        assert not set(hashes(after).values()) <= set(hashes(before).values())


def test_two_outputs_are_needed(site) -> None:
    site.labels = site.data
    with pytest.raises(OutputError, match=r"output_path .* is also output_labels_path"):
        site.prepare()
    site.labels = site.data / "labels"
    with pytest.raises(OutputError, match=r"output_path .* holds output_labels_path"):
        site.prepare()


def test_what_else_is_in_an_output_is_not_removed(site) -> None:
    site.data.mkdir(parents=True)
    (site.data / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"files other .*thesis\.txt"):
        site.prepare()
    assert (site.data / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("data: {sizes: [8, 8]}", r"data\.sizes \(line 1\): unknown key; did you mean size\?"),
        ("smallest_group: 1", "smallest_group"),
        ("data: {conditions: {Age: number}}", "column 'Age', which is missing or empty"),
        (
            "data: {conditions: {Label: number}}",
            "phantom-00000, column Label: 'disc' is not a number",
        ),
    ],
)
def test_parameters_that_are_wrong(site, parameters: str, expected: str) -> None:
    site.parameters.write_text(parameters)
    with pytest.raises((ConfigError, ImageError), match=expected):
        site.prepare()
