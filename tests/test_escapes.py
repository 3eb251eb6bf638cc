"""Texts of others take no hold of a terminal, a page, a spreadsheet or a file that is shared."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image as Pillow

from synthcube.containers import MLCUBE, write_specs
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.errors import ConfigError, HubError
from synthcube.escapes import from_spreadsheet, hidden_in, markdown, spreadsheet, visible
from synthcube.evaluation.report.page import write_report
from synthcube.evaluation.results import Measure, Section
from synthcube.models import artifact
from synthcube.sharing import hub as hubs
from synthcube.sharing.card import CardContext, model_card, read_results

SCRIPT = "<script>alert(1)</script>"
HOSTILE = (
    SCRIPT, "[click](https://evil.example)", "![x](https://evil.example/x.png)", "a|b\n| c | d |",
    "`rm -rf`", "# heading", "**bold** _it_ ~no~ $x$ &lt;", "www.evil.example", "---\nlicense: mit",
)  # fmt: skip
FORMULAS = ("=cmd|' /C calc'!A0", "+SUM(A1)", "-2+3", "@x", "'=quoted", "''+twice", "--5")
PLAIN = ("-5", "+3.5", "-1e-3", "Hand", "it's", "'quoted'", "", "a=b", "7", "-.5")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines", "two\nlines"),
        ("Größe, 手, naïve\u00a0x", "Größe, 手, naïve\u00a0x"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\a\x7f\x9b", "a\\rb\\x07\\x7f\\x9b"),
        ("caf\udce9", "caf\\xe9"),
        ("\ud800", "\\ud800"),
        ("gnp\u202e.x\u2028", "gnp\\u202e.x\\u2028"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown
    assert bool(hidden_in(text)) == (text != shown)


@pytest.mark.parametrize("text", FORMULAS + PLAIN)
def test_a_cell_comes_back_as_it_was(text: str) -> None:
    assert from_spreadsheet(spreadsheet(text)) == text
    assert (spreadsheet(text) != text) == (text in FORMULAS)


def test_formulas_in_a_manifest_are_none_for_a_spreadsheet_and_the_same_for_us(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").touch()
    rows = [
        {
            "Channel_0": "a.png",
            "SubjectID": text or "x",
            "LabelMapping": text or "none",
            "=Age": "-5",
        }
        for text in (*FORMULAS, *PLAIN)
    ]
    write_manifest(tmp_path / "list.csv", rows)
    with (tmp_path / "list.csv").open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if re.match(r"[=@]|[+-](?!\.?\d)", cell)]
    read = read_manifest(tmp_path / "list.csv").rows
    assert [row.subject for row in read] == [row["SubjectID"] for row in rows]
    assert [row.label_name for row in read] == [row["LabelMapping"] for row in rows]
    assert {row.conditions["=Age"] for row in read} == {"-5"}


def test_folders_called_like_formulas_are_trained_on_and_continued(
    cli, tiny_config, tmp_path: Path
) -> None:
    for name in ("=1+1", "@x", "-scan", "-7", "plain", "+a"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            picture = Pillow.effect_noise((16, 16), 50 + i)
            picture.save(tmp_path / "data" / name / f"{i}.png")
    words = ("-d", tmp_path / "data", "-o", tmp_path / "list.csv", "--test", "0.4")
    code, _, err = cli("prepare", *words)
    assert code == 0, err
    for epochs in (1, 2):
        code, _, err = cli(
            "train", "-c", tiny_config(), "-d", tmp_path / "list.csv", "-o", tmp_path / "run",
            "--set", f"training.max_epochs={epochs}",
        )  # fmt: skip
        assert code == 0, err
    rows = read_manifest(tmp_path / "run" / "split.csv").rows
    assert {row.subject for row in rows} == {"=1+1", "@x", "-scan", "-7", "plain", "+a"}
    assert "'=1+1" in (tmp_path / "run" / "split.csv").read_text()


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_takes_nothing_for_its_own(text: str) -> None:
    told = markdown(text)
    assert "\n" not in told
    assert not re.search(r"(?<!\\)[<>\[\]|`*#$!&~]", told)
    assert "://" not in told
    assert "www." not in told


def test_names_that_are_none_of_its_own_stay_as_they_are_in_markdown() -> None:
    assert markdown("tpr_at_1_percent, 0.5 (95%)") == "tpr_at_1_percent, 0.5 (95%)"


def hostile_card(first_stage: Any, tmp_path: Path) -> str:
    results = {
        "synthcube_evaluation": 1, "extractor": {"name": SCRIPT},
        "images": {text: {"count": 3} for text in HOSTILE},
        SCRIPT: {
            **{text: {"value": 1.0, "reason": text} for text in HOSTILE},
            "odd": {"value": None, "reason": SCRIPT}, "notes": list(HOSTILE),
        },
    }  # fmt: skip
    (tmp_path / "results.yaml").write_text(yaml.safe_dump(results))
    trained = artifact.load(first_stage("rectified_flow"))
    image = trained.image.model_copy(update={"labels": HOSTILE})
    public = artifact.Artifact(
        trained.folder, trained.config, image, {SCRIPT: 1.0}, trained.sha256, trained.weights
    )
    return model_card(public, CardContext(results=read_results(tmp_path / "results.yaml")))


def test_a_card_holds_no_markup_of_others(first_stage, tmp_path: Path) -> None:
    card = hostile_card(first_stage, tmp_path)
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "synthcube"
    assert "<script>" not in body
    assert "\nlicense:" not in body
    unescaped = re.sub(r"\\.", "", body)
    assert "](https" not in unescaped
    assert "script>" not in re.sub(r"```.*?```", "", unescaped, flags=re.DOTALL)
    tables = [line for line in unescaped.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {3, 7}


def test_a_report_holds_no_markup_of_others(tmp_path: Path) -> None:
    section = Section(
        SCRIPT, {SCRIPT: Measure(1.0, reason=SCRIPT)}, [SCRIPT], {SCRIPT: SCRIPT},
        cases=[{SCRIPT: SCRIPT, "subject": "=1+1", "shift": -2.5}],
    )  # fmt: skip
    write_report(tmp_path, {"synthcube": SCRIPT, "notes": [SCRIPT]}, [section])
    assert "<script" not in (tmp_path / "report.html").read_text()
    with (tmp_path / "cases.csv").open(newline="") as file:
        _, (_, _, subject, shift) = csv.reader(file)
    assert (subject, shift) == ("'=1+1", "-2.5")


def test_croissant_and_metadata_are_data(cli, first_stage, tmp_path: Path) -> None:
    model, out = first_stage("rectified_flow"), tmp_path / "images"
    creator = f'{SCRIPT}"}}, "x": {{"'
    code, _, err = cli(
        "infer", "-m", model, "-o", out, "-n", 1, "--croissant", "--creator", creator
    )
    assert code == 0, err
    described = json.loads((out / "croissant.json").read_text())
    assert creator in json.dumps(described["creator"]).replace('\\"', '"')
    assert "x" not in described


@pytest.mark.parametrize(
    "endpoint",
    ["https://user:secret@hub.example", "http://secret@hub.example:8080/x", "https://:secret@h"],
)
def test_a_password_in_the_address_of_a_hub_is_refused_and_not_shown(
    endpoint: str, cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(HubError, match="HF_ENDPOINT holds more than the address") as caught:
        hubs.connect()
    assert "secret" not in str(caught.value)
    code, out, err = cli("infer", "-m", "hf://alice/brains", "-o", tmp_path / "images")
    assert code == 2
    assert "HF_ENDPOINT" in err
    assert "secret" not in out + err


@pytest.mark.parametrize(
    "image",
    ["1:30", "synthcube:latest", "docker.io/group/synth_cube:1.0", "localhost:5000/a/b--c",
     "REGISTRY.example.org:443/x@sha256:" + "0" * 64],
)  # fmt: skip
def test_the_name_of_an_image_is_read_back(image: str, tmp_path: Path) -> None:
    path, *roles = write_specs(tmp_path, image)
    assert path.name == MLCUBE
    assert yaml.safe_load(path.read_text())["docker"]["image"] == image
    for role in roles:
        described = yaml.safe_load(role.read_text())
        assert described["image"] == described["docker"]["image"] == image


@pytest.mark.parametrize(
    "image", ["a\nrun_args: {command: sh}", 'a"', "a: b", "a #b", "A", "-v /:/"]
)
def test_the_name_of_an_image_writes_nothing_else(image: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the name of a container image"):
        write_specs(tmp_path / "specs", image)
    assert not (tmp_path / "specs").exists()
