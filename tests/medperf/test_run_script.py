"""run_script: a model as an asset, its images made and judged by one container."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from synthcube.errors import ArtifactError, ConfigError

PARAMETERS = "conditions: prepared\nevaluation: {extractor: {name: radiomic}, num_repeats: 2}\n"


@pytest.fixture
def asset(conditional: Path, tmp_path: Path, cli: Any) -> Path:
    """The files that MedPerf brings to a site."""
    assert cli("export", "-m", conditional, "-o", tmp_path / "asset")[0] == 0
    return tmp_path / "asset"


def test_only_results_are_written_and_nothing_is_changed(
    prepared, asset: Path, cli: Any, hashes
) -> None:
    parameters, results = prepared.folder / "script.yaml", prepared.folder / "results"
    parameters.write_text(PARAMETERS)
    inputs = (prepared.data, prepared.labels, asset)
    before = [hashes(folder) for folder in inputs]
    code, _, err = cli(
        "medperf", "run_script", "--data_path", prepared.data, "--labels_path", prepared.labels,
        "--model_files", asset, "--parameters_file", parameters, "--results_path", results,
    )  # fmt: skip
    assert code == 0, err
    assert [path.name for path in results.iterdir()] == ["results.yaml"]
    text = (results / "results.yaml").read_text()
    values = yaml.safe_load(text)
    assert {name: part["count"] for name, part in values["images"].items()} == {
        "predictions": 6, "labels": 6,
    }  # fmt: skip
    assert "phantom" not in text
    assert str(prepared.folder) not in text
    assert [hashes(folder) for folder in inputs] == before


def test_the_numbers_are_those_of_infer_and_evaluate(
    prepared, asset: Path, conditional: Path, package_of
) -> None:
    from synthcube.medperf.evaluate import evaluate
    from synthcube.medperf.run_script import run_script

    parameters = prepared.folder / "script.yaml"
    parameters.write_text(PARAMETERS)
    path = run_script(
        prepared.data, prepared.labels, asset, prepared.folder / "results",
        parameters_file=parameters,
    )  # fmt: skip
    prepared.predict(package_of(conditional), "conditions: prepared")
    judged = yaml.safe_load(PARAMETERS)["evaluation"]
    apart = evaluate(
        prepared.folder / "predictions", prepared.labels, prepared.folder / "apart.yaml",
        parameters={"seed": 0, "evaluation": judged},
    )  # fmt: skip
    assert path.read_text() == apart.read_text()


def test_a_folder_without_a_model_and_a_wrong_key_are_refused(prepared, asset: Path) -> None:
    from synthcube.medperf.run_script import run_script

    results = prepared.folder / "results"
    with pytest.raises(ArtifactError, match="holds no trained model"):
        run_script(prepared.data, prepared.labels, prepared.labels, results)
    assert not list(results.iterdir())
    parameters = prepared.folder / "script.yaml"
    parameters.write_text("evaluate: {}\n")
    with pytest.raises(ConfigError, match="evaluate"):
        run_script(prepared.data, prepared.labels, asset, results, parameters_file=parameters)
