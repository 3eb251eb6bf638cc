"""A site that takes part in a benchmark, and a model that visits it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.phantom import write_phantoms
from synthcube.medperf.prepare import prepare
from synthcube.medperf.sanity_check import sanity_check
from synthcube.medperf.statistics import statistics
from synthcube.storage import sha256


def _hashes(folder: Path) -> dict[str, str]:
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

    def predict(self, package: Path, parameters: str, name: str = "predictions") -> list:
        from synthcube.medperf.infer import infer

        path = self.folder / "model.yaml"
        path.write_text(parameters)
        infer(
            self.data, self.folder / name, package / "workspace" / "additional_files",
            parameters=path,
        )  # fmt: skip
        return list(read_manifest(self.folder / name).rows)


@pytest.fixture(scope="session")
def hashes():
    """SHA-256 of every file of a folder, by its path there."""
    return _hashes


@pytest.fixture
def new_site(tmp_path: Path):
    """Makes a site without any images."""
    return lambda name="site": Site(tmp_path / name)


@pytest.fixture
def site(new_site) -> Site:
    """Six pictures, which are the reference images as well."""
    new: Site = new_site()
    for folder in (new.raw, new.raw_labels):
        write_phantoms(folder, num=6, size=(16, 16))
    return new


@pytest.fixture
def prepared(site: Site) -> Site:
    site.prepare()
    return site


@pytest.fixture(scope="session")
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
        from synthcube.medperf.package import package

        return package(run, tmp_path / name, image="registry.example/synthcube:1")

    return make
