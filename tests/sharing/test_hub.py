"""Using a model of a Hub, wherever a model is taken; and what must not be used."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import socket
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import synthcube
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ArtifactError, HubError
from synthcube.models import artifact
from synthcube.sharing.card import header_of
from synthcube.sharing.hub import located

NAME = "alice/brains"
ADDRESS = f"hf://{NAME}"


def head(hub) -> str:
    return hub.repos[NAME].branches["main"]


def change(hub, **files: bytes | None) -> str:
    """Commit other content of some files: _ stands for a dot in their names."""
    repo = hub.repos[NAME]
    tree = dict(repo.head)
    for name, content in files.items():
        name = name.replace("_", ".")
        blob = type(next(iter(tree.values())))
        tree.pop(name, None) if content is None else tree.update({name: blob(content)})
    return repo.commit(tree, "main", "changed")


def seeds(folder: Path) -> list[str]:
    with (folder / "manifest.csv").open(newline="") as file:
        return [row["Seed"] for row in csv.DictReader(file)]


@pytest.fixture
def published(publish, hub):
    code, _, err = publish()
    assert code == 0, err
    hub.asked.clear()
    return hub


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0.0", "@commit"])
def test_infer_takes_an_address(revision: str, published, cli, first_stage, tmp_path) -> None:
    address = ADDRESS + revision.replace("commit", head(published))
    code, _, err = cli("infer", "-m", address, "-o", tmp_path / "theirs", "-n", 2)
    assert code == 0, err
    assert f"{ADDRESS}@{head(published)}: every file verified." in err
    run = first_stage("rectified_flow")
    assert cli("infer", "-m", run, "-o", tmp_path / "ours", "-n", 2)[0] == 0
    for name in ("00000.png", "00001.png"):
        theirs, ours = (tmp_path / side / "images" / name for side in ("theirs", "ours"))
        assert theirs.read_bytes() == ours.read_bytes()
    record = json.loads((tmp_path / "theirs" / "provenance.json").read_text())
    assert head(published) in record["artifact"]


def test_export_and_the_door_of_python_take_an_address(published, cli, tmp_path) -> None:
    code, _, err = cli("export", "-m", ADDRESS, "-o", tmp_path / "again", "--license", "mit")
    assert code == 0, err
    first, again = (artifact.load(tmp_path / name) for name in ("model", "again"))
    assert first.weights.read_bytes() == again.weights.read_bytes()
    model = synthcube.from_pretrained(NAME, accelerator="cpu")
    assert model.trained.sha256 == first.sha256
    assert synthcube.from_pretrained(f"{ADDRESS}@v1.0.0").trained.sha256 == first.sha256


def test_package_and_evaluate_take_an_address(published, cli, first_stage, tmp_path) -> None:
    code, _, err = cli("package", "-m", ADDRESS, "-o", tmp_path / "package")
    assert code == 0, err
    model = tmp_path / "package" / "workspace" / "additional_files" / "model"
    weights = artifact.load(first_stage("rectified_flow")).weights
    assert artifact.load(model).weights.read_bytes() == weights.read_bytes()
    sides = {}
    for option, seed in (("-p", 1), ("-l", 2)):
        folder = tmp_path / f"phantoms{seed}"
        sides[option] = write_phantoms(folder, num=12, size=(16, 16), seed=seed).parent
    light = tmp_path / "light.yaml"
    light.write_text("evaluation: {extractor: {name: radiomic}, num_repeats: 2}\n")
    words = [word for pair in sides.items() for word in pair]
    out = tmp_path / "results.yaml"
    code, _, err = cli("evaluate", *words, "-o", out, "-c", light, "-m", ADDRESS)
    assert code == 0, err
    assert f"{ADDRESS}@{head(published)}: every file verified." in err
    code, _, err = cli("export", "-m", ADDRESS, "-o", tmp_path / "again", "--evaluation", out)
    assert code == 0, err
    card = (tmp_path / "again" / "README.md").read_text()
    assert "| fidelity | frechet_distance |" in card
    assert "12 predictions, 12 labels, in features of radiomic" in card


def test_a_strangers_code_is_refused(published, cli, first_stage, tmp_path) -> None:
    folder = tmp_path / "model"  # as it was published
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["sampling"]["postprocessing"] = [{"name": "their_code.steps:Step"}]
    text = yaml.safe_dump(settings).encode()
    index = json.loads((folder / "artifact.json").read_text())
    index["files"]["config.yaml"] = hashlib.sha256(text).hexdigest()
    change(published, config_yaml=text, artifact_json=json.dumps(index).encode())
    for words in (["infer", "-n", 1], ["export"], ["package"]):
        code, _, err = cli(*words, "-m", ADDRESS, "-o", tmp_path / "out")
        assert code == 2
        assert "their_code.steps:Step is code that does not belong to SynthCube" in err
    with pytest.raises(ArtifactError, match="--trust their_code, or its folder"):
        synthcube.from_pretrained(NAME)


def test_only_what_the_index_lists_is_downloaded(published) -> None:
    change(published, model_pkl=b"cos\nsystem\n", train_py=b"import os", notes_json=b"{}")
    folder = located(ADDRESS)
    listed = {*artifact.read_index(folder), artifact.INDEX}
    assert {path.name for path in folder.iterdir()} == listed
    asked = {path for command, path in published.asked if "/resolve/" in path}
    assert {path.rpartition("/")[2] for path in asked} == listed


def test_a_model_that_is_here_is_not_downloaded_again(published) -> None:
    located(ADDRESS)
    published.asked.clear()
    located(ADDRESS)
    assert {path for _, path in published.asked if "/resolve/" in path} == {
        f"/{NAME}/resolve/main/{artifact.INDEX}"
    }
    published.asked.clear()
    assert located(f"{ADDRESS}@{head(published)}") == located(ADDRESS)


def test_a_branch_that_moves_meanwhile_gives_one_commit(published, monkeypatch) -> None:
    from synthcube.sharing import hub as module

    before, fetch = head(published), module._fetch

    def moved(*words, **settings) -> None:
        change(published, config_yaml=b"seed: 666\n")
        fetch(*words, **settings)

    monkeypatch.setattr(module, "_fetch", moved)
    folder = located(ADDRESS)
    assert folder.name == before
    assert artifact.load(folder).config["seed"] == 0
    assert head(published) != before


def test_a_flipped_byte_is_downloaded_again_and_then_refused(published, cli, tmp_path) -> None:
    published.flipped.add("model.safetensors")
    words = ("infer", "-m", ADDRESS, "-o", tmp_path / "images", "-n", 2)
    code, _, err = cli(*words)
    assert code == 2
    assert "is damaged, on the Hub or on the way from it (twice)" in err
    assert "model.safetensors has changed since it was written" in err
    assert not (tmp_path / "images").exists()
    published.flipped.clear()
    code, _, err = cli(*words)
    assert code == 0, err


def test_a_byte_that_flips_in_the_cache_is_mended(published, cli, tmp_path) -> None:
    folder = located(ADDRESS)
    for name in ("config.yaml", artifact.INDEX):
        path = (folder / name).resolve()
        path.write_bytes(path.read_bytes()[:-2])
        assert located(f"{ADDRESS}@{head(published)}") == folder
        assert artifact.load(folder)


def test_what_is_none_of_ours_is_refused(published, cli, tmp_path) -> None:
    index = json.loads(published.repos[NAME].head[artifact.INDEX].content)

    def refused(**files: bytes | None) -> str:
        change(published, **files)
        code, _, err = cli("infer", "-m", ADDRESS, "-o", tmp_path / "images", "-n", 1)
        assert code == 2
        assert "Traceback" not in err
        assert not any("model.safetensors" in path for _, path in published.asked)
        return err

    newer = json.dumps(index | {"schema_version": 99}).encode()
    assert "is of artifact schema 99" in refused(artifact_json=newer)
    listed = {**index["files"], "model.pkl": "0" * 64}
    unsafe = json.dumps(index | {"files": listed}).encode()
    assert "lists model.pkl: only .safetensors" in refused(artifact_json=unsafe)
    listed = {**index["files"], "../../evil.json": "0" * 64}
    outside = json.dumps(index | {"files": listed}).encode()
    assert "../../evil.json is not a name of a file" in refused(artifact_json=outside)
    assert "cannot be read" in refused(artifact_json=b"no json")
    assert "it is no model that SynthCube has exported" in refused(artifact_json=None)


@pytest.mark.parametrize(
    ("address", "user", "text"),
    [
        ("hf://alice/none", "right", "there is no such model on http://127.0.0.1"),
        (ADDRESS, "reader", "there is no such model on http://127.0.0.1"),
        (ADDRESS, "", "that is public (there is no token)"),
        (ADDRESS, "wrong", "does not accept the token"),
        (f"{ADDRESS}@v9", "right", "there is no such branch, tag or commit"),
        ("hf://brains", "right", "'brains' is no name of a model"),
        (f"{ADDRESS}@", "right", "'' is no revision"),
        (f"{ADDRESS}@../up", "right", "'../up' is no revision"),
    ],
)
def test_what_cannot_be_had(
    address: str, user: str, text: str, published, as_user, cli, leaks, tmp_path
) -> None:
    as_user(user)
    for command in (["infer", "-n", 1], ["export"]):
        code, out, err = cli(*command, "-m", address, "-o", tmp_path / "images")
        assert code == 2
        assert text in err
        assert err.count("error:") == 1
        assert "Traceback" not in err
        assert leaks(out, err) == []
    assert not (tmp_path / "images").exists()


def test_offline_takes_the_cache_or_says_so(published, cli, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ("infer", "-m", ADDRESS, "-n", 1, "-o")
    code, _, err = cli(*words, tmp_path / "one")
    assert code == 2
    assert "is not in the cache of this machine, and HF_HUB_OFFLINE=1" in err
    assert len(err.splitlines()) == 1
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert cli(*words, tmp_path / "two")[0] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    published.asked.clear()
    for place in ("three", "four"):
        code, _, err = cli(*words, tmp_path / place)
        assert code == 0, err
        words = ("infer", "-m", f"{ADDRESS}@{head(published)}", "-n", 1, "-o")
    assert published.asked == []
    (next(Path(constants.HF_HUB_CACHE).rglob("image.json"))).unlink()
    code, _, err = cli(*words, tmp_path / "five")
    assert (code, "its copy in the cache is not complete" in err) == (2, True)


def test_no_network(published, cli, monkeypatch, tmp_path) -> None:
    located(ADDRESS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    code, _, err = cli("infer", "-m", ADDRESS, "-n", 1, "-o", tmp_path / "one")
    assert code == 2, "an old copy is not taken for what the branch holds now"
    assert "cannot be reached or broke off" in err
    pinned = f"{ADDRESS}@{head(published)}"
    assert cli("infer", "-m", pinned, "-n", 1, "-o", tmp_path / "two")[0] == 0


@pytest.mark.slow
def test_a_training_starts_from_an_address_and_records_its_commit(
    published, cli, tiny_config, phantoms, first_stage, tmp_path
) -> None:
    words = ("train", "-c", tiny_config("rectified_flow"), "-d", phantoms, "-o", tmp_path / "run")
    words += ("--set", f"training.start_from={ADDRESS}")
    started = head(published)
    code, _, err = cli(*words)
    assert code == 0, err
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    assert recorded["start_from"] == f"{ADDRESS}@{started}"
    weights = artifact.load(first_stage("rectified_flow")).weights
    assert recorded["start_from_sha256"] == artifact.sha256(weights)
    change(published, config_yaml=b"seed: 666\n")
    published.asked.clear()
    code, _, err = cli(*words, "--set", "training.max_epochs=3")
    assert code == 0, err
    assert published.asked == [], "a run that goes on needs its start no more"
    code, _, err = cli("check", "-c", tiny_config("rectified_flow"), "-d", phantoms, "--set",
                       f"training.start_from={ADDRESS}@{started}")  # fmt: skip
    assert code == 0, err


def test_a_first_stage_of_a_hub(publish, cli, hub, tiny_config, phantoms, tmp_path) -> None:
    code, _, err = publish(family="vqvae")
    assert code == 0, err
    started = head(hub)
    words = ("train", "-c", tiny_config("code_prior"), "-d", phantoms, "-o", tmp_path / "run")
    words += ("--set", f"model.first_stage={ADDRESS}")
    code, _, err = cli(*words)
    assert code == 0, err
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    assert recorded["first_stage"] == f"{ADDRESS}@{started}"
    change(hub, artifact_json=None)
    code, _, err = cli(*words, "--set", "training.max_epochs=3")
    assert code == 0, err
    code, _, err = cli("export", "-m", tmp_path / "run", "-o", tmp_path / "prior")
    assert code == 0, err
    assert header_of((tmp_path / "prior" / "README.md").read_text())["base_model"] == [NAME]
    kept = artifact.load(tmp_path / "prior").config["model"]["first_stage"]
    assert kept == f"{ADDRESS}@{started}", "what is published may be told"
    code, _, err = cli(*words[:-1], "model.first_stage=hf://alice/none")
    assert (code, "there is no such model" in err) == (2, True)


@pytest.mark.parametrize("text", ["hf://a/b", "hf:/a/b", Path("hf://a/b"), "hf://a/b/"])
def test_an_address_survives_being_a_path(text) -> None:
    assert artifact.parse(text) == artifact.Address("a/b")


@pytest.mark.parametrize("text", ["a/b", "/hf:/a", "runs/hf", "hf", "https://a/b"])
def test_a_path_is_no_address(text: str) -> None:
    assert artifact.parse(text) is None


@pytest.mark.parametrize("text", ["hf://", "hf://a", "hf://a/b/c", "hf://../b", "hf://a/b.git"])
def test_a_broken_address_is_no_path(text: str) -> None:
    with pytest.raises(HubError, match="no name of a model"):
        artifact.parse(text)


# The Hub on loopback is one for huggingface_hub's own client.


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint)


# The client of 2.4.0 hands its files to httpx2 in a way that this will give up.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
def test_thirty_megabytes_go_up_and_come_back_byte_for_byte(hub, api: HfApi, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(30_000_080))
    (folder / "config.yaml").write_text("seed: 1\n")
    api.create_repo(NAME, private=True)
    done = api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="first")
    api.create_tag(NAME, tag="v1", revision=done.oid)
    info = api.model_info(NAME, revision="v1")
    assert (info.sha, info.private) == (done.oid, True)
    assert hub.received == 30_000_080
    got = Path(api.snapshot_download(NAME, revision="v1"))
    for path in folder.iterdir():
        assert (got / path.name).read_bytes() == path.read_bytes()
    assert api.whoami()["name"] == "alice"


def test_the_client_raises_what_we_explain(hub, api: HfApi) -> None:
    hub.make(NAME)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(NAME, "none.json")
    with pytest.raises(HfHubHTTPError):
        api.create_repo("bob/brains")


def test_the_validator_of_cards_has_an_opinion(validate) -> None:
    validate("---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="license"):
        validate("---\nlicense: mine\n---\n")
