"""The card and the description of an exported model say what is known, in the fields' own forms."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from synthcube.models import artifact
from synthcube.sharing.card import header_of
from synthcube.sharing.config import ExportRequest
from synthcube.tasks.export import export
from synthcube.tasks.train import train

RESULTS: dict[str, Any] = {
    "synthcube_evaluation": 1,
    "synthcube": "0.1.0",
    "images": {"predictions": {"count": 40, "sha256": "0" * 64}, "labels": {"count": 30}},
    "extractor": {"name": "efficientnet-lite0", "dimensions": 1280},
    "fidelity": {
        "kid": {"value": 0.0123456, "real_baseline": 0.001, "low": 0.01, "high": 0.02, "count": 30},
        "fid": {"value": None, "reason": "30 images | too few"},
        "notes": ["Features of photographs."],
    },
    "memorisation": {
        "copies": {"value": 0.0, "real_baseline": 0.01, "count": 40},
        "nearness": {"value": 0.9, "reason": "the labels cannot calibrate it"},
        "threshold": 0.3,
        "odd": {"value": None},
        "notes": ["No copies were found, which does not show that there are none."],
    },
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.yaml"
    path.write_text(yaml.safe_dump(RESULTS, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def exported(first_stage, results: Path, tmp_path: Path) -> Path:
    notes = tmp_path / "notes.md"
    notes.write_text("## Authors\n\nA group of three.\n")
    return export(
        first_stage("rectified_flow"), tmp_path / "model",
        ExportRequest(
            license="cc-by-nc-4.0", datasets=["alice/scans"], evaluation=results,
            notes_file=notes, version="2.1.0", push_to="alice/brains",
        ),
    )  # fmt: skip


def test_the_hub_accepts_the_card(exported: Path, validate) -> None:
    validate((exported / "README.md").read_text())


def test_the_classes_of_the_hub_read_the_card(exported: Path) -> None:
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name) == ("cc-by-nc-4.0", "synthcube")
    assert data.pipeline_tag == "unconditional-image-generation"
    assert {"medical-imaging", "rectified_flow", "2d"} <= set(data.tags)
    assert data.datasets == ["alice/scans"]
    measured = {entry.metric_type: entry.metric_value for entry in data.eval_results}
    assert measured == {"kid": 0.0123456, "copies": 0.0}
    raw = header_of((exported / "README.md").read_text())
    name, again = model_index_to_eval_results(raw["model-index"])
    assert name == "rectified_flow-2d"
    assert len(again) == 2


def test_the_card_tells_numbers_with_their_real_baselines(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "| fidelity | kid | 0.01235 | 0.001 | 0.01 to 0.02 | 30 |" in card
    assert "| fidelity | fid | 30 images \\| too few |  |  |  |" in card
    assert "| memorisation | nearness | 0.9 (the labels cannot calibrate it) |" in card
    assert "nearness" not in str(header_of(card)), "where there is no room for the reason"
    assert "- memorisation: No copies were found, which does not show" in card
    assert "40 predictions, 30 labels, in features of efficientnet-lite0" in card
    assert "nan" not in card.lower().replace("synthcube.nan", "")
    assert re.search(r"\d+ images of \d+ subjects in training\.", card)
    assert "A group of three." in card


def test_the_card_says_how_to_run_it_in_four_ways(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for words in (
        "synthcube infer -m hf://alice/brains -o images -n 16",
        "docker run --rm -e HF_TOKEN --user",
        "singularity run --cleanenv",
        'model = synthcube.from_pretrained("alice/brains")\nimages = model.sample(16, seed=1)',
        "MedPerf",
    ):
        assert words in card
    for title in ("Intended use", "Out of scope", "Training data", "Evaluation", "License"):
        assert f"\n## {title}\n" in card


def test_nothing_is_claimed_that_nobody_said(first_stage, tmp_path: Path, cli) -> None:
    out = tmp_path / "model"
    code, told, _ = cli("export", "-m", first_stage("rectified_flow"), "-o", out)
    assert code == 0
    assert "No license is stated" in told
    card = (out / "README.md").read_text()
    assert "license" not in header_of(card)
    assert "datasets" not in header_of(card)
    assert "model-index" not in header_of(card)
    assert "None was stated: without one nobody may use it." in card
    assert "Not evaluated" in card
    assert "its authors have not said" in card
    described = json.loads((out / "metadata.json").read_text())
    assert described["authors"] == described["copyright"] == "not stated"


def test_the_card_of_what_reconstructs(first_stage, tmp_path: Path) -> None:
    out = export(first_stage("vqvae"), tmp_path / "model", ExportRequest(license="mit"))
    card = (out / "README.md").read_text()
    assert header_of(card)["pipeline_tag"] == "image-to-image"
    assert "synthcube infer -m THIS_FOLDER -o images -d YOUR_IMAGES" in card
    assert 'model.reconstruct("YOUR_IMAGES")' in card


def test_a_model_that_follows_a_class_is_not_unconditional(
    cli, tiny_config, phantoms, results: Path, tmp_path: Path, validate
) -> None:
    run = tmp_path / "run"
    words = ("train", "-c", tiny_config("rectified_flow"), "-d", phantoms, "-o", run)
    code, _, err = cli(*words, "--set", "data.conditions={Label: class}")
    assert code == 0, err
    out = export(run, tmp_path / "model", ExportRequest(license="mit", evaluation=results))
    card = (out / "README.md").read_text()
    assert "pipeline_tag" not in header_of(card)
    assert "unconditional" not in card
    assert "conditional-image-generation" in header_of(card)["tags"]
    assert header_of(card)["model-index"][0]["results"][0]["task"] == {"type": "other"}
    validate(card)


def test_metadata_is_that_of_a_monai_bundle(exported: Path) -> None:
    """Required keys and types of MONAI's meta_schema_20240725.json."""
    described = json.loads((exported / "metadata.json").read_text())
    texts = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task",
             "description", "authors", "copyright", "data_type", "image_classes",
             "intended_use")  # fmt: skip
    assert {name: type(described[name]) for name in texts} == dict.fromkeys(texts, str)
    assert described["version"] == "2.1.0"
    assert described["schema"].endswith("/meta_schema_20240725.json")
    for name in ("changelog", "required_packages_version", "eval_metrics"):
        assert isinstance(described[name], dict)
    assert described["eval_metrics"] == {"fidelity/kid": 0.0123456, "memorisation/copies": 0.0}
    format_ = described["network_data_format"]
    tensors = [*format_["inputs"].values(), *format_["outputs"].values()]
    assert len(tensors) == 2
    for tensor in tensors:
        assert isinstance(tensor["type"], str)
        assert isinstance(tensor["format"], str)
        assert isinstance(tensor["num_channels"], int)
        assert all(isinstance(side, int) for side in tensor["spatial_shape"])
        assert isinstance(tensor["dtype"], str)
        assert all(isinstance(end, int | float) for end in tensor["value_range"])
        assert isinstance(tensor["is_patch_data"], bool)
        assert isinstance(tensor["channel_def"], dict)
    assert format_["outputs"]["pred"]["spatial_shape"] == [16, 16]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--license", "Apache License 2.0"),
            "--license: 'Apache License 2.0' is not a license as the Hub spells it",
        ),
        (("--dataset", "my data"), "--dataset: 'my data' is not the name of a data set"),
        (("--notes", "none.md"), "--notes none.md: No such file"),
        (("--model-version", "first"), "two or three numbers, such as 1.0.0"),
        (("--evaluation", "none.yaml"), "--evaluation none.yaml: No such file"),
    ],
)
def test_what_cannot_be_said(options: tuple[str, str], text: str, cli, first_stage, tmp_path):
    code, _, err = cli("export", "-m", first_stage("vqvae"), "-o", tmp_path / "out", *options)
    assert code == 2
    assert text in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe", "this is not a text file"),
        (b"a: [1", "line 1: this is not YAML"),
        (b"- 1", "this is not a mapping of keys to values"),
        (b"fidelity: {kid: {value: 1}}", "this is not what synthcube evaluate wrote"),
        (b"synthcube_evaluation: 1\nfidelity: {kid: {value: .nan}}", "a number is not finite"),
        (b"synthcube_evaluation: 1\nfidelity: {}", "there is no measure in it"),
    ],
)
def test_results_that_are_none(content: bytes, text: str, cli, first_stage, tmp_path) -> None:
    path = tmp_path / "results.yaml"
    path.write_bytes(content)
    words = ("export", "-m", first_stage("vqvae"), "-o", tmp_path / "out", "--evaluation", path)
    code, _, err = cli(*words)
    assert (code, text in err) == (2, True)


def test_results_of_odd_shapes_are_read_as_far_as_they_go(first_stage, tmp_path: Path) -> None:
    path = tmp_path / "results.yaml"
    measure = {"value": "1", "real_baseline": []}
    odd = {"synthcube_evaluation": 2, "new": {"m": measure, "notes": "text"},
           "images": [1], "extractor": "x", "other": 3, "bool": {"m": {"value": True}}}  # fmt: skip
    path.write_text(yaml.safe_dump(odd))
    out = export(first_stage("vqvae"), tmp_path / "out", ExportRequest(evaluation=path))
    assert "| new | m |  |  |  |  |" in (out / "README.md").read_text()
    assert "model-index" not in header_of((out / "README.md").read_text())


def test_a_card_that_is_edited_does_not_spoil_the_model(exported: Path, hub) -> None:
    (exported / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert artifact.load(exported)


def test_python_and_help_start_light() -> None:
    code = "import sys, synthcube; synthcube.from_pretrained; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.fixture
def private_export(tiny_config, phantoms: Path, tmp_path: Path) -> Path:
    overrides = [
        "data.intensity_range=[0, 255]", "training.privacy={epsilon: 3, draws: 1}",
        "training.max_epochs=1",
    ]  # fmt: skip
    train(tiny_config(), phantoms, tmp_path / "private", overrides=overrides)
    return export(tmp_path / "private", tmp_path / "exported", ExportRequest(license="mit"))


@pytest.mark.slow
def test_the_card_of_a_private_model_states_its_promise(private_export: Path, validate) -> None:
    said = json.loads((private_export / "privacy.json").read_text())
    about = json.loads((private_export / "metadata.json").read_text())
    assert about["privacy"] == said
    assert "bounded by epsilon and delta" in about["intended_use"]
    assert artifact.load(private_export).privacy.model_dump(mode="json") == said
    card = (private_export / "README.md").read_text()
    validate(card)
    for text in (
        "## Privacy", "| delta | 0.011 |", "one subject with all its images, added or removed",
        "PRV (Gopi et al. 2021), opacus", "Poisson over subjects", "| steps | 2 |",
        "| clip norm | 1 |", "noise multiplier (sigma)", "| start | random weights |",
        "other runs on the same people", "| canary audit | not made of this model |",
        "not hardened against them",
    ):  # fmt: skip
        assert text in card
    (stated,) = re.findall(r"\| epsilon \| (\S+) \|", card)
    assert said["epsilon"] <= float(stated) <= 3  # rounded up, never down
    assert "not shown to protect the privacy" not in card


def test_a_model_without_privacy_claims_none(exported: Path) -> None:
    assert "## Privacy" not in (exported / "README.md").read_text()
    assert not (exported / "privacy.json").exists()
    assert artifact.load(exported).privacy is None
