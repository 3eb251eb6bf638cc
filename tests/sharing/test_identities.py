"""Nothing that is exported tells of people or machines: all of it is planted, none comes out."""

from __future__ import annotations

import csv
import getpass
import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from synthcube.models import artifact
from synthcube.sharing.config import ExportRequest
from synthcube.tasks.export import export

PERSON, HOST, SUBJECT = "mwinterbottom", "radnode17", "MRN-0048213"
PLANTED = (PERSON, HOST, SUBJECT, "secret-cohort", "knee-study", "lab-entity")


@pytest.fixture
def run(first_stage, tmp_path: Path) -> Path:
    """A run of two stages on whose every place something personal is written."""
    folder = tmp_path / "run"
    shutil.copytree(first_stage("rectified_flow"), folder)
    return folder


def plant(run: Path, **sections: dict) -> None:
    path = run / "artifact" / artifact.CONFIG
    config = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        config[section] |= values
    path.write_text(yaml.safe_dump(config))
    artifact.write_index(run / "artifact")


def rewrite_split(run: Path, **cells: str) -> None:
    path = run / "split.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, **cells} for row in rows)


def everything(folder: Path) -> bytes:
    return b"\n".join(path.name.encode() + path.read_bytes() for path in folder.iterdir())


def test_what_is_planted_does_not_come_out(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(getpass, "getuser", lambda: PERSON)
    home = f"/home/{PERSON}/secret-cohort"
    augmentation = [
        {"name": "RandomNoise", "std": [0.0, 0.1], "p": 1.0},
        {"name": "HistogramStandardization", "landmarks": {"t1": f"{home}/landmarks.npy"}},
    ]
    logger = {"name": "wandb", "arguments": {"project": "knee-study", "entity": "lab-entity"}}
    plant(
        run,
        training={
            "start_from": "../secret-cohort/run", "start_anew": ["network.*"],
            "loggers": [logger, {"name": "mlflow",
                                 "arguments": {"tracking_uri": f"http://{HOST}:5000"}}],
        },
        data={"augmentation": augmentation},
        evaluation={"extractor": {"name": "inception", "weights": f"{home}/inception.pt"}},
        sampling={"free": [f"{home}/loss.py", f"{PERSON}@{HOST}:/x", "C:\\secret-cohort\\y"]},
    )  # fmt: skip
    rewrite_split(run, SubjectID=SUBJECT, Channel_0=f"{home}/{SUBJECT}/t1.nii.gz")
    out = export(run, tmp_path / "out", ExportRequest(license="mit"))
    held = everything(out)
    assert [word for word in PLANTED if word.encode() in held] == []
    config = artifact.load(out).config
    assert config["training"]["start_from"] == "removed-by-export"
    assert config["training"]["start_anew"] == ["network.*"]
    assert config["training"]["loggers"] == []
    assert config["data"]["augmentation"][0] == augmentation[0], "what tells of nobody stays"
    assert config["seed"] == yaml.safe_load((run / "config.yaml").read_text())["seed"]


def test_a_first_stage_is_told_of_only_by_its_hash(
    cli, first_stage, tiny_config, phantoms, tmp_path
):
    words = ("train", "-c", tiny_config("code_prior"), "-d", phantoms, "-o", tmp_path / "run")
    assert cli(*words)[0] == 0
    code, _, err = cli("export", "-m", tmp_path / "run", "-o", tmp_path / "out")
    assert code == 0, err
    before, after = artifact.load(tmp_path / "run"), artifact.load(tmp_path / "out")
    assert before.config["model"]["first_stage"] == str(first_stage("vqvae"))
    assert after.config["model"]["first_stage"] == ""
    digest = "first_stage_sha256"
    assert after.config["model"][digest] == before.config["model"][digest]
    assert str(first_stage("vqvae").parent).encode() not in everything(tmp_path / "out")
    for folder in (tmp_path / "run", tmp_path / "out"):
        assert cli("infer", "-m", folder, "-o", tmp_path / f"{folder.name}-images", "-n", 2)[0] == 0
    contents = [
        (tmp_path / f"{side}-images/images/00001.png").read_bytes() for side in ("run", "out")
    ]
    assert contents[0] == contents[1]


def test_what_is_left_over_stops_the_export(run: Path, cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: PERSON)
    plant(run, sampling={"note": f"by {PERSON}", "cohort": f"without {SUBJECT}_t1"})
    rewrite_split(run, SubjectID=SUBJECT)
    code, _, err = cli("export", "-m", run, "-o", tmp_path / "out")
    assert code == 2
    assert f"config.yaml holds the name of this user or machine ({PERSON})" in err
    assert f"config.yaml holds a subject's id ({SUBJECT})" in err
    assert not (tmp_path / "out").exists()


def test_notes_of_the_authors_are_looked_at_too(run: Path, cli, tmp_path: Path) -> None:
    rewrite_split(run, SubjectID=SUBJECT, Channel_0=f"/srv/scans/{SUBJECT}.nii.gz")
    notes = tmp_path / "notes.md"
    notes.write_text(f"The best image is that of {SUBJECT}, see /srv/scans.")
    results = tmp_path / "results.yaml"
    measure = {"value": None, "reason": f"no reference for {SUBJECT}"}
    results.write_text(yaml.safe_dump({"synthcube_evaluation": 1, "pairs": {"ssim": measure}}))
    code, _, err = cli("export", "-m", run, "-o", tmp_path / "out", "--evaluation", results)
    assert (code, f"README.md holds a subject's id ({SUBJECT})" in err) == (2, True)
    code, _, err = cli("export", "-m", run, "-o", tmp_path / "out", "--notes", notes)
    assert code == 2
    assert f"README.md holds a subject's id ({SUBJECT})" in err
    assert "README.md holds a folder of the training images (/srv/scans)" in err


@pytest.mark.parametrize("user", ["root", "data", "mit", "cpu"])
def test_an_ordinary_word_is_no_name(user: str, run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    assert export(run, tmp_path / "out")


@pytest.mark.parametrize("name", ["safetensors", "torchio", "lightning"])
def test_a_package_is_neither_a_user_nor_a_folder(
    name: str, run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: name)
    plant(run, sampling={"note": f"weights by {name}"})
    rewrite_split(run, Channel_0=f"{name}/scan.png")
    out = export(run, tmp_path / "out")
    described = json.loads((out / "metadata.json").read_text())
    assert name in described["required_packages_version"]
    assert artifact.load(out).config["sampling"]["note"] == f"weights by {name}"


@pytest.mark.parametrize("subject", ["0001", "1000", "000001", "12", "ring"])
def test_an_id_that_is_an_ordinary_number_stops_nothing(
    subject: str, run: Path, tmp_path: Path
) -> None:
    plant(run, sampling={"rate": 0.0001, "steps": 1000, "small": 0.000001})
    rewrite_split(run, SubjectID=subject)
    assert export(run, tmp_path / "out")


def test_a_long_number_is_an_id(run: Path, cli, tmp_path: Path) -> None:
    plant(run, sampling={"note": "without 0048213"})
    rewrite_split(run, SubjectID="0048213")
    assert "holds a subject's id (0048213)" in cli("export", "-m", run, "-o", tmp_path / "out")[2]


def with_image(run: Path, **values: object) -> None:
    path = run / "artifact" / artifact.IMAGE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    artifact.write_index(run / "artifact")


def test_classes_that_are_subjects(run: Path, cli, tmp_path: Path) -> None:
    rewrite_split(run, SubjectID=SUBJECT)
    with_image(run, labels=[SUBJECT])
    code, _, err = cli("export", "-m", run, "-o", tmp_path / "out")
    assert code == 0, err
    assert SUBJECT.encode() not in everything(tmp_path / "out")
    assert artifact.load(tmp_path / "out").image.labels == ()
    condition = {"name": "Label", "kind": "class", "classes": [SUBJECT], "low": 0.0, "high": 0.0}
    with_image(run, conditions=[condition])
    code, _, err = cli("export", "-m", run, "-o", tmp_path / "other")
    assert code == 2
    assert "The classes of the condition Label are subjects (1 of them)" in err
    assert not (tmp_path / "other").exists()


def test_pictures_of_real_images_stay_here(first_stage, tmp_path: Path) -> None:
    """What reconstructs is shown with its originals above."""
    run = first_stage("vqvae")
    assert (run / "artifact" / artifact.PICTURE).exists()
    out = export(run, tmp_path / "out")
    assert not (out / artifact.PICTURE).exists()
    assert artifact.PICTURE not in (out / artifact.CARD).read_text()


def test_a_discriminator_stays_here(cli, first_stage, tiny_config, phantoms, tmp_path) -> None:
    run = first_stage("dcgan")
    whole = load_file(artifact.load(run).weights)
    out = export(run, tmp_path / "out")
    kept = load_file(artifact.load(out).weights)
    gone = set(whole) - set(kept)
    assert gone
    assert {name.partition(".")[0] for name in gone} == {"discriminator"}
    for side in (run, out):
        code, _, err = cli("infer", "-m", side, "-o", tmp_path / f"{side.name}-made", "-n", 2)
        assert code == 0, err
    names = [tmp_path / f"{side.name}-made/images/00001.png" for side in (run, out)]
    assert names[0].read_bytes() == names[1].read_bytes()
    words = ("train", "-c", tiny_config("dcgan"), "-d", phantoms, "-o", tmp_path / "tuned")
    words += ("--set", f"training.start_from={out}")
    code, _, err = cli(*words)
    assert code == 2
    assert "training.start_anew" in err
    code, _, err = cli(*words, "--set", "training.start_anew=['discriminator.*']")
    assert code == 0, err
