"""A real Hub on loopback: HTTP, LFS, commits, branches, tags, tokens; and what may go wrong there.

It speaks the part of the Hub's protocol that huggingface_hub's own client uses (read off 2.4.0).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, constants

TOKEN, READER, WRONG = "hf_AliceMayWriteHere", "hf_BobMayWriteElsewhere", "hf_NobodyKnowsThisOne"
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other")
_LARGE = (".safetensors", ".png")


@dataclass
class Blob:
    content: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repo:
    owner: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, Blob], branch: str, message: str) -> str:
        text = json.dumps([len(self.commits), branch, {n: b.oid for n, b in files.items()}])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        known = {**self.branches, **self.tags, **{sha: sha for sha in self.commits}}
        return known.get(revision)

    @property
    def head(self) -> dict[str, Blob]:
        return self.commits[self.branches["main"]]


class RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Hub:
    """The state of the server, for tests to read, to change, and to break."""

    def __init__(self) -> None:
        self.users = {TOKEN: "alice", READER: "bob"}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.received = 0
        """Bytes of large files."""
        self.dies_after: int | None = None
        """Bytes of a large file after which the connection breaks."""
        self.flipped: set[str] = set()
        """Files of which a byte is wrong in every download."""
        self.refusals: dict[str, RefusedError] = {}
        """By a piece of the path."""
        self.before_commit: Callable[[], object] = lambda: None
        self.endpoint = ""

    def make(self, name: str, private: bool = True) -> Repo:
        repo = Repo(name.split("/")[0], private)
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "main", "initial")
        self.repos[name] = repo
        return repo


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers on loopback, with alice's and bob's tokens."""
    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def served() -> Iterator[Hub]:
    with serving() as state:
        yield state


@pytest.fixture
def hub(served: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The Hub that this process talks to, as alice."""
    state = served
    known_hosts = getattr(constants, "HF_URL_HOSTS", frozenset()) | {"127.0.0.1"}
    files = state.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": state.endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": files,
                "HF_URL_HOSTS": known_hosts, "HF_HUB_CACHE": str(tmp_path / "hf-cache"),
                "HF_HOME": str(tmp_path / "hf-home"), "HF_HUB_DISABLE_XET": True,
                "HF_TOKEN_PATH": str(tmp_path / "hf-home" / "token")}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value, raising=name == "ENDPOINT")
    monkeypatch.setenv("HF_ENDPOINT", state.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The client waits up to half a minute before it gives up on a Hub that is dead.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return state


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True  # or each answer waits 40 ms

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        self.body = b""
        try:
            if not (self.command == "PUT" and path.startswith("/lfs/")):
                self.body = self._read()
            refusal = next((r for part, r in self.hub.refusals.items() if part in path), None)
            if refusal:
                self._read() if self.command == "PUT" else None
                raise refusal
            self._route(path)
        except RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(
                refused.status, {"error": refused.message},
                {name: value for name, value in headers.items() if value},
            )  # fmt: skip
        except ConnectionError:
            self.close_connection = True

    def _route(self, path: str) -> None:
        routes = [
            (r"/api/agent-harnesses", lambda: self._send(404, {})),
            (r"/api/whoami-v2", lambda: self._send(200, {"name": self._user(), "type": "user"})),
            (r"/api/validate-yaml", self._validate),
            (r"/api/repos/create", self._create),
            (r"/lfs/(\w+)", self._store),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/api/models/([^/]+/[^/]+)/tree/(.+)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            (r"/api/models/([^/]+/[^/]+)/(tag|branch)/(.+)", self._name),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for pattern, route in routes:
            if match := re.fullmatch(pattern, path):
                route(*match.groups())
                return
        raise RefusedError(404)

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        header = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        errors = []
        if header.get("license") not in LICENSES:
            errors.append({"message": f'"license" must be one of {list(LICENSES)}'})
        for entry in header.get("model-index", []):
            for result in entry["results"]:
                if not {"type", "name"} <= set(result.get("dataset", {})) or not result["metrics"]:
                    errors.append({"message": '"model-index" is not valid'})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self) -> None:
        asked = json.loads(self.body)
        user = self._user()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if not user:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        if name in self.hub.repos:
            self._send(409, {"error": "it exists", "url": f"{self.hub.endpoint}/{name}"})
            return
        if owner != user:
            raise RefusedError(403, message=f"You don't have the rights to create under {owner}")
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.hub.make(name, private)
        self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _preupload(self, name: str, branch: str) -> None:
        repo = self._writable(name)
        there = repo.commits[self._commit_of(repo, branch)]
        files = []
        for entry in json.loads(self.body)["files"]:
            large = entry["path"].endswith(_LARGE) or entry["size"] > 10_000_000
            known = there.get(entry["path"])
            oid = known and (known.sha256 if known.large else known.oid)
            files.append({"path": entry["path"], "uploadMode": "lfs" if large else "regular",
                          "shouldIgnore": False, "oid": oid})  # fmt: skip
        self._send(200, {"files": files})

    def _batch(self, name: str) -> None:
        self._writable(name)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
            objects.append(
                entry if entry["oid"] in self.hub.large else {**entry, "actions": upload}
            )
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        content = self._read(self.hub.dies_after)
        if self.hub.dies_after is not None:
            raise ConnectionError
        self.hub.received += len(content)
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, message="hash mismatch")
        self.hub.large[oid] = content
        self._send(200, {})

    def _commit(self, name: str, branch: str) -> None:
        self.hub.before_commit()
        repo = self._writable(name)
        head = self._commit_of(repo, branch)
        files = dict(repo.commits[head])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    raise RefusedError(412, message="A commit has happened since")
            elif item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.large[value["oid"]], large=True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repo.commit(files, branch, message)
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def _tree(self, name: str, revision: str) -> None:
        repo = self._readable(name)
        operations = []
        for path, blob in repo.commits[self._commit_of(repo, revision)].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content),
                                     "oid": blob.oid}  # fmt: skip
            if blob.large:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
            operations.append(entry)
        self._send(200, operations)

    def _refs(self, name: str) -> None:
        repo = self._readable(name)
        listed = {
            kind: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": sha}
                   for name, sha in known.items()]
            for kind, place, known in (("branches", "heads", repo.branches),
                                       ("tags", "tags", repo.tags))
        }  # fmt: skip
        self._send(200, {**listed, "converts": []})

    def _name(self, name: str, kind: str, text: str) -> None:
        repo, asked = self._writable(name), json.loads(self.body or b"{}")
        known = repo.tags if kind == "tag" else repo.branches
        called = asked["tag"] if kind == "tag" else text
        at = text if kind == "tag" else asked.get("startingPoint", "main")
        if called in known:
            raise RefusedError(409, message="Reference already exists")
        known[called] = self._commit_of(repo, at)
        self._send(200, {})

    def _info(self, name: str, revision: str | None) -> None:
        repo = self._readable(name)
        sha = self._commit_of(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self._send(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._readable(name)
        sha = self._commit_of(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {
                "X-Linked-Etag": f'"{blob.sha256}"',
                "X-Linked-Size": str(len(blob.content)),
            }
        content, status = blob.content, 200
        if path in self.hub.flipped:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if bounds := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(bounds[1]), int(bounds[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers)

    def _user(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise RefusedError(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token, "")

    def _readable(self, name: str) -> Repo:
        user, repo = self._user(), self.hub.repos.get(name)
        if repo is None or (repo.private and repo.owner != user):
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        return repo

    def _writable(self, name: str) -> Repo:
        user, repo = self._user(), self._readable(name)
        if user != repo.owner:
            raise RefusedError(403, message="You are not allowed to write here")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        if sha := repo.find(revision):
            return sha
        raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _read(self, most: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            return b"".join(iter(self._chunk, b""))
        length = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(length if most is None else min(most, length))

    def _chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def validate(hub: Hub) -> Callable[[str], None]:
    """Lets huggingface_hub's own validator judge a card: ValueError where it refuses it."""
    if int(huggingface_hub.__version__.split(".")[0]) < 2:
        pytest.skip("this version asks the public Hub, whatever the endpoint")
    return lambda text: ModelCard(text).validate()


@pytest.fixture
def refuse(hub: Hub) -> Callable[..., None]:
    """Makes the Hub answer with a status wherever the path holds a text."""

    def add(part: str, status: int, code: str = "", message: str = "") -> None:
        hub.refusals[part] = RefusedError(status, code, message)

    return add


@pytest.fixture
def publish(cli, hub: Hub, first_stage, tmp_path: Path):
    """Exports a small trained model to tmp_path/model and pushes it, by the command line."""

    def run(*words: object, family: str = "rectified_flow", name: str = "alice/brains"):
        return cli(
            "export", "-m", first_stage(family), "-o", tmp_path / "model", "--license", "mit",
            "--push-to", name, *words,
        )  # fmt: skip

    return run


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Changes the token: "right", "reader" of another account, "wrong", or "" for none."""
    tokens = {"right": TOKEN, "reader": READER, "wrong": WRONG, "": ""}
    return lambda name: monkeypatch.setenv("HF_TOKEN", tokens[name])


@pytest.fixture
def leaks(tmp_path: Path) -> Callable[..., list[str]]:
    """Where a token is to be found: in the texts given, or in any file of the test."""

    def found(*texts: str) -> list[str]:
        secrets = [token.encode() for token in (TOKEN, READER, WRONG)]
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        places = {str(path): path.read_bytes() for path in files}
        places |= {f"text {index}": text.encode() for index, text in enumerate(texts)}
        return [
            place for place, held in places.items() if any(secret in held for secret in secrets)
        ]

    return found
