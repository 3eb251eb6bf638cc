"""Evaluate: numbers leave the site, names do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from synthcube.data.phantom import write_phantoms
from synthcube.errors import EvaluationError


def test_numbers_leave_and_cases_stay(prepared, conditional: Path, package_of) -> None:
    from synthcube.medperf.evaluate import evaluate

    prepared.predict(package_of(conditional), "conditions: prepared")
    parameters = prepared.folder / "evaluation.yaml"
    parameters.write_text("evaluation: {extractor: {name: radiomic}, num_repeats: 2}")
    results, local = prepared.folder / "results.yaml", prepared.folder / "local"
    train_data = prepared.folder / "additional_files" / "train_data"
    # Its subjects have the names of those at this site, and are other people.
    write_phantoms(train_data, num=6, size=(16, 16), seed=1)
    for _ in range(2):
        evaluate(
            prepared.folder / "predictions", prepared.labels, results,
            parameters=parameters, additional_files=train_data.parent,
            local_outputs_path=local,
        )  # fmt: skip
    values = yaml.safe_load(results.read_text())
    assert {name: image_set["count"] for name, image_set in values["images"].items()} == {
        "predictions": 6, "labels": 6, "train_data": 6,
    }  # fmt: skip
    assert "phantom" not in results.read_text()
    assert str(prepared.folder) not in results.read_text()
    assert (local / "report" / "report.html").is_file()


def test_results_that_name_a_subject_do_not_leave(prepared) -> None:
    from synthcube.medperf.evaluate import check_anonymous

    folders = [prepared.labels]
    check_anonymous({"images": {"count": 6}, "notes": ["12 of 100"], "x": None}, folders)
    for text in ("phantom-00003", f"see {prepared.labels}", "00002-phantom-00000.png is odd"):
        with pytest.raises(EvaluationError, match=r"of this site: \S*(phantom-0000|labels)"):
            check_anonymous({"cases": [{"note": text}]}, folders)
