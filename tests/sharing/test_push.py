"""Publishing a model, and everything that may come between."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from synthcube.models import artifact
from synthcube.sharing.hub import located
from synthcube.sharing.runtimes import is_part
from synthcube.storage import sha256

NAME = "alice/brains"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


def test_a_push_is_one_private_tagged_commit(publish, hub, leaks, tmp_path: Path) -> None:
    code, out, err = publish("--commit-message", "our first")
    assert code == 0, err
    repo = hub.repos[NAME]
    head = repo.branches["main"]
    assert f"Published: hf://{NAME}@{head}" in out
    assert repo.private
    assert repo.messages == ["initial", "our first"]
    assert repo.tags == {"v1.0.0": head}
    there = {name: blob.sha256 for name, blob in repo.head.items() if name[0] != "."}
    assert there == contents(tmp_path / "model")
    assert "The Hub is http://127.0.0.1" in err or hub.endpoint.startswith("http://127.0.0.1")
    assert leaks(out, err) == []


def test_what_was_pushed_is_what_the_client_gets(publish, hub, tmp_path: Path) -> None:
    assert publish()[0] == 0
    got = Path(HfApi(endpoint=hub.endpoint).snapshot_download(NAME, revision="v1.0.0"))
    for path in (tmp_path / "model").iterdir():
        assert (got / path.name).read_bytes() == path.read_bytes()
    assert artifact.load(got).sha256 == artifact.load(tmp_path / "model").sha256


def test_a_second_push_of_the_same_does_nothing(publish, hub) -> None:
    assert publish()[0] == 0
    received, before = hub.received, dict(hub.repos[NAME].commits)
    hub.asked.clear()
    code, out, _ = publish()
    assert code == 0
    assert "Already published, nothing to do" in out
    assert hub.repos[NAME].commits == before
    assert hub.received == received
    assert not [path for command, path in hub.asked if command == "PUT" or "/commit/" in path]


def test_another_content_needs_another_version(publish, hub) -> None:
    assert publish()[0] == 0
    before = dict(hub.repos[NAME].commits)
    code, _, err = publish("--dataset", "alice/scans")
    assert code == 2
    assert "has a version v1.0.0 already" in err
    assert hub.repos[NAME].commits == before
    received = hub.received
    code, _, err = publish("--dataset", "alice/scans", "--model-version", "1.1.0")
    assert code == 0, err
    assert sorted(hub.repos[NAME].tags) == ["v1.0.0", "v1.1.0"]
    assert hub.received == received, "weights that were there went up again"


def test_only_the_model_goes_up_whatever_lies_beside_it(publish, hub, tmp_path) -> None:
    folder = tmp_path / "model"
    assert publish(name="alice/other")[0] == 0
    (folder / "cohort.csv").write_text("SubjectID\nMRN-1\n")
    (folder / "notes").mkdir()
    (folder / "LICENSE").write_text("MIT")
    code, _, err = publish()
    assert code == 0, err
    head = set(hub.repos[NAME].head)
    assert "cohort.csv" not in head
    assert head == {*hub.repos["alice/other"].head, "LICENSE"}
    assert located(f"hf://{NAME}")


def test_what_an_older_export_called_otherwise_goes(publish, hub) -> None:
    assert publish()[0] == 0
    repo = hub.repos[NAME]
    old = {**repo.head, artifact.WEIGHTS: repo.head[artifact.EXPORTED_WEIGHTS]}
    repo.commit(old, "main", "as it was")
    repo.tags.clear()
    assert publish()[0] == 0
    assert artifact.WEIGHTS not in repo.head
    assert artifact.EXPORTED_WEIGHTS in repo.head


def test_a_branch_is_made_where_there_is_none(publish, hub) -> None:
    code, _, err = publish("--revision", "trial")
    assert code == 0, err
    repo = hub.repos[NAME]
    assert artifact.INDEX in repo.commits[repo.branches["trial"]]
    assert artifact.INDEX not in repo.head
    code, _, err = publish()
    assert code == 0, err
    assert artifact.INDEX in repo.head, "the same version, with the same content"
    assert repo.tags == {"v1.0.0": repo.branches["trial"]}


@pytest.mark.parametrize("dead", ["upload", "commit"])
def test_a_hub_that_dies_leaves_nothing_and_the_same_command_goes_on(
    dead: str, publish, hub, refuse, leaks, tmp_path: Path
) -> None:
    if dead == "upload":
        hub.dies_after = 2000
    else:
        refuse("/commit/", 503)
    code, out, err = publish()
    assert code == 2
    assert "cannot be reached or broke off" in err or "out of order at the moment (503)" in err
    assert "Traceback" not in err
    assert set(hub.repos[NAME].head) == {".gitattributes"}
    assert hub.repos[NAME].tags == {}
    local = contents(tmp_path / "model")
    hub.dies_after, received = None, hub.received
    hub.refusals.clear()
    code, again, err = publish()
    assert code == 0, err
    assert contents(tmp_path / "model") == local
    assert (hub.received == received) is (dead == "commit"), "it goes on with what is there"
    assert artifact.INDEX in hub.repos[NAME].head
    assert leaks(out, err, again) == []


def test_a_tag_that_failed_is_set_by_the_next_push(publish, hub, refuse) -> None:
    refuse("/tag/", 500)
    assert publish()[0] == 2
    hub.refusals.clear()
    code, out, _ = publish()
    assert code == 0
    assert "Already published" in out
    assert hub.repos[NAME].tags == {"v1.0.0": hub.repos[NAME].branches["main"]}


def test_a_branch_that_moves_meanwhile_is_not_overwritten(publish, hub) -> None:
    hub.make(NAME)
    repo = hub.repos[NAME]
    hub.before_commit = lambda: repo.commit(dict(repo.head), "main", "by another")
    code, _, err = publish()
    assert code == 2
    assert "changed by someone else meanwhile" in err
    assert repo.messages == ["initial", "by another"]
    hub.before_commit = lambda: None
    assert publish()[0] == 0


@pytest.mark.parametrize(
    ("part", "status", "text"),
    [
        ("/commit/", 402, "no room left"),
        ("/lfs/", 413, "no room left"),
        ("/lfs/", 507, "no room left"),
        ("/commit/", 403, "this token may not do that"),
        ("/api/repos/create", 429, "too many requests"),
        ("/preupload/", 500, "out of order"),
        ("/api/repos/create", 418, "refuses it (418)"),
    ],
)
def test_refusals_are_one_sentence_and_publish_nothing(
    part: str, status: int, text: str, publish, hub, refuse, leaks
) -> None:
    refuse(part, status, message="storage of hf_AliceMayWriteHere is full")
    code, out, err = publish()
    assert code == 2
    assert text in err
    assert f"error: Pushing to {NAME}: " in err
    assert "Traceback" not in err
    head = hub.repos[NAME].head if NAME in hub.repos else {}
    assert artifact.INDEX not in head
    assert leaks(out, err) == [], "the Hub's own words may hold the token"


@pytest.mark.parametrize(
    ("user", "name", "text"),
    [
        ("wrong", NAME, "does not accept the token"),
        ("", NAME, "there is no token; set HF_TOKEN"),
        ("right", "bob/brains", "the name may be taken by someone else"),
        ("right", "brains", "'brains' is no name of a model on a Hub"),
        ("right", "alice/brains/3d", "is no name of a model on a Hub"),
        ("right", "alice/my brains", "is no name of a model on a Hub"),
        ("right", "alice/-brains", "is no name of a model on a Hub"),
        ("right", "alice/" + "b" * 100, "96 characters at most"),
    ],
)
def test_names_and_tokens_that_will_not_do(
    user: str, name: str, text: str, publish, as_user, hub, leaks
) -> None:
    as_user(user)
    code, out, err = publish(name=name)
    assert code == 2
    assert text in err
    assert "Traceback" not in err
    assert hub.repos == {}
    assert leaks(out, err) == []


def test_a_name_that_is_taken(publish, hub, as_user) -> None:
    hub.make("bob/brains", private=True)
    code, _, err = publish(name="bob/brains")
    assert code == 2
    assert "bob/brains is taken by someone else" in err
    hub.repos["bob/brains"].private = False
    code, _, err = publish("--public", name="bob/brains")
    assert code == 2
    assert "this token may not do that" in err
    assert set(hub.repos["bob/brains"].head) == {".gitattributes"}


def test_a_repository_of_something_else_is_left_alone(publish, hub) -> None:
    repo = hub.make(NAME)
    other = dict(repo.head)
    other["thesis.pdf"] = other[".gitattributes"]
    repo.commit(other, "main", "mine")
    code, _, err = publish()
    assert code == 2
    assert f"{NAME} holds something else (thesis.pdf)" in err
    assert set(repo.head) == {".gitattributes", "thesis.pdf"}


def test_nothing_becomes_public_by_accident(publish, hub) -> None:
    hub.make(NAME, private=False)
    code, _, err = publish()
    assert code == 2
    assert "is public, and everyone would see the model" in err
    assert artifact.INDEX not in hub.repos[NAME].head
    assert publish("--public")[0] == 0
    assert publish("--public", name="alice/open")[0] == 0
    assert not hub.repos["alice/open"].private


def test_the_hub_judges_the_card_before_anything_is_made(cli, hub, first_stage, tmp_path) -> None:
    words = ["export", "-m", first_stage("rectified_flow"), "-o", tmp_path / "model"]
    code, _, err = cli(*words, "--push-to", NAME)
    assert code == 2
    assert "--push_to needs a license" in err
    assert not (tmp_path / "model").exists()
    code, _, err = cli(*words, "--push-to", NAME, "--license", "mine-alone")
    assert code == 2
    assert "refuses the metadata at the top of the card" in err
    assert '"license" must be one of' in err
    assert hub.repos == {}


def test_no_network_and_offline(publish, hub, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = publish()
    assert (code, "HF_HUB_OFFLINE=1 forbids it" in err) == (2, True)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    code, _, err = publish()
    assert code == 2
    assert "cannot be reached or broke off" in err
    assert "Traceback" not in err
    assert artifact.load(tmp_path / "model")


def test_what_answers_but_is_no_hub(publish, monkeypatch) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in to this network</html>")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    code, _, err = publish()
    server.shutdown()
    server.server_close()
    assert code == 2
    assert "does not answer like a Hub; is HF_ENDPOINT right" in err


def test_a_damaged_folder_is_not_pushed(publish, hub, tmp_path: Path) -> None:
    from synthcube.errors import ArtifactError, HubError
    from synthcube.sharing.push import push

    assert publish()[0] == 0
    before = dict(hub.repos[NAME].commits)
    folder = tmp_path / "model"
    (folder / "image.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"image\.json has changed"):
        push(folder, NAME)
    assert publish()[0] == 0, "it is exported anew"
    (folder / "README.md").write_text("# mine\n")
    with pytest.raises(HubError, match="states no license"):
        push(folder, NAME)
    (folder / "metadata.json").write_text(json.dumps({}))
    artifact.write_index(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ArtifactError, match="does not say the model's version"):
        push(folder, NAME)
    assert hub.repos[NAME].commits == before


def parts(names) -> set[str]:
    return {name for name in names if is_part(name)}


def test_who_gets_the_model_computes_with_the_runtime(publish, hub, cli, tmp_path: Path) -> None:
    code, _, err = publish("--runtime", "onnx", family="dcgan")
    assert code == 0, err
    repo = hub.repos[NAME]
    there = repo.commits[repo.branches["main"]]
    assert parts(there) == {"onnx.json", "onnx.generator.onnx"}
    words = ("infer", "-n", 2, "--runtime", "onnx")
    assert cli(*words, "-m", tmp_path / "model", "-o", tmp_path / "here")[0] == 0
    code, _, err = cli(*words, "-m", f"hf://{NAME}", "-o", tmp_path / "there")
    assert code == 0, err
    for path in (tmp_path / "here" / "images").iterdir():
        assert (tmp_path / "there" / "images" / path.name).read_bytes() == path.read_bytes()


def test_a_version_without_them_takes_them_away(publish, hub) -> None:
    assert publish("--runtime", "onnx", family="dcgan")[0] == 0
    code, _, err = publish("--model-version", "1.1.0", family="dcgan")
    assert code == 0, err
    repo = hub.repos[NAME]
    assert parts(repo.commits[repo.branches["main"]]) == set()
    assert len(parts(repo.commits[repo.tags["v1.0.0"]])) == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "openvino.py", "onnx.network.pkl"])
def test_other_binary_files_are_not_taken(name, publish, hub, cli, tmp_path: Path) -> None:
    assert publish(family="dcgan")[0] == 0
    repo = hub.repos[NAME]
    folder = tmp_path / "model"
    (folder / name).write_bytes(b"anything")
    artifact.write_index(folder, [*artifact.read_index(folder), name])
    files = dict(repo.commits[repo.branches["main"]])
    index = files["artifact.json"]
    files["artifact.json"] = type(index)((folder / "artifact.json").read_bytes())
    files[name] = type(index)(b"anything")
    repo.commit(files, "main", "something else")
    code, _, err = cli("infer", "-m", f"hf://{NAME}", "-o", tmp_path / "out", "-n", 1)
    assert code == 2
    assert f"lists {name}: only" in err
    assert not (tmp_path / "out").exists()
