"""The command line takes MedPerf's names, and tells what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_the_commands_take_medperfs_names(site, cli, tmp_path: Path) -> None:
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
