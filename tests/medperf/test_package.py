"""The package of a model and the demo data of a benchmark."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import yaml

from synthcube.data.manifest import read_manifest
from synthcube.errors import ArtifactError, OutputError
from synthcube.medperf.package import write_demo
from synthcube.storage import sha256


def test_a_package_is_complete_the_same_again_and_says_how_to_register_it(
    conditional: Path, package_of, tmp_path: Path, medperf_contract, hashes
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


def test_medperf_takes_every_command_of_the_readme(
    conditional: Path, package_of, medperf_contract
) -> None:
    page = (package_of(conditional) / "README.md").read_text()
    commands = medperf_contract.commands_in(page)
    assert {" ".join(command.split()[1:3]) for command in commands} >= {
        "container submit", "model associate", "run --benchmark", "test run",
    }  # fmt: skip
    assert [command for command in commands if medperf_contract.command_fault(command)] == []


def test_the_readme_says_what_the_model_follows(conditional: Path, first_stage, package_of) -> None:
    page = (package_of(conditional) / "README.md").read_text()
    assert "follows conditions: `conditions: prepared`" in page
    page = (package_of(first_stage("dcgan"), "other") / "README.md").read_text()
    assert "no conditions, and refuses `conditions: prepared`" in page


def test_a_package_takes_the_place_of_nothing_else(conditional: Path, package_of, tmp_path) -> None:
    (tmp_path / "cube").mkdir()
    (tmp_path / "cube" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds files that are not a package's"):
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
