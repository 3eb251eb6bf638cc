"""Flower as the transport: the same bits as the simulation, and no code but ours at a site.

The slow tests start real processes of `.venv-flower` (make flower-env), which talk over TLS.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest

from synthcube import __version__
from synthcube.data.phantom import write_phantoms
from synthcube.errors import FederationError
from synthcube.federation import audit
from synthcube.federation.identity import site_certificates
from synthcube.federation.messages import State
from synthcube.federation.plan import FederationPlan
from synthcube.federation_flower import bundle
from synthcube.federation_flower.messages import Answer, Order, decoded, encoded
from synthcube.tasks.federation_audit import audit_table
from synthcube.tasks.federation_plan import write_plan

PYTHON = Path(__file__).parents[2] / ".venv-flower" / "bin" / "python"
NONCE = "ab" * 32


def with_flower(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as slow, and as one that needs the environment with Flower."""
    is_missing = not PYTHON.with_name("flwr").exists()
    reason = "there is no .venv-flower: make flower-env makes it"
    marks = (
        pytest.mark.slow,
        pytest.mark.timeout(1200),
        pytest.mark.skipif(is_missing, reason=reason),
    )
    for mark in marks:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def study(certificates: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with certificates by owner, and the list of two sites; a stranger is in no list."""
    folder = tmp_path_factory.mktemp("study")
    authority = certificates.Authority(folder)
    owners = {name: authority.issue(name) for name in ("server", "site-1", "site-2", "stranger")}
    labels = ["site-1", "site-2"]
    path = folder / "sites.yaml"
    owners["list"] = certificates.site_list(path, [owners[name] for name in labels], labels)
    return owners


# Without Flower


def test_without_flower_one_error_says_how_to_install_it(
    study, tiny_config, phantoms: Path, tmp_path: Path, cli
) -> None:
    if importlib.util.find_spec("flwr"):
        pytest.skip("Flower is in this environment")
    plan = tmp_path / "plan.json"
    write_plan(tiny_config(), plan, sites=["site-1", "site-2"], num_rounds=2)
    common = ("--engine", "flower", "-p", plan, "-o", tmp_path / "run", "-a", "127.0.0.1:9")
    for words in (
        ("serve", *common, "-k", study["server"], "-s", study["list"]),
        ("join", *common, "-k", study["site-1"], "-d", phantoms),
    ):
        code, _, errors = cli("federate", *words)
        assert code == 2
        assert re.search(r"--engine flower needs flwr>=1\.42,<1\.43 .*pip install .*", errors)
    assert not (tmp_path / "run").exists()


def test_the_bundle_is_one_constant_file(tmp_path: Path) -> None:
    app = bundle.write_app(tmp_path)
    assert [path.name for path in app.iterdir()] == ["pyproject.toml"]
    content = bundle.bundle()
    assert bundle.is_ours(content)
    assert not bundle.is_ours(content + b" ")
    (tmp_path / "bundle").write_bytes(content)
    with ZipFile(tmp_path / "bundle") as archive:
        assert archive.namelist() == ["pyproject.toml", ".info/CONTENT"]
        text = archive.read("pyproject.toml")
        listed = archive.read(".info/CONTENT").decode()
    assert text == (app / "pyproject.toml").read_bytes()
    assert f'version = "{__version__}"' in text.decode()
    assert listed == f"pyproject.toml,{sha256(text).hexdigest()},{8 * len(text)}"


def test_messages_come_back_as_they_were() -> None:
    plan = FederationPlan(config={}, sites=("a",), minimum_sites=1, rounds=1)
    state = State(plan=plan.sha256, site="a", phase="rounds", round=1, has_yours=False)
    order = Order(nonce=NONCE, state=state)
    assert decoded(encoded(order, b"\0weights"), Order) == (order, b"\0weights")
    assert decoded(encoded(Answer(nonce=NONCE)), Answer) == (Answer(nonce=NONCE), b"")
    content = encoded(Answer(nonce=NONCE))
    for damaged in (b"", content[:9], b"\xff" * 4 + content[4:], content[:4] + b"x" + content[5:]):
        with pytest.raises(FederationError, match=r"^A message is refused: it is no Answer\.$"):
            decoded(damaged, Answer)


def test_keys_are_rewritten_for_flower(study, tmp_path: Path) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from synthcube.federation_flower import keys

    plan = FederationPlan(config={}, sites=("site-1", "site-2"), rounds=1)
    certificate = site_certificates(study["list"], plan)["site-1"]
    path = tmp_path / "key"
    keys.write_private_key(study["site-1"], path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    private = serialization.load_ssh_private_key(path.read_bytes(), None)
    public = keys.public_key(certificate, "site-1")
    assert private.public_key() == public
    assert keys.as_openssh(public).startswith(b"ecdsa-sha2-nistp256 ")


def test_keys_that_flower_does_not_take_are_named(study, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from synthcube.federation_flower import keys

    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout",
         tmp_path / "key.key", "-subj", "/CN=site", "-outform", "DER", "-out", tmp_path / "der"],
        check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(FederationError, match=r"site-7: Flower needs .* elliptic curve"):
        keys.public_key((tmp_path / "der").read_bytes(), "site-7")
    with pytest.raises(FederationError, match=r"such as P-384; key\.key is of another kind"):
        keys.write_private_key(tmp_path, tmp_path / "key")
    assert not (tmp_path / "key").exists()


def test_no_status_for_an_administrator(study, tiny_config, tmp_path: Path, monkeypatch) -> None:
    from synthcube.tasks import federation_engines
    from synthcube.tasks import serve as serving

    plan = tmp_path / "plan.json"
    write_plan(tiny_config(), plan, sites=["site-1", "site-2"], num_rounds=2)
    monkeypatch.setattr(federation_engines.processes, "require_flower", lambda: None)
    with pytest.raises(FederationError, match="--engine flower tells an administrator no status"):
        serving.serve(plan, study["server"], study["list"], tmp_path / "run", admin="a" * 64,
                      address="127.0.0.1:0", engine="flower")  # fmt: skip


def test_a_site_says_why_it_does_not_trust_a_coordinator(
    study, certificates, tmp_path: Path, monkeypatch
) -> None:
    """Flower has one text for every fault of a connection; it is not started at all here."""
    pytest.importorskip("cryptography")
    from synthcube.federation_flower import site

    monkeypatch.setattr(site, "require_flower", lambda: None)
    other = certificates.Authority(tmp_path / "other").issue("site-1")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(study["server"] / "crt.crt", study["server"] / "key.key")

        def greet() -> None:
            with suppress(OSError):
                context.wrap_socket(listening.accept()[0], server_side=True).close()

        thread = threading.Thread(target=greet)
        thread.start()
        client = site.FlowerClient(address, other, None, "site-1", "a" * 64, 0.0)
        with pytest.raises(FederationError, match=r"its certificate is not accepted: .* root\.crt"):
            client.__enter__()
        thread.join()
    client = site.FlowerClient(address, other, None, "site-1", "a" * 64, 0.0)
    with pytest.raises(FederationError, match=r"could not be reached for 0 minutes"):
        client.__enter__()


# With Flower


class Federation:
    """Commands of a coordinator and two sites."""

    def __init__(
        self, study: dict[str, Path], folder: Path, processes: Any, federations: ModuleType
    ) -> None:
        self.study, self.folder, self.processes, self.parts = study, folder, processes, federations
        self.address = f"127.0.0.1:{federations.free_port()}"

    def serve(self, minutes: float = 10.0) -> Any:
        return self._start(
            "serve", "-k", self.study["server"], "-s", self.study["list"], "-o",
            self.folder / "server", "--round_minutes", minutes,
        )  # fmt: skip

    def join(self, site: str, data: Path, owner: str = "", run: str = "") -> Any:
        return self._start(
            "join", "-k", self.study[owner or site], "-d", data, "-o", self.folder / (run or site),
            "--site", site, "--patience_minutes", 3,
            *(word for text in self.parts.EXACT for word in ("--set", text)),
        )  # fmt: skip

    def _start(self, name: str, *words: object) -> Any:
        return self.processes.start(
            PYTHON, "-m", "synthcube", "federate", name, "--engine", "flower", "-p",
            self.folder / "plan.json", "-a", self.address, *words,
        )  # fmt: skip


@pytest.fixture
def federation(
    study: dict[str, Path], tmp_path: Path, federations: ModuleType
) -> Iterator[Federation]:
    with federations.processes(tmp_path) as processes:
        yield Federation(study, tmp_path, processes, federations)


FOREIGN_CLIENT = """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
Path({ran!r}).write_text("imported")

@app.query()
def steal(message, context):
    return Message(RecordDict(), reply_to=message)
"""
FOREIGN_SERVER = """
import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in nodes])
    codes = [reply.error.code if reply.has_error() else None for reply in replies]
    Path({codes!r}).write_text(repr(codes))
"""


def write_foreign_app(folder: Path) -> Path:
    """An app with modules of its own, which writes what became of it."""
    (folder / "foreign" / "evil").mkdir(parents=True)
    app = folder / "foreign"
    text = bundle.PYPROJECT.replace("synthcube.federation_flower.apps:server", "evil.server:app")
    text = text.replace("synthcube.federation_flower.apps:client", "evil.client:app")
    (app / "pyproject.toml").write_text(text)
    (app / "evil" / "__init__.py").write_text("")
    (app / "evil" / "client.py").write_text(FOREIGN_CLIENT.format(ran=str(folder / "ran")))
    (app / "evil" / "server.py").write_text(FOREIGN_SERVER.format(codes=str(folder / "codes")))
    return app


class Flower:
    """Flower's own commands, for the SuperLink of a coordinator on this machine."""

    def __init__(self, federation: Federation) -> None:
        (config,) = federation.processes.scratch.glob("*/config.toml")
        self.home = federation.folder / "home"
        self.home.mkdir()
        shutil.copy(config, self.home)
        self.environment = {
            **federation.processes.environment, "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip

    def run(self, app: Path) -> None:
        subprocess.run([PYTHON.with_name("flwr"), "run", app, "local"], env=self.environment,
                       check=True, capture_output=True, timeout=400)  # fmt: skip


@with_flower
def test_two_sites_come_to_the_bits_of_the_simulation_and_run_no_foreign_code(
    tiny_config, study, federation: Federation, federations, tmp_path: Path
) -> None:
    lists = federation.processes.simulated(tiny_config())
    server, first = federation.serve(), federation.join("site-1", lists[0])
    stranger = federation.join("site-1", lists[0], owner="stranger", run="strange")
    federations.until(lambda: "site-1 told its facts" in server.output, server, first)
    assert stranger.ended() == 2
    assert "does not know the key of this site: crt.crt must be in its --site_certificates" in (
        stranger.output
    )
    assert not (tmp_path / "strange").exists()

    trust = ssl.create_default_context(cafile=str(study["server"] / "root.crt"))
    for path in (
        "v1/control/start-run",
        "v1/control/list-nodes",
        "v1/runtime/acquire-task",
        "docs",
    ):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"https://{federation.address}/{path}", b"", context=trust)

    Flower(federation).run(write_foreign_app(tmp_path))
    federations.until((tmp_path / "codes").exists, server, first)
    assert (tmp_path / "codes").read_text() == "[7]"  # INVALID_FAB
    federations.until(
        lambda: "The coordinator sent code of its own, which is refused." in first.output, first
    )
    assert not (tmp_path / "ran").exists()

    second = federation.join("site-2", lists[1])
    for command in (server, first, second):
        assert command.ended() == 0, command.output
    assert not (tmp_path / "ran").exists()
    federation.processes.assert_simulated_weights("server", "site-1", "site-2")
    rounds = json.loads((tmp_path / "server" / "rounds.json").read_text())["rounds"]
    assert [sorted(record["sites"]) for record in rounds] == [["site-1", "site-2"]] * 2
    _, rows = audit_table(tmp_path / "site-1", tmp_path / "server")
    assert [row[1] for row in rows] == [
        "sent facts", "received agreement", "sent weights", "received average", "sent weights",
        "received average",
    ]  # fmt: skip
    assert federations.SECRET not in server.output
    for path in (tmp_path / "server").rglob("*"):
        assert path.is_dir() or federations.SECRET.encode() not in path.read_bytes(), path


@with_flower
def test_a_site_and_the_coordinator_are_killed_and_go_on(
    tiny_config, federation: Federation, federations, tmp_path: Path
) -> None:
    lists = federation.processes.simulated(tiny_config(), secure_aggregation=True)
    server = federation.serve()
    first, second = (federation.join(f"site-{n}", path) for n, path in enumerate(lists, start=1))
    federations.until((tmp_path / "server" / "rounds.json").exists, server, first, second)
    second.kill()
    second = federation.join("site-2", lists[1])
    federations.until(
        lambda: server.output.count("site-2 is connected") == 2, server, first, second
    )
    server.kill()
    again = federation.serve()
    for command in (again, first, second):
        assert command.ended() == 0, command.output
    federation.processes.assert_simulated_weights("server", "site-1", "site-2")
    received = {(line.kind, line.site, line.round)
                for line in audit.read(tmp_path / "server" / "audit.jsonl")
                if line.event == "received"}  # fmt: skip
    assert received >= {("weights", site, n) for site in ("site-1", "site-2") for n in (1, 2)}


@with_flower
def test_of_an_error_at_a_site_its_kind_alone_leaves_it(
    tiny_config, federation: Federation, federations, tmp_path: Path
) -> None:
    """A name is in the path of the folder that the first site cannot write to."""
    data = write_phantoms(tmp_path / "images", num=6, size=(16, 16)).parent
    write_plan(tiny_config(), tmp_path / "plan.json", sites=["site-1", "site-2"], num_rounds=1,
               minimum_sites=1, overrides=federations.SHARED)  # fmt: skip
    server = federation.serve(minutes=1.5)  # to be short, as the last average waits for both sites
    first = federation.join("site-1", data, run=f"{federations.SECRET}/first")
    federations.until(lambda: "site-1 told its facts" in server.output, server, first)
    (tmp_path / federations.SECRET / "first" / "run").write_text("no folder")
    second = federation.join("site-2", data)
    assert first.ended() == 2
    assert federations.SECRET in first.output
    assert [server.ended(), second.ended()] == [0, 0], (server.output, second.output)
    (record,) = json.loads((tmp_path / "server" / "rounds.json").read_text())["rounds"]
    assert (record["failed"], [*record["sites"]]) == ({"site-1": "OutputError"}, ["site-2"])
    for path in (tmp_path / "server").rglob("*"):
        assert path.is_dir() or federations.SECRET.encode() not in path.read_bytes(), path
    assert federations.SECRET not in server.output
