"""croissant.json is what mlcroissant validates and reads, and tells of nobody."""

from __future__ import annotations

import csv
import getpass
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlcroissant
import nibabel
import numpy as np
import pytest
import yaml
from PIL import Image

from synthcube.data.phantom import write_phantoms
from synthcube.models import artifact
from synthcube.sharing.croissant import CITATION
from synthcube.storage import sha256
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.train import train

# mlcroissant 1.1 calls rdflib 7.6 as it was
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:rdflib")

PERSON, HOST, SUBJECT, FOLDER = "mwinterbottom", "radnode17", "MRN-0048213", "secret-cohort"
# What mlcroissant recommends and only a publisher knows.
UNKNOWN = {'Property "https://schema.org/datePublished" is recommended, but does not exist.'}
LICENSE = 'Property "https://schema.org/license" is recommended, but does not exist.'


def with_column(path: Path, name: str, text: str, count: int = 1000) -> None:
    """Write a column of a CSV: `text` with the row's number modulo `count`."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys([*rows[0], name]))
        writer.writeheader()
        writer.writerows({**row, name: text.format(i % count)} for i, row in enumerate(rows))


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    """A run that follows a class, a class named by a number, and a number."""
    from synthcube import reading
    from synthcube.models import registry

    folder = tmp_path_factory.mktemp("conditional")
    with_column(write_phantoms(folder / "data", num=12, size=(16, 16)), "Scan site", "{:02d}", 2)
    model = registry.find("rectified_flow").tiny().model_dump(mode="json")
    settings = {
        "model": model,
        "data": {"conditions": {"Label": "class", "Scan site": "class", "Radius": "number"}},
        "training": {"max_epochs": 1, "batch_size": 6, "num_sample_images": 1},
        "compute": {"accelerator": "cpu"},
    }
    (folder / "config.yaml").write_text(reading.dump(settings))
    train(folder / "config.yaml", folder / "data", folder / "run")
    return folder / "run"


def read(folder: Path) -> tuple[dict[str, Any], mlcroissant.Dataset]:
    path = folder / "croissant.json"
    return json.loads(path.read_text(encoding="utf-8")), mlcroissant.Dataset(jsonld=path)


def warnings(dataset: mlcroissant.Dataset) -> set[str]:
    issues = dataset.metadata.ctx.issues
    assert issues.errors == set()
    return {re.sub(r"^\[.*?\] ", "", warning) for warning in issues.warnings}


def text(value: bytes | None) -> str:
    return "" if value is None else value.decode()


def test_made_images_are_read_back_with_what_they_follow(
    conditional: Path, cli, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(getpass, "getuser", lambda: PERSON)
    out = tmp_path / PERSON / FOLDER / "images"
    words = ("infer", "-m", conditional, "-o", out, "-n", 3, "--seed", 5, "--croissant")
    caplog.set_level(logging.WARNING)
    code, told, err = cli(*words, "--license", "cc-by-4.0", "--creator", "A group of three")
    assert code == 0, err
    index = sha256(conditional / "artifact" / artifact.INDEX)
    assert f"Description: {out / 'croissant.json'}" in told
    said, dataset = read(out)
    assert warnings(dataset) == UNKNOWN
    held = (out / "croissant.json").read_text()
    with (conditional / "split.csv").open(newline="") as file:
        subjects = [row["SubjectID"] for row in csv.DictReader(file)]
    places = (str(tmp_path), str(conditional.parent))
    assert [word for word in (PERSON, HOST, FOLDER, *places, *subjects) if word in held] == []
    assert index in said["description"]
    assert index in said["prov:wasGeneratedBy"]["prov:used"]["prov:label"]
    assert "For research only" in said["description"]
    assert said["rai:hasSyntheticData"] is True
    assert "made out of noise" in dataset.metadata.data_collection
    assert any("copies" in sentence for sentence in dataset.metadata.personal_sensitive_information)
    assert dataset.metadata.conforms_to[0] == "http://mlcommons.org/croissant/1.1"
    assert (said["license"], said["version"]) == ("cc-by-4.0", "1.0.0")
    assert said["creator"] == [{"@type": "Organization", "name": "A group of three"}]
    assert said["distribution"][0]["sha256"] == sha256(out / "manifest.csv")
    with (out / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = list(dataset.records("images"))
    assert not re.search("not standard|not match", caplog.text), "of mlcroissant, as it reads"
    assert len(records) == len(rows) == 3
    assert len({record["images/Seed"] for record in records}) == 3
    for row, record in zip(rows, records, strict=True):
        assert text(record["images/file"]) == Path(row["Channel_0"]).name
        assert text(record["images/SubjectID"]) == row["SubjectID"]
        assert record["images/Seed"] == int(row["Seed"])
        assert text(record["images/Label"]) == row["Label"]
        assert record["images/Radius"] == float(row["Radius"])
        assert isinstance(record["images/Radius"], float)
        with Image.open(out / row["Channel_0"]) as picture:
            expected = np.asarray(picture.convert("RGB"))
        np.testing.assert_array_equal(np.asarray(record["images/image"]), expected)
    specs = {spec.name: spec for spec in artifact.load(conditional).image.conditions}
    for name, part in (("Label", "Label"), ("Scan site", "Scan_site")):
        classes = dataset.records(f"{part}-classes")
        assert tuple(record[f"{part}-classes/name"] for record in classes) == specs[name].classes
    with (out / "manifest.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(mlcroissant.GenerationError, match=r"Download\(manifest.csv\)"):
        list(read(out)[1].records("images"))


def test_volumes(tmp_path: Path, cli) -> None:
    from synthcube import reading
    from synthcube.models import registry

    manifest = write_phantoms(tmp_path / "data", num=4, size=(16, 16, 16), spacing_mm=(1, 1, 2))
    with_column(manifest, "Site", "{}", 2)
    settings = {
        "model": registry.find("rectified_flow").tiny().model_dump(mode="json"),
        "data": {"conditions": {"Site": "class", "Label": "class"}},
        "training": {"max_epochs": 1, "batch_size": 2, "num_sample_images": 1},
        "sampling": {
            "croissant": {"license": "cc-by-4.0"},
            "num_images": 2,
            "postprocessing": [{"name": "clip", "low": 0.0}],
        },
        "compute": {"accelerator": "cpu"},
    }
    (tmp_path / "config.yaml").write_text(reading.dump(settings))
    train(tmp_path / "config.yaml", tmp_path / "data", tmp_path / "run")
    out = tmp_path / "images"
    words = ("-o", out, "-c", tmp_path / "config.yaml", "--croissant", "--creator", "Us")
    code, _, err = cli("infer", "-m", tmp_path / "run", *words)
    assert code == 0, err
    said, dataset = read(out)
    assert (said["license"], said["creator"][0]["name"]) == ("cc-by-4.0", "Us"), "YAML, then words"
    assert warnings(dataset) == UNKNOWN
    assert said["distribution"][1]["includes"] == "images/*.nii.gz"
    assert said["rai:dataManipulationProtocol"].endswith("after the model: clip.")
    records = list(dataset.records("images"))
    names = [text(record["images/file"]) for record in records]
    assert names == ["00000.nii.gz", "00001.nii.gz"]
    assert [text(record["images/SubjectID"]) for record in records] == ["00000", "00001"]
    specs = artifact.load(tmp_path / "run").image.conditions
    for spec in specs:
        assert {text(record[f"images/{spec.name}"]) for record in records} <= set(spec.classes)
    fields = {column["name"]: column for column in said["recordSet"][0]["field"]}
    assert "references" in fields["Label"]
    assert "references" not in fields["Site"], "mlcroissant cannot join numbers to texts"
    assert "As text" in fields["Site"]["description"]
    assert nibabel.load(out / "images" / names[1]).shape == (16, 16, 16)


@pytest.mark.parametrize("task", ["reconstruct", "translate"])
def test_images_of_people_are_said_to_be_and_name_nobody(
    task: str, first_stage, tiny_config, cli, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(getpass, "getuser", lambda: PERSON)
    channels = 2 if task == "translate" else 1
    data = tmp_path / PERSON / FOLDER / "data"
    manifest = write_phantoms(data, num=3, size=(16, 16), channels=channels)
    if task == "translate":
        run = tmp_path / "run"
        overrides = ["training.max_epochs=1", "data.source_channels=[0]"]
        train(tiny_config("rectified_flow"), data, run, overrides=overrides)
    else:
        run = first_stage("vqvae")
    with_column(manifest, "SubjectID", SUBJECT + "-{}")
    out = tmp_path / "images"
    code, _, err = cli("infer", "-m", run, "-o", out, "-d", data, "--croissant")
    assert code == 0, err
    held = (out / "croissant.json").read_text()
    assert [word for word in (PERSON, HOST, SUBJECT, FOLDER, str(tmp_path)) if word in held] == []
    assert SUBJECT in (out / "manifest.csv").read_text(), "or nothing was planted"
    said, dataset = read(out)
    assert warnings(dataset) == UNKNOWN | {LICENSE}
    assert "license" not in said
    assert "creator" not in said
    assert "derived from real images of real people" in said["description"]
    assert any("derived from a real image" in sentence
               for sentence in said["rai:personalSensitiveInformation"])  # fmt: skip
    columns = [
        column["source"]["extract"].get("column") for column in said["recordSet"][0]["field"]
    ]
    assert "Source" not in columns
    records = list(dataset.records("images"))
    assert [text(record["images/SubjectID"]) for record in records] == [
        f"{SUBJECT}-{i}" for i in range(3)
    ]
    assert all(record["images/image"].size == (16, 16) for record in records)
    assert "croissant.json will state no license" in err
    assert "made out of those of real people" in err


def test_again_gives_the_same_bytes_and_what_is_unfinished_has_none(
    conditional: Path, cli, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "images"
    words = ("infer", "-m", conditional, "-o", out, "-n", 2, "--croissant", "--license", "mit")
    assert cli(*words)[0] == 0
    before = (out / "croissant.json").read_bytes()
    from synthcube.tasks import inference_jobs

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(inference_jobs, "finish", full)
        with pytest.raises(OSError, match="No space"):
            infer(InferRequest(conditional, out, num_images=2))
    assert not (out / "croissant.json").exists()
    assert cli(*words)[0] == 0
    assert (out / "croissant.json").read_bytes() == before


@pytest.mark.slow
def test_of_several_processes_one_writes_it(conditional: Path, tmp_path: Path, cli) -> None:
    words = ("-m", conditional, "-n", 2, "--batch_size", 1, "--croissant", "--license", "mit")
    assert cli("infer", *words, "-o", tmp_path / "one")[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = tmp_path / "two.yaml"
    two.write_text("compute: {num_devices: 2, accelerator: cpu}\n")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "synthcube", "infer", *map(str, words), "-c", str(two)]
    processes = [
        subprocess.Popen(
            [*command, "-o", str(tmp_path / "ranks")],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert sum(out.count("Description: ") for out, _ in told) == 1
    written = [(tmp_path / side / "croissant.json").read_bytes() for side in ("one", "ranks")]
    assert written[0] == written[1]


def test_a_user_may_be_called_as_a_word_of_ours(
    conditional: Path, cli, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "research")
    words = ("infer", "-m", conditional, "-o", tmp_path / "images", "-n", 1, "--croissant")
    code, _, err = cli(*words, "--license", "mit", "--creator", "The research group")
    assert code == 0, err


def test_nothing_is_made_where_people_would_be_told_of(
    conditional: Path, cli, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "images"
    shutil.copytree(conditional, run)
    path = run / "artifact" / artifact.IMAGE
    image = json.loads(path.read_text())
    image["conditions"][2]["name"] = f"since {SUBJECT}"
    path.write_text(json.dumps(image))
    artifact.write_index(run / "artifact")
    with_column(run / "split.csv", "SubjectID", SUBJECT)
    code, _, err = cli("infer", "-m", run, "-o", out, "-n", 1, "--croissant")
    assert code == 2
    assert f"croissant.json holds a subject's id ({SUBJECT})" in err
    assert not out.exists()
    assert cli("infer", "-m", run, "-o", out, "-n", 1)[0] == 0, "undescribed they are nobody's"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--croissant", "--license", "the usual one"), "--license 'the usual one': give an"),
        (("--license", "mit"), "--license and --creator are of --croissant"),
        (("--creator", "Us"), "--license and --creator are of --croissant"),
    ],
)
def test_bad_input(words: tuple[str, ...], fault: str, cli, tmp_path: Path) -> None:
    code, _, err = cli("infer", "-m", tmp_path, "-o", tmp_path / "images", *words)
    assert (code, fault in err) == (2, True), err


def test_the_citation_is_that_of_the_project() -> None:
    cited = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    (author,) = cited["authors"]
    for stated in (cited["title"], author["name"], cited["version"], cited["license"]):
        assert f"{{{stated}}}" in CITATION
