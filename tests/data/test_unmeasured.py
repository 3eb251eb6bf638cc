"""The description of private images holds what is declared, and nothing that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.phantom import write_phantoms
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ConfigError, ManifestError


def opened(data: Path, cache: Path, private: bool = True, **settings: Any) -> DataModule:
    config = DataConfig.model_validate(settings)
    return DataModule(
        read_manifest(data), config, batch_size=2, seed=0, cache=cache, private=private
    )


def test_volumes_need_a_declared_voxel_size(tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", num=6, size=(16, 16, 16), spacing_mm=(1, 1, 2)).parent
    with pytest.raises(ConfigError, match=r"data.spacing_mm: declare the voxel size") as error:
        opened(data, tmp_path / "cache")
    assert "crop_or_pad" not in str(error.value)
    with pytest.raises(ConfigError, match=r"with data.fit crop_or_pad"):
        opened(data, tmp_path / "cache", spacing_mm=[1.0, 1.0, 2.0], size=[16, 16, 16])
    image = opened(data, tmp_path / "cache", spacing_mm=[1.0, 1.0, 2.0]).image
    assert image.spacing_mm == (1, 1, 2)
    assert np.allclose(np.diag(image.affine), [1, 1, 2, 1])
    assert [row[3] for row in image.affine[:3]] == [-7.5, -7.5, -15]


def test_intensities_are_declared_or_go_from_0_to_1(tmp_path: Path) -> None:
    data = write_phantoms(tmp_path / "data", num=6, size=(16, 16, 16)).parent
    spacing = {"spacing_mm": [1.0, 1.0, 1.0]}
    measured = opened(data, tmp_path / "cache", private=False, **spacing).image
    image = opened(data, tmp_path / "cache", **spacing).image
    assert image.intensity_range == ((0, 1),) != measured.intensity_range
    assert not image.integer
    ct = opened(data, tmp_path / "cache", **spacing, intensity_range=[-1000, 1000]).image
    assert ct.intensity_range == ((-1000, 1000),)


def test_pictures_need_no_declaration(phantoms: Path, tmp_path: Path) -> None:
    image = opened(phantoms, tmp_path / "cache").image
    assert (image.intensity_range, image.labels, image.conditions) == (((0, 255),), (), ())
    assert image.file_format == "png"


def test_declared_conditions_are_taken(phantoms: Path, tmp_path: Path) -> None:
    data = opened(
        phantoms, tmp_path / "cache",
        conditions={"Label": "class", "Radius": "number"},
        classes={"Label": ["ring", "disc", "square", "star"]}, ranges={"Radius": [0, 10]},
    )  # fmt: skip
    label, radius = data.image.conditions
    assert label.classes == data.image.labels == ("ring", "disc", "square", "star")
    assert (radius.low, radius.high) == (0, 10)
    batch = data.examples([0])
    row = data.manifest.rows[0]
    assert label.classes[int(batch["condition"]["values"][0, 0])] == row.label_name
    expected = float(row.conditions["Radius"]) / 5 - 1
    assert batch["condition"]["values"][0, 1] == pytest.approx(expected, abs=1e-6)


def test_what_is_undeclared_is_refused_at_once(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is measured on the images") as error:
        opened(phantoms, tmp_path / "c", conditions={"Label": "class", "Radius": "number"})
    assert "data.classes: name the classes of the column Label" in str(error.value)
    assert "data.ranges: declare the lowest and highest Radius" in str(error.value)


def test_cells_outside_of_a_declaration_are_named(phantoms: Path, tmp_path: Path) -> None:
    for private in (False, True):
        with pytest.raises(ManifestError) as error:
            opened(
                phantoms, tmp_path / "cache", private,
                conditions={"Label": "class", "Radius": "number"},
                classes={"Label": ["ring", "disc"]}, ranges={"Radius": [0, 5]},
            )  # fmt: skip
        assert "'square' is not among the classes ring, disc" in str(error.value)
        assert "it lies outside of data.ranges, 0 to 5" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"ranges": {"Age": [0, 1]}}, "ranges names Age, which is no number"),
        ({"classes": {"Site": ["a"]}}, "classes names Site, which is no class"),
        ({"classes": {"Label": ["a", "a"]}}, "classes of Label: none may be there twice"),
        (
            {"conditions": {"Age": "number"}, "ranges": {"Age": [5, 5]}},
            "ranges of Age: low 5 must be below high 5",
        ),
    ],
)
def test_a_declaration_must_make_sense(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        DataConfig.model_validate(settings)
