"""Infer: a packaged model at a site."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from synthcube.data.manifest import read_manifest
from synthcube.errors import ArtifactError, ConfigError


def test_a_packaged_model_generates_what_its_parameters_say(
    prepared, conditional: Path, package_of, hashes
) -> None:
    cube = package_of(conditional)
    before = hashes(prepared.data)
    rows = prepared.predict(cube, "task: generate\nsampling: {num_images: 3}\nseed: 5")
    assert len(rows) == 3
    own = (cube / "workspace" / "parameters.yaml").read_text()
    assert len(prepared.predict(cube, own, "by-default")) == 16
    of_classes = "sampling: {num_images: {disc: 2, ring: 1}}"
    rows = prepared.predict(cube, of_classes, "of-classes")
    assert [row.label_name for row in rows] == ["disc", "disc", "ring"]
    assert hashes(prepared.data) == before


def test_images_that_follow_the_prepared_conditions(
    prepared, conditional: Path, package_of
) -> None:
    cube = package_of(conditional)
    rows = prepared.predict(cube, "conditions: prepared\nsampling: {batch_size: 4}")
    wanted = read_manifest(prepared.data).rows
    assert [row.label_name for row in rows] == [row.label_name for row in wanted]
    for row, wish in zip(rows, wanted, strict=True):
        assert float(row.conditions["Radius"]) == pytest.approx(
            float(wish.conditions["Radius"]), abs=1e-3
        )
    more = prepared.predict(cube, "conditions: prepared\nsampling: {num_images: 8}", "more")
    assert [row.label_name for row in more[6:]] == [row.label_name for row in wanted[:2]]


def test_prepared_conditions_that_the_model_does_not_know(
    site, conditional: Path, package_of
) -> None:
    rows = site.rows(site.raw)
    site.rewrite(site.raw, [{**rows[0], "Radius": "99"}, *rows[1:]])
    site.prepare()
    cube = package_of(conditional)
    with pytest.raises(ConfigError, match="Radius=99: it was trained on"):
        site.predict(cube, "conditions: prepared")
    known = "conditions: prepared\nbeyond_training: leave_out"
    assert len(site.predict(cube, known, "known")) == 5


def test_a_model_without_conditions_refuses_prepared_ones_as_the_page_says(
    prepared, first_stage, package_of
) -> None:
    cube = package_of(first_stage("dcgan"))
    expected = "the model follows no conditions"
    page = Path(__file__).parents[2] / "docs" / "how-to" / "medperf.md"
    assert f"| `{expected}` | " in page.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{expected}.*write conditions: drawn"):
        prepared.predict(cube, "conditions: prepared")
    (block,) = re.findall(r"```yaml\n(task: .*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(prepared.predict(cube, block, "as-on-the-page")) == 16


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
    prepared, conditional: Path, package_of, parameters: str, expected: str
) -> None:
    from synthcube.errors import SynthCubeError

    with pytest.raises(SynthCubeError, match=expected):
        prepared.predict(package_of(conditional), parameters)


def test_an_autoencoder_reconstructs_prepared_images(prepared, first_stage, package_of) -> None:
    cube = package_of(first_stage("vqvae"))
    assert yaml.safe_load((cube / "workspace" / "parameters.yaml").read_text())["task"] == (
        "reconstruct"
    )
    rows = prepared.predict(cube, "task: reconstruct")
    assert [row.subject for row in rows] == [
        row.subject for row in read_manifest(prepared.data).rows
    ]


def test_additional_files_must_hold_one_model(
    prepared, conditional: Path, package_of, tmp_path: Path
) -> None:
    from synthcube.medperf.infer import find_model

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
