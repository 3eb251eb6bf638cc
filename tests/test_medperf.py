"""MedPerf's tasks, from a site's raw images to the numbers that leave it."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from synthcube.data.images import read_image, write_image
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.errors import (
    ArtifactError,
    ConfigError,
    EvaluationError,
    ImageError,
    ManifestError,
    OutputError,
)
from synthcube.storage import sha256
from synthcube.tasks.medperf.demo import write_demo
from synthcube.tasks.medperf.prepare import prepare
from synthcube.tasks.medperf.sanity_check import sanity_check
from synthcube.tasks.medperf.statistics import shown_groups, statistics


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Site:
    """The folders of a site, and the preparator's tasks on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.raw_labels = folder / "raw", folder / "raw_labels"
        self.data, self.labels = folder / "data", folder / "labels"
        self.parameters = folder / "parameters.yaml"
        folder.mkdir()
        self.parameters.write_text("{}\n")

    def prepare(self, **options: Path) -> str:
        return prepare(
            self.raw, self.raw_labels, self.data, self.labels,
            parameters_file=self.parameters, **options,
        )  # fmt: skip

    def check(self, **options: Path) -> str:
        return sanity_check(self.data, self.labels, parameters_file=self.parameters, **options)

    def statistics(self) -> dict:
        path = statistics(
            self.data, self.labels, self.folder / "statistics.yaml", parameters_file=self.parameters
        )
        return yaml.safe_load(path.read_text())

    def rows(self, folder: Path) -> list[dict[str, str]]:
        header, *lines = (folder / "manifest.csv").read_text().splitlines()
        return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]

    def rewrite(self, folder: Path, rows: list[dict[str, str]]) -> None:
        write_manifest(folder / "manifest.csv", rows)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = Site(tmp_path / "site")
    for folder in (found.raw, found.raw_labels):
        write_phantoms(folder, num=6, size=(16, 16))
    return found


@pytest.fixture
def prepared(site: Site) -> Site:
    site.prepare()
    return site


# prepare


def test_prepared_pictures_are_those_of_the_site_and_its_conditions(prepared: Site) -> None:
    for raw, folder in ((prepared.raw, prepared.data), (prepared.raw_labels, prepared.labels)):
        before, after = read_manifest(raw), read_manifest(folder)
        for old, new in zip(before.rows, after.rows, strict=True):
            assert (old.subject, old.label_name) == (new.subject, new.label_name)
            assert old.conditions == new.conditions
            assert torch.equal(read_image(old.channels).tensor, read_image(new.channels).tensor)
            assert read_image(new.channels).file_format == "png"
    assert prepared.check() == "6 images of data_path, 6 images of labels_path"


def test_volumes_get_one_orientation_spacing_and_size_and_keep_their_units(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path / "site")
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
    told = site.statistics()["data"]
    assert told["size"] == {"6 x 6 x 8": 2}
    assert told["spacing_mm"][2] == {"mean": 2.0, "std": 0.0}


def test_channels_in_files_of_their_own_stay_so(tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    for folder in (site.raw, site.raw_labels):
        write_phantoms(folder, num=2, size=(16, 16), channels=2)
    site.prepare()
    rows = read_manifest(site.data).rows
    assert {len(row.channels) for row in rows} == {2}
    assert torch.equal(
        read_image(rows[0].channels).tensor,
        read_image(read_manifest(site.raw).rows[0].channels).tensor,
    )


def test_a_table_of_conditions_in_place_of_reference_images(site: Site) -> None:
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
    by_subject = {each["SubjectID"]: each["Age"] for each in ages}
    for folder in (site.data, site.labels):
        found = {row.subject: row.conditions["Age"] for row in read_manifest(folder).rows}
        assert found == by_subject
    assert site.statistics()["labels"]["conditions"]["Age"]["mean"] == 42.5

    write_manifest(site.raw_labels / "ages.csv", [*ages[1:], ages[1]])
    with pytest.raises(ImageError) as caught:
        site.prepare()
    assert len(caught.value.faults) == 2
    assert "is there already" in caught.value.faults[0]
    assert f"{subjects[-1]!r} of the data is not in it" in caught.value.faults[1]


def test_all_faults_at_once_a_report_and_nothing_that_passes_for_good(
    site: Site, tmp_path: Path
) -> None:
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
    told = yaml.safe_load(report.read_text())
    assert [each["status"] for each in told.values()] == ["faulty"] * 4 + ["prepared"] * 2
    assert "constant" in told["phantom-00001"]["comment"]
    with pytest.raises(ManifestError, match=r"cut short: it has no prepared\.json"):
        site.check()


def test_a_preparation_that_was_killed_is_not_taken_for_good(prepared: Site) -> None:
    (prepared.data / "prepared.json").unlink()
    with pytest.raises(ManifestError, match=r"data_path: .*was not prepared, or its preparation"):
        prepared.check()
    with pytest.raises(ManifestError, match="was not prepared"):
        prepared.statistics()
    prepared.prepare()
    prepared.check()


def test_the_same_again_gives_the_same_and_never_the_input(prepared: Site) -> None:
    """MedPerf takes data whose files are the same before and after for unprepared."""
    once = [hashes(prepared.data), hashes(prepared.labels)]
    prepared.prepare()
    assert [hashes(prepared.data), hashes(prepared.labels)] == once
    again = Site(prepared.folder / "again")
    again.raw, again.raw_labels = prepared.data, prepared.labels
    again.prepare()
    for before, after in ((prepared.data, again.data), (prepared.labels, again.labels)):
        assert not set(hashes(after).values()) <= set(hashes(before).values())


def test_two_outputs_are_needed(site: Site) -> None:
    site.labels = site.data
    with pytest.raises(OutputError, match="are both"):
        site.prepare()


def test_what_else_is_in_an_output_is_not_removed(site: Site) -> None:
    site.data.mkdir(parents=True)
    (site.data / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"something else .*thesis\.txt"):
        site.prepare()
    assert (site.data / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("data: {sise: [8, 8]}", r"data\.sise \(line 1\): unknown key; did you mean size\?"),
        ("smallest_group: 1", "smallest_group"),
        ("data: {conditions: {Age: number}}", "column 'Age', which is missing or empty"),
        (
            "data: {conditions: {Label: number}}",
            "phantom-00000, column Label: 'disc' is not a number",
        ),
    ],
)
def test_parameters_that_are_wrong(site: Site, parameters: str, expected: str) -> None:
    site.parameters.write_text(parameters)
    with pytest.raises((ConfigError, ImageError), match=expected):
        site.prepare()


# sanity check


def test_sound_volumes_of_another_size_than_asked_for_are_named(prepared: Site) -> None:
    prepared.parameters.write_text("data: {size: [32, 32]}")
    with pytest.raises(ManifestError, match="12 faults") as caught:
        prepared.check()
    assert "size [16, 16, 1], data.size is [32, 32]" in caught.value.faults[0]


def replaced(site: Site, name: str, tensor: torch.Tensor) -> None:
    """Another image under that name, with an index that knows of it: only content is at fault."""
    path = site.data / name
    path.unlink()
    write_image(path, tensor, np.eye(4))
    index = json.loads((site.data / "prepared.json").read_text())
    index["files"][name] = sha256(path)
    (site.data / "prepared.json").write_text(json.dumps(index))


def test_damage_after_the_preparation_is_found(prepared: Site) -> None:
    rows = prepared.rows(prepared.data)
    (prepared.data / rows[0]["Channel_0"]).write_bytes(b"")
    (prepared.labels / rows[1]["Channel_0"]).unlink()
    replaced(prepared, rows[2]["Channel_0"], torch.full((1, 16, 16), 3.0))
    replaced(prepared, rows[3]["Channel_0"], torch.rand(1, 16, 17) * 255)
    with pytest.raises(ManifestError) as caught:
        prepared.check()
    told = "\n".join(caught.value.faults)
    for name, text in (
        (rows[0]["Channel_0"], "has changed since it was prepared"),
        (rows[0]["Channel_0"], "is empty"),
        (rows[1]["Channel_0"], "missing"),
        (rows[2]["Channel_0"], "constant image: every voxel is 3"),
        (rows[3]["Channel_0"], "shape (16, 17, 1)"),
    ):
        assert any(name in line and text in line for line in told.splitlines()), (name, told)


def test_voxels_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    site = Site(tmp_path / "site")
    for folder in (site.raw, site.raw_labels):
        write_phantoms(folder, num=3, size=(8, 8, 8))
    site.prepare()
    import nibabel as nib

    name = site.rows(site.data)[1]["Channel_0"]
    voxels = np.full((8, 8, 8), np.nan, np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), site.data / name)
    with pytest.raises(ManifestError, match=f"{name} holds 512 NaN"):
        site.check()


def test_a_subject_in_two_splits_is_named(site: Site) -> None:
    rows = [{**row, "Split": "test"} for row in site.rows(site.raw)]
    site.rewrite(site.raw, rows)
    site.rewrite(site.raw_labels, [{**rows[0], "Split": "train"}, *rows[1:]])
    site.prepare()
    with pytest.raises(ManifestError, match="'phantom-00000' is in several splits: test, train"):
        site.check()


def test_one_image_under_two_names_is_named(site: Site) -> None:
    rows = site.rows(site.raw)
    shutil.copy(site.raw / rows[0]["Channel_0"], site.raw / "copy.png")
    site.rewrite(site.raw, [*rows, {**rows[0], "Channel_0": "copy.png", "SubjectID": "Jane"}])
    site.prepare()
    with pytest.raises(ManifestError, match="same image belongs to different subjects") as caught:
        site.check()
    assert "'phantom-00000'" in str(caught.value)
    assert "'Jane'" in str(caught.value)


def test_images_that_are_used_elsewhere_are_named(prepared: Site, tmp_path: Path) -> None:
    other = Site(tmp_path / "other")
    write_phantoms(other.raw, num=2, size=(16, 16))
    write_phantoms(other.raw_labels, num=2, size=(16, 16))
    other.prepare(metadata_path=tmp_path / "metadata")
    known = tmp_path / "additional_files"
    known.mkdir()
    assert prepared.check(additional_files=known)
    listed = (tmp_path / "metadata" / "voxels.json").read_text()
    assert "phantom" not in listed, "it is shown to others"
    (known / "training-set.json").write_text(listed)
    with pytest.raises(ManifestError) as caught:
        prepared.check(additional_files=known)
    told = [each for each in caught.value.faults if "used elsewhere (training-set.json)" in each]
    assert len(told) == 2
    (known / "training-set.json").write_text("{}")
    with pytest.raises(ManifestError, match="not a list of digests"):
        prepared.check(additional_files=known)


# statistics


def test_statistics_tell_of_groups_alone_and_are_right(prepared: Site) -> None:
    path = prepared.folder / "statistics.yaml"
    told = prepared.statistics()
    assert told["smallest_group"] == 5
    data = told["data"]
    assert (data["images"], data["subjects"], data["channels"]) == (6, 6, 1)
    assert data["conditions"]["Label"] == {"subjects": {}, "some_left_out": True}
    voxels = np.concatenate(
        [
            read_image(row.channels).tensor.numpy().ravel()
            for row in read_manifest(prepared.data).rows
        ]
    )
    assert data["intensity"][0]["mean"] == pytest.approx(voxels.mean(), rel=1e-3)
    assert data["intensity"][0]["std"] == pytest.approx(voxels.std(), rel=1e-3)
    assert data["intensity"][0]["percentiles"]["50"] == pytest.approx(np.median(voxels), abs=2)
    text = path.read_text()
    for row in read_manifest(prepared.data).rows:
        assert row.subject not in text
        assert row.channels[0].name not in text
    assert str(prepared.folder) not in text


def test_statistics_of_too_few_subjects_tell_nothing(prepared: Site) -> None:
    prepared.parameters.write_text("smallest_group: 7")
    told = prepared.statistics()
    assert told["data"] == {"images": None, "reason": "there are fewer than 7 subjects"}


def test_many_images_of_one_person_are_no_group(site: Site) -> None:
    for folder in (site.raw, site.raw_labels):
        site.rewrite(folder, [{**row, "SubjectID": "Jane"} for row in site.rows(folder)])
    site.prepare()
    assert site.statistics()["data"]["images"] is None


def test_a_small_group_cannot_be_computed_from_the_others() -> None:
    assert shown_groups({"a": 20, "b": 9, "c": 2}, 5) == {"a": 20}
    assert shown_groups({"a": 20, "b": 9, "c": 3, "d": 3}, 5) == {"a": 20, "b": 9}
    assert shown_groups({"a": 20, "b": 9}, 5) == {"a": 20, "b": 9}
    assert shown_groups({"a": 2}, 5) == {}
    assert shown_groups({}, 5) == {}


# infer


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that follows Label and Radius, trained for one epoch."""
    from synthcube.tasks.train import train

    folder = tmp_path_factory.mktemp("conditional")
    config = {
        "model": {"name": "rectified_flow", "channels": [8, 8], "num_res_blocks": 1,
                  "attention_from": 1, "num_sampling_steps": 2},
        "data": {"conditions": {"Label": "class", "Radius": "number"}, "validation_fraction": 0},
        "training": {"max_epochs": 1, "batch_size": 6, "num_sample_images": 1},
        "compute": {"accelerator": "cpu", "precision": "32"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    data = write_phantoms(folder / "data", num=6, size=(16, 16)).parent
    train(folder / "config.yaml", data, folder / "run")
    return folder / "run"


@pytest.fixture
def package_of(tmp_path: Path):
    def make(run: Path, name: str = "cube") -> Path:
        from synthcube.tasks.package import package

        return package(run, tmp_path / name, image="registry.example/synthcube:1")

    return make


def predicted(site: Site, package: Path, parameters: str, name: str = "predictions") -> list:
    from synthcube.tasks.medperf.infer import infer

    path = site.folder / "model.yaml"
    path.write_text(parameters)
    infer(
        site.data, site.folder / name, package / "workspace" / "additional_files",
        parameters_file=path,
    )  # fmt: skip
    return list(read_manifest(site.folder / name).rows)


def test_a_packaged_model_generates_what_its_parameters_say(
    prepared: Site, conditional: Path, package_of
) -> None:
    cube = package_of(conditional)
    before = hashes(prepared.data)
    rows = predicted(prepared, cube, "task: generate\nsampling: {num_images: 3}\nseed: 5")
    assert len(rows) == 3
    own = (cube / "workspace" / "parameters.yaml").read_text()
    assert len(predicted(prepared, cube, own, "by-default")) == 16
    of_classes = "sampling: {num_images: {disc: 2, ring: 1}}"
    rows = predicted(prepared, cube, of_classes, "of-classes")
    assert [row.label_name for row in rows] == ["disc", "disc", "ring"]
    assert hashes(prepared.data) == before


def test_images_that_follow_the_prepared_conditions(
    prepared: Site, conditional: Path, package_of
) -> None:
    cube = package_of(conditional)
    rows = predicted(prepared, cube, "conditions: prepared\nsampling: {batch_size: 4}")
    wanted = read_manifest(prepared.data).rows
    assert [row.label_name for row in rows] == [row.label_name for row in wanted]
    for row, wish in zip(rows, wanted, strict=True):
        assert float(row.conditions["Radius"]) == pytest.approx(
            float(wish.conditions["Radius"]), abs=1e-3
        )
    more = predicted(prepared, cube, "conditions: prepared\nsampling: {num_images: 8}", "more")
    assert [row.label_name for row in more[6:]] == [row.label_name for row in wanted[:2]]


def test_prepared_conditions_that_the_model_does_not_know(
    site: Site, conditional: Path, package_of
) -> None:
    rows = site.rows(site.raw)
    site.rewrite(site.raw, [{**rows[0], "Radius": "99"}, *rows[1:]])
    site.prepare()
    cube = package_of(conditional)
    with pytest.raises(ConfigError, match="Radius=99: it was trained on"):
        predicted(site, cube, "conditions: prepared")
    known = "conditions: prepared\nbeyond_training: leave_out"
    assert len(predicted(site, cube, known, "known")) == 5


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("task: translate", "makes images of no others"),
        ("task: reconstruct", "does not reconstruct"),
        ("task: dance", "task .*generate"),
        ("task: reconstruct\nconditions: prepared", "is for task: generate"),
        ("conditions: prepared\nsampling: {num_images: {disc: 2}}", "must be a number"),
        ("sampling: {number: 2}", "unknown key"),
    ],
)
def test_what_a_model_cannot_do(
    prepared: Site, conditional: Path, package_of, parameters: str, expected: str
) -> None:
    from synthcube.errors import SynthCubeError

    with pytest.raises(SynthCubeError, match=expected):
        predicted(prepared, package_of(conditional), parameters)


def test_an_autoencoder_reconstructs_prepared_images(
    prepared: Site, first_stage, package_of
) -> None:
    cube = package_of(first_stage("vqvae"))
    assert yaml.safe_load((cube / "workspace" / "parameters.yaml").read_text())["task"] == (
        "reconstruct"
    )
    rows = predicted(prepared, cube, "task: reconstruct")
    assert [row.subject for row in rows] == [
        row.subject for row in read_manifest(prepared.data).rows
    ]


def test_additional_files_must_hold_one_model(
    prepared: Site, conditional: Path, package_of, tmp_path: Path
) -> None:
    from synthcube.tasks.medperf.infer import find_model

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtifactError, match="holds no trained model"):
        find_model(empty)
    cube = package_of(conditional)
    model = cube / "workspace" / "additional_files" / "model"
    assert find_model(model) == model
    assert find_model(model.parent) == model
    shutil.copytree(model, model.parent / "other")
    with pytest.raises(ArtifactError, match=r"several models \(model, other\)"):
        find_model(model.parent)


# evaluate


def test_numbers_leave_and_cases_stay(prepared: Site, conditional: Path, package_of) -> None:
    from synthcube.tasks.medperf.evaluate import evaluate

    predicted(prepared, package_of(conditional), "conditions: prepared")
    parameters = prepared.folder / "evaluation.yaml"
    parameters.write_text("evaluation: {extractor: {name: random-projection}, num_repeats: 2}")
    results, local = prepared.folder / "results.yaml", prepared.folder / "local"
    train_data = prepared.folder / "additional_files" / "train_data"
    write_phantoms(train_data, num=6, size=(16, 16), seed=1)
    for _ in range(2):
        evaluate(
            prepared.folder / "predictions", prepared.labels, results,
            parameters_file=parameters, additional_files=train_data.parent,
            local_outputs_path=local,
        )  # fmt: skip
    told = yaml.safe_load(results.read_text())
    assert {name: each["count"] for name, each in told["images"].items()} == {
        "predictions": 6, "labels": 6, "train_data": 6,
    }  # fmt: skip
    assert "phantom" not in results.read_text()
    assert str(prepared.folder) not in results.read_text()
    assert (local / "report" / "report.html").is_file()


def test_results_that_name_a_subject_do_not_leave(prepared: Site) -> None:
    from synthcube.tasks.medperf.evaluate import check_anonymous

    folders = [prepared.labels]
    check_anonymous({"images": {"count": 6}, "notes": ["12 of 100"], "x": None}, folders)
    for text in ("phantom-00003", f"see {prepared.labels}", "00002-phantom-00000.png is odd"):
        with pytest.raises(EvaluationError, match="in 1 places"):
            check_anonymous({"cases": [{"note": text}]}, folders)


# package and demo


def test_a_package_is_complete_the_same_again_and_says_how_to_register_it(
    conditional: Path, package_of, tmp_path: Path, medperf_contract
) -> None:
    cube = package_of(conditional)
    assert {path.name for path in cube.iterdir()} == {
        "container_config.yaml", "workspace", "additional_files.tar.gz", "README.md",
    }  # fmt: skip
    text = (cube / "container_config.yaml").read_text()
    steps = (cube / "README.md").read_text()
    name = steps.split("--name ")[1].split()[0]
    assert medperf_contract.faults_of(text, "model", name=name) == []
    assert yaml.safe_load(text)["image"] == "registry.example/synthcube:1"
    assert sha256(cube / "additional_files.tar.gz") in steps
    with tarfile.open(cube / "additional_files.tar.gz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "extracted", filter="data")
    assert names[0] == "."
    assert hashes(tmp_path / "extracted") == hashes(cube / "workspace" / "additional_files")
    before = hashes(cube)
    os.utime(conditional / "artifact" / "config.yaml", (1, 1))
    assert hashes(package_of(conditional)) == before
    assert hashes(package_of(conditional, "elsewhere")) == before


def test_a_package_takes_the_place_of_nothing_else(conditional: Path, package_of, tmp_path) -> None:
    (tmp_path / "cube").mkdir()
    (tmp_path / "cube" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something that is no package"):
        package_of(conditional)
    assert (tmp_path / "cube" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="no trained model"):
        package_of(tmp_path / "cube", "other")
    assert not (tmp_path / "other").exists()


def test_demo_data_are_as_medperf_wants_them(tmp_path: Path) -> None:
    digest = write_demo(tmp_path / "demo.tar.gz", num=3, size=(16, 16))
    assert write_demo(tmp_path / "again.tar.gz", num=3, size=(16, 16)) == digest
    assert write_demo(tmp_path / "more.tar.gz", num=4, size=(16, 16)) != digest
    with tarfile.open(tmp_path / "demo.tar.gz") as archive:
        archive.extractall(tmp_path / "demo", filter="data")
    paths = yaml.safe_load((tmp_path / "demo" / "paths.yaml").read_text())
    assert set(paths) == {"data_path", "labels_path"}
    for path in paths.values():
        assert len(read_manifest(tmp_path / "demo" / path).rows) == 3


# the command line


def test_the_commands_take_medperfs_names(site: Site, cli, tmp_path: Path) -> None:
    report, metadata = tmp_path / "report.yaml", tmp_path / "metadata"
    code, out, err = cli(
        "medperf", "prepare", "--data_path", site.raw, "--labels_path", site.raw_labels,
        "--output_path", site.data, "--output-labels-path", site.labels,
        f"--parameters_file={site.parameters}", f"--report_file={report}",
        f"--metadata_path={metadata}",
    )  # fmt: skip
    assert (code, out) == (0, "Prepared: 6 images of data, 6 images of labels\n"), err
    assert json.loads((metadata / "preparation.json").read_text())["versions"]["torch"]
    code, out, err = cli(
        "medperf", "sanity_check", f"--data_path={site.data}", f"--labels_path={site.labels}"
    )
    assert code == 0, err
    (site.labels / "manifest.csv").unlink()
    code, out, err = cli(
        "medperf", "sanity_check", f"--data_path={site.data}", f"--labels_path={site.labels}"
    )
    assert code == 2
    assert "manifest.csv is missing" in err


@pytest.mark.skipif(Path("/mlcommons").exists(), reason="this is MedPerf's container")
@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("prepare", "data_path /mlcommons/volumes/raw_data"),
        ("sanity_check", "data_path: /mlcommons/volumes/data"),
        ("statistics", "/mlcommons/volumes/data"),
        ("infer", "additional_files /mlcommons/volumes/additional_files"),
        ("evaluate", "predictions: data_path /mlcommons/volumes/predictions"),
    ],
)
def test_without_medperfs_mounts_a_task_says_what_is_missing(task: str, missing: str, cli) -> None:
    code, _, err = cli("medperf", task)
    assert code == 2
    assert missing in err
    assert not Path("/mlcommons").exists()


def test_demo_sizes_that_cannot_be_read(cli, tmp_path: Path) -> None:
    code, _, err = cli("medperf", "demo", "-o", tmp_path / "demo.tar.gz", "--size", "wide")
    assert code == 2
    assert "write it as 32x32" in err
    assert not (tmp_path / "demo.tar.gz").exists()
