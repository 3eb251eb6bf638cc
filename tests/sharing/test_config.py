"""The section `export` of the YAML, by which MLCube's task says what the command line can."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from synthcube.models import artifact
from synthcube.sharing.card import header_of
from synthcube.sharing.config import ExportRequest
from synthcube.tasks.export import read_request
from synthcube.tasks.train import train

NAME = "alice/brains"
SECTION = {
    "license": "cc-by-4.0", "datasets": ["alice/scans", "alice/more"], "version": "2.1.0",
    "notes": "# About\nThe *scanner* was new.\n", "push_to": NAME, "revision": "trial",
    "commit_message": "our first",
}  # fmt: skip
RESULTS = "synthcube_evaluation: 1\nfidelity: {kid: {value: 0.25}}\n"
WRONG = "hf_NobodyKnowsThisOne"


@pytest.fixture
def share(cli, first_stage, tmp_path: Path):
    """Runs the task as MLCube does, with this section in its parameters_file."""

    def run(section: object, *words: object) -> tuple[int, str, str]:
        path = tmp_path / "parameters.yaml"
        path.write_text(yaml.safe_dump({"model": {"name": "ddpm"}, "export": section}))
        model = first_stage("rectified_flow")
        code, *told = cli(
            "export", f"--model_path={model}", f"--parameters_file={path}",
            f"--output_path={tmp_path / 'model'}", *words,
        )  # fmt: skip
        path.unlink()
        assert "Traceback" not in told[1]
        return code, *told

    return run


def card(folder: Path) -> str:
    return (folder / artifact.CARD).read_text(encoding="utf-8")


def test_the_section_says_all_that_the_command_line_can(share, hub, leaks, tmp_path: Path) -> None:
    (tmp_path / "results.yaml").write_text(RESULTS)
    code, out, err = share(SECTION, f"--evaluation={tmp_path / 'results.yaml'}")
    assert code == 0, err
    repo = hub.repos[NAME]
    commit = repo.branches["trial"]
    assert f"Published: hf://{NAME}@{commit}" in out
    assert repo.private
    assert repo.tags == {"v2.1.0": commit}
    assert repo.messages[-1] == "our first"
    text = card(tmp_path / "model")
    header = header_of(text)
    assert (header["license"], header["datasets"]) == ("cc-by-4.0", ["alice/scans", "alice/more"])
    assert "The *scanner* was new." in text
    assert "0.25" in text
    assert f"hf://{NAME}" in text
    assert leaks(out, err) == []


def test_the_command_line_wins(share, hub, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("The scanner was old.")
    code, _, err = share(
        {**SECTION, "public": True}, "--license=mit", "--dataset=bob/scans", "--revision=main",
        "--notes", tmp_path / "notes.md", "--model-version=3.0", "--push-to=alice/other",
        "--private", "--commit-message=mine",
    )  # fmt: skip
    assert code == 0, err
    repo = hub.repos["alice/other"]
    assert list(hub.repos) == ["alice/other"]
    assert repo.private
    assert (list(repo.branches), list(repo.tags)) == (["main"], ["v3.0"])
    assert repo.messages[-1] == "mine"
    header, text = header_of(card(tmp_path / "model")), card(tmp_path / "model")
    assert (header["license"], header["datasets"]) == ("mit", ["bob/scans"])
    assert "old" in text
    assert "new." not in text


def test_every_key_can_be_said_on_the_command_line_too() -> None:
    """Or MLCube's task would know what nobody else does, and the other way round."""
    settings = {"license": "mit", "datasets": ("a/b",), "version": "2.0", "notes": "text",
             "runtimes": ("onnx",), "runtime_weights": "float16", "push_to": "a/b",
             "public": True, "revision": "trial", "commit_message": "mine"}  # fmt: skip
    settings |= {"notes_file": Path("notes.md"), "evaluation": Path("results.yaml")}
    assert settings.keys() == ExportRequest.model_fields.keys()
    assert read_request(None, settings).model_dump() == settings
    nothing = {"license": "", "datasets": (), "public": None}
    assert read_request(None, nothing) == ExportRequest()


def test_all_faults_at_once(share, hub, tmp_path: Path) -> None:
    code, _, err = share(
        {"licence": "mit", "datasets": ["my data"], "version": 1.0, "push_to": "brains",
         "revision": "-x", "public": "yes"}
    )  # fmt: skip
    assert code == 2
    for text in (
        "has 6 fault(s)",
        "export.licence (line 4): unknown key; did you mean license?",
        "export.datasets (line 2): 'my data' is not the name of a data set: owner/name",
        "export.version (line 8): should be a valid string, not 1.0",
        "export.push_to (line 6): 'brains' is no name of a model on a Hub",
        "export.revision (line 7): '-x' is not the name of a branch",
        "export.public (line 5): should be a valid boolean, not 'yes'",
    ):
        assert text in err, err
    assert not (tmp_path / "model").exists()
    assert hub.asked == []


def test_a_push_needs_a_license_from_either(share, hub) -> None:
    code, _, err = share({"push_to": NAME})
    assert (code, "--push_to needs a license" in err) == (2, True)
    assert hub.asked == []
    assert share({"push_to": NAME}, "--license=mit")[0] == 0


@pytest.mark.parametrize(
    "section",
    [
        {"token": "any"}, {"HF_TOKEN": "any"}, {"commit_message": f"by {WRONG}"}, WRONG,
        {"push_to": WRONG}, {"notes": {"deep": [WRONG]}}, [WRONG],
    ],
)  # fmt: skip
def test_a_token_is_in_no_file_and_in_no_message(section, share, hub, leaks, tmp_path) -> None:
    code, out, err = share(section)
    assert code == 2
    assert "export (line 1): a token is never in a file" in err or "line 2" in err
    assert leaks(out, err) == []
    assert not (tmp_path / "model").exists()
    assert hub.asked == []


def test_a_token_elsewhere_is_refused_too(share, hub, leaks, tmp_path: Path) -> None:
    code, out, err = share(SECTION, f"--commit-message={WRONG}")
    assert (code, "A token is on the command line" in err) == (2, True)
    (tmp_path / "notes.md").write_text(f"with {WRONG}")
    code, more, last = share(SECTION, "--notes", tmp_path / "notes.md")
    assert (code, "README.md holds a token" in last) == (2, True)
    (tmp_path / "notes.md").unlink()
    assert leaks(out, err, more, last) == []
    assert hub.asked == []


def test_a_run_that_was_trained_with_the_section_tells_nobody(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config, run = tiny_config(), tmp_path / "run"
    text = config.read_text()
    config.write_text(f"{text}export: {{license: mit, push_to: {NAME}, notes: private}}\n")
    short = ["training.max_epochs=1", "training.sample_every_n_epochs=0"]
    train(config, phantoms, run, overrides=short)
    code, out, err = cli("export", "-m", run, "-o", tmp_path / "model")
    assert code == 0, err
    assert "No license is stated" in out
    for path in (tmp_path / "model").iterdir():
        assert b"alice" not in path.read_bytes()
        assert b"private" not in path.read_bytes()
    config.write_text(f"{text}export: {{license: mit}}\n")
    train(config, phantoms, run, overrides=["training.max_epochs=2", short[1]])


def test_an_evaluation_that_mlcube_only_names(share, tmp_path: Path) -> None:
    code, _, err = share({}, "--evaluation=/mlcube_io2/results.yaml")
    assert code == 0, err
    assert "evaluation: there is no results.yaml, and the card shows no numbers." in err
    assert "model-index" not in header_of(card(tmp_path / "model"))
    code, _, err = share({}, f"--evaluation={tmp_path / 'results.yaml'}")
    assert (code, "results.yaml: No such file" in err) == (2, True)
