"""NVIDIA FLARE as the transport: the same bits as the simulation, and no job but ours at a site.

The slow tests start real servers and clients of `.venv-nvflare` (make nvflare-env), from startup
kits that `nvflare provision` makes; they talk over mutual TLS.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from synthcube.errors import FederationError
from synthcube.federation import audit
from synthcube.federation.aggregation import ExpectedModel
from synthcube.federation.agreement import SiteFacts
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.messages import RefusalError
from synthcube.federation.plan import FederationPlan
from synthcube.federation_nvflare import coordinator as serving
from synthcube.federation_nvflare import job, kit
from synthcube.federation_nvflare.site import RelayClient
from synthcube.schema import ImageSpec
from synthcube.tasks.federation_audit import audit_table
from synthcube.tasks.federation_plan import write_plan

PYTHON = Path(__file__).parents[2] / ".venv-nvflare" / "bin" / "python"
SITE_APP = "config/config_fed_client.json"


def with_nvflare(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as slow, and as one that needs the environment with NVIDIA FLARE."""
    is_missing = not PYTHON.with_name("nvflare").exists()
    reason = "there is no .venv-nvflare: make nvflare-env makes it"
    marks = (
        pytest.mark.slow,
        pytest.mark.timeout(1200),
        pytest.mark.skipif(is_missing, reason=reason),
    )
    for mark in marks:
        test = mark(test)
    return test


# Without NVIDIA FLARE


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    """Startup kits of a server and a site, with all that is read of them."""
    for name, role in (("server", "server"), ("site-1", "client")):
        for folder in ("startup", "local"):
            (tmp_path / name / folder).mkdir(parents=True)
        startup = {"servers": [{"service": {"target": "localhost:8002"}}]}
        (tmp_path / name / "startup" / f"fed_{role}.json").write_text(json.dumps(startup))
        resources = {
            "format_version": 2, "class_allow_list": ["nvflare."], "allow_log_streaming": True,
            "components": [{"id": "process_launcher", "path": "a.B"},
                           {"id": "site_log_streamer", "path": "a.C"}],
        }  # fmt: skip
        rights = {"project_admin": "any", "lead": {"submit_job": "any", "byoc": "any"}}
        for file, values in (("resources", resources), ("authorization", {"permissions": rights})):
            path = tmp_path / name / "local" / f"{file}.json.default"
            path.write_text(json.dumps(values))
    return tmp_path


def test_a_guarded_kit_lets_one_class_of_ours_be_built_and_no_code_in(kits: Path) -> None:
    for name in ("server", "site-1"):
        kit.guard(kits / name)
        kit.guard(kits / name)  # again changes nothing
    kit.require_guarded(kits / "server", "server")
    kit.require_guarded(kits / "site-1", "site")
    server, site = (
        json.loads((kits / name / "local" / "resources.json").read_text())
        for name in ("server", "site-1")
    )
    assert server["class_allow_list"] == [job.SERVER_RELAY]
    assert [part["id"] for part in server["components"]] == [
        "process_launcher",
        "site_log_streamer",
    ]
    assert (site["class_allow_list"], site["allow_log_streaming"]) == ([job.SITE_RELAY], False)
    assert [part["id"] for part in site["components"]] == ["process_launcher", "synthcube"]
    assert site["components"][1]["path"] == job.GUARD
    policy = json.loads((kits / "site-1" / "local" / "authorization.json").read_text())
    for role in ("project_admin", "lead"):
        rights = policy["permissions"][role]
        assert rights["submit_job"] == "any"
        assert {rights["byoc"], rights["shell_commands"]} == {"none"}


def test_a_kit_that_is_not_guarded_is_refused(kits: Path, cli, tiny_config) -> None:
    plan = kits / "plan.json"
    write_plan(tiny_config(), plan, sites=["site-1", "site-2"], num_rounds=2)
    common = ("--engine", "nvflare", "-p", plan, "-o", kits / "run")
    serve = ("serve", *common, "-k", kits / "server")
    join = ("join", *common, "-k", kits / "site-1", "-d", kits)
    for words in (serve, join):
        code, _, errors = cli("federate", *words)
        assert code == 2
        assert re.search(
            "NVFLARE would run other jobs there too. Run `synthcube federate guard", errors
        )
    resources = kits / "site-1" / "local" / "resources.json"
    resources.write_text("{}")
    code, _, errors = cli("federate", "guard", kits / "site-1")
    assert code == 2
    assert "has settings of its own" in errors
    assert str(resources) in errors
    assert resources.read_text() == "{}"
    resources.unlink()
    assert cli("federate", "guard", kits / "site-1")[0] == 0
    code, _, errors = cli("federate", "serve", *common, "-k", kits / "site-1")
    assert (code, "is not the startup kit of a server" in errors) == (2, True)
    code, _, errors = cli("federate", *join, "-a", "localhost:8002")
    assert (code, "from the startup kit: leave out --address" in errors) == (2, True)
    (kits / "server" / "local" / "authorization.json.default").write_text("{}")
    code, _, errors = cli("federate", "guard", kits / "server")
    assert (code, "has not the defaults of NVFLARE 2.9" in errors) == (2, True)
    code, _, errors = cli("federate", "guard", kits)
    assert (code, "is no startup kit of NVFLARE" in errors) == (2, True)
    assert not (kits / "run").exists()


def archive(files: dict[str, str], again: str = "") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        for name, text in files.items():
            opened.writestr(name, text)
        if again:
            with pytest.warns(UserWarning, match="Duplicate name"):
                opened.writestr(again, files[again])
    return content.getvalue()


def test_a_site_takes_no_app_but_ours(tmp_path: Path) -> None:
    path = job.write_job(tmp_path, ["site-1", "site-2"])
    meta = json.loads((path / "meta.json").read_text())
    assert meta["deploy_map"] == {"server": ["server"], "site": ["site-1", "site-2"]}
    text = (path / "site" / SITE_APP).read_text()
    assert job.is_ours(archive({"config/": "", SITE_APP: text}))
    signed = {".__nvfl_sig.json": "{}", "config/.__nvfl_submitter.crt": ""}
    assert job.is_ours(archive({**signed, SITE_APP: text}))
    ours = json.loads(text)
    executor = {"tasks": ["none"], "executor": {"path": job.SITE_RELAY, "args": {"data": "/etc"}}}
    for files in (
        {},
        {SITE_APP: "{"},
        {SITE_APP: text, "custom/evil.py": ""},
        {SITE_APP: text, "config/config_fed_client.conf": 'include url("http://example.org")'},
        {SITE_APP: text, "config/log_config.json": "{}"},
        {SITE_APP: json.dumps({**ours, "components": [{"id": "a", "path": "subprocess.Popen"}]})},
        {SITE_APP: json.dumps({**ours, "executors": [executor]})},
        {SITE_APP: text, ".__nvfl_sig.json": " " * (1 << 21)},
    ):
        assert not job.is_ours(archive(files)), files
    assert not job.is_ours(archive({SITE_APP: text}, again=SITE_APP))
    assert not job.is_ours(b"")


IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
)  # fmt: skip
PLAN = FederationPlan(config={}, sites=("site-1", "site-2"), rounds=1)


@contextmanager
def relayed(kits: Path, name: str, lost: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """What the job does at both ends, in a thread; replies may be lost."""

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            content = job.read_all(self.request)
            with job.connected(kits / "server") as coordinator:
                coordinator.sendall(json.dumps(name).encode() + b"\n" + content)
                coordinator.shutdown(socket.SHUT_WR)
                reply = job.read_all(coordinator)
                self.request.sendall(b"" if lost() else reply)

    with job.Server(kits / "site-1", Relay) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


def waiting(folder: Path) -> socket.socket:
    """As the job waits for the end at the server."""
    connection = job.connected(folder)
    connection.sendall(job.NOBODY)
    connection.settimeout(0.2)
    with pytest.raises(TimeoutError):
        connection.recv(1)
    connection.settimeout(20)
    return connection


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_site_talks_to_the_coordinator_through_two_sockets(kits: Path, held: ExitStack) -> None:
    for name in ("server", "site-1"):
        kit.guard(kits / name)
    coordinator = Coordinator(
        PLAN, kits / "run", {}, 1.0, lambda _: ExpectedModel({}, ""), kits / "agreement.json",
        kits / "average.safetensors",
    )  # fmt: skip
    client = RelayClient(kits / "site-1", None, PLAN.sha256, 0.0)
    with pytest.raises(FederationError, match="does not run the job of SynthCube here"):
        client.state()
    with serving.served(coordinator, kits / "server"), relayed(kits, "site-1"):
        state = client.state()
        assert (state.site, state.phase, state.has_yours) == ("site-1", "facts", False)
        facts = SiteFacts(plan=PLAN.sha256, images=3, image=IMAGE)
        assert client.send_facts(facts).has_yours
        assert (kits / "server" / job.SOCKET).stat().st_mode & 0o777 == 0o600
        with pytest.raises(RefusalError, match="the certificate is that of site-1"):
            RelayClient(kits / "site-1", "site-2", PLAN.sha256, 0.0).state()
        with pytest.raises(RefusalError, match="the plan is"):
            RelayClient(kits / "site-1", None, "a" * 64, 0.0).state()
        second = serving.served(coordinator, kits / "server")
        with pytest.raises(FederationError, match="another coordinator is served there"):
            second.__enter__()
        job_at_server = held.enter_context(waiting(kits / "server"))
    assert job_at_server.recv(1)  # it is over
    with suppress(KeyError), serving.served(coordinator, kits / "server"):
        job_at_server = held.enter_context(waiting(kits / "server"))
        raise KeyError
    assert not job_at_server.recv(1)  # an error: the job waits for the same command
    with (
        serving.served(coordinator, kits / "server"),
        relayed(kits, "site-9"),
        pytest.raises(RefusalError, match="site-9 is no site of the plan"),
    ):
        client.state()


class Averaging(Coordinator):
    """Has an average, and notes who has it."""

    noted: tuple[object, ...] = ()

    def average(self, site: str, number: int) -> Path:
        return self.average_path

    def average_was_sent(self, *noted: object) -> None:
        self.noted = noted


def test_an_average_counts_as_sent_once_the_site_says_so(kits: Path) -> None:
    """The job ends when all have the last one: it must not, while NVFLARE still sends it."""
    for name in ("server", "site-1"):
        kit.guard(kits / name)
    average = kits / "average.safetensors"
    average.write_bytes(b"weights")
    coordinator = Averaging(
        PLAN, kits / "run", {}, 1.0, lambda _: ExpectedModel({}, ""), kits / "none.json",
        kits / "absent.safetensors",
    )  # fmt: skip
    coordinator.average_path = average
    client, there = RelayClient(kits / "site-1", None, PLAN.sha256, 0.0), kits / "there"
    are_lost = True
    with (
        serving.served(coordinator, kits / "server"),
        relayed(kits, "site-1", lambda: are_lost),
    ):
        with pytest.raises(FederationError, match="could not be reached"):
            client.take_average(1, there, 100)
        assert not coordinator.noted
        are_lost = False
        client.take_average(1, there, 100)
    assert there.read_bytes() == b"weights"
    assert coordinator.noted == ("site-1", 1, sha256(b"weights").hexdigest(), 7)


# With NVIDIA FLARE


class Consortium:
    """A server, three sites and an admin with their startup kits, and the commands of each."""

    def __init__(self, processes: Any, federations: ModuleType) -> None:
        self.processes, self.parts, self.folder = processes, federations, processes.folder
        self.kits = self.provisioned("study")
        resources = self.kits / "localhost" / "local" / "resources.json.default"
        text = resources.read_text().replace("/tmp/nvflare/", f"{processes.scratch}/nvflare/")
        resources.write_text(text)

    def provisioned(self, name: str, **ports: int) -> Path:
        """Folder with the kits of a study with an authority of its own."""
        server = {"name": "localhost", "type": "server", "org": "study",
                  "fed_learn_port": self.parts.free_port(),
                  "admin_port": self.parts.free_port(), **ports}  # fmt: skip
        sites = [{"name": f"site-{n}", "type": "client", "org": "study"} for n in (1, 2, 3)]
        admin = {"name": "admin@study.org", "type": "admin", "org": "study",
                 "role": "project_admin"}  # fmt: skip
        builders = {
            "workspace.WorkspaceBuilder": {"template_file": ["master_template.yml"]},
            "static_file.StaticFileBuilder": {"config_folder": "config"},
            "cert.CertBuilder": {}, "signature.SignatureBuilder": {},
        }  # fmt: skip
        project = {
            "api_version": 3, "name": name, "description": name,
            "participants": [server, *sites, admin],
            "builders": [
                {"path": f"nvflare.lighter.impl.{builder}", "args": arguments}
                for builder, arguments in builders.items()
            ],
        }  # fmt: skip
        self.ports = {key: server[key] for key in ("fed_learn_port", "admin_port")}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(project))
        self._nvflare("provision", "-p", path, "-w", self.folder / "kits")
        return self.folder / "kits" / name / "prod_00"

    def _nvflare(self, *words: object) -> str:
        done = subprocess.run(
            [PYTHON.with_name("nvflare"), *map(str, words)], env=self.processes.environment,
            capture_output=True, text=True, timeout=self.parts.LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, folder: Path | None = None) -> Any:
        """The NVIDIA FLARE server, or client of a site, as sub_start.sh starts it."""
        is_server, folder = name == "localhost", folder or self.kits / name
        role = "server" if is_server else "client"
        return self.processes.start(
            PYTHON, "-u", "-m", f"nvflare.private.fed.app.{role}.{role}_train", "-m", folder,
            "-s", f"fed_{role}.json", "--set", "secure_train=true", "org=study",
            "config_folder=config", *([] if is_server else [f"uid={name}"]),
        )  # fmt: skip

    def guard(self, *names: str) -> None:
        for name in names:
            kit.guard(self.kits / name)

    def online(self, *names: str) -> list[Any]:
        """The running server and clients, once all are connected."""
        started = [self.start(name) for name in ("localhost", *names)]
        server = started[0]
        self.parts.until(
            lambda: all(f"New client {name}@" in server.output for name in names), *started
        )
        return started

    def submit(self, folder: Path) -> str:
        text = self._nvflare("job", "submit", "-j", folder, "--startup-kit", self._admin)
        return re.findall(r"job_id: ([0-9a-f-]{36})", text)[0]

    def abort(self, number: str) -> None:
        self._nvflare("job", "abort", number, "--force", "--startup-kit", self._admin)

    @property
    def _admin(self) -> Path:
        return self.kits / "admin@study.org"

    def serve(self) -> Any:
        return self._federate("serve", "localhost", "-o", self.folder / "server",
                              "--round_minutes", 10)  # fmt: skip

    def join(self, site: str, data: Path) -> Any:
        return self._federate(
            "join", site, "-d", data, "-o", self.folder / site, "--patience_minutes", 5,
            *(word for text in self.parts.EXACT for word in ("--set", text)),
        )  # fmt: skip

    def _federate(self, name: str, owner: str, *words: object) -> Any:
        return self.processes.start(
            sys.executable, "-m", "synthcube", "federate", name, "--engine", "nvflare", "-p",
            self.folder / "plan.json", "-k", self.kits / owner, *words,
        )  # fmt: skip


@pytest.fixture
def consortium(tmp_path: Path, federations: ModuleType) -> Iterator[Consortium]:
    with federations.processes(tmp_path) as processes:
        yield Consortium(processes, federations)


@with_nvflare
def test_two_sites_come_to_the_bits_of_the_simulation(
    tiny_config, consortium: Consortium, federations, tmp_path: Path
) -> None:
    lists = consortium.processes.simulated(tiny_config())
    consortium.guard("localhost", "site-1", "site-2")
    flare = consortium.online("site-1", "site-2")
    stranger = consortium.provisioned("other", **consortium.ports) / "site-1"
    shutil.copy(consortium.kits / "site-1" / "startup" / "fed_client.json", stranger / "startup")
    intruder = consortium.start("site-1", stranger)
    server = consortium.serve()
    sites = [consortium.join(f"site-{n}", path) for n, path in enumerate(lists, start=1)]
    federations.until(lambda: "nvflare job submit -j" in server.output, server, *flare)
    consortium.submit(tmp_path / "server" / "nvflare-job")
    for command in (server, *sites):
        assert command.ended() == 0, command.output
    consortium.processes.assert_simulated_weights("server", "site-1", "site-2")
    _, rows = audit_table(tmp_path / "site-1", tmp_path / "server")
    assert [row[1] for row in rows] == [
        "sent facts", "received agreement", "sent weights", "received average", "sent weights",
        "received average",
    ]  # fmt: skip
    assert "Successfully registered" not in intruder.output
    assert "CERTIFICATE_VERIFY_FAILED" in intruder.output
    federations.until(lambda: "RC 0" in flare[1].output, *flare)  # the job has ended
    for path in (*(tmp_path / "server").rglob("*"), *consortium.kits.rglob("*")):
        assert not path.is_file() or federations.SECRET.encode() not in path.read_bytes(), path
    assert federations.SECRET not in "".join(command.output for command in (server, *flare))


CODE = """
import sys
from pathlib import Path
from nvflare.apis.executor import Executor

(Path(sys.argv[sys.argv.index("-m") + 1]) / "ran-code").write_text("imported")

class Evil(Executor):
    pass
"""
TOUCH = {
    "id": "evil", "path": "subprocess.Popen", "args": {"args": ["touch", "{WORKSPACE}/ran-class"]},
}  # fmt: skip


def foreign_job(folder: Path, name: str, sites: list[str]) -> Path:
    """A job that runs code of its own, or has a class built that our job does not name."""
    path = job.write_job(folder / name, sites)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "name": name, "min_clients": 1}))
    app = path / "site" / SITE_APP
    values = json.loads(app.read_text())
    if name == "code":
        values["executors"][0]["executor"]["path"] = "evil.Evil"
        (path / "site" / "custom").mkdir()
        (path / "site" / "custom" / "evil.py").write_text(CODE)
    else:
        values["components"] = [TOUCH]
    app.write_text(json.dumps(values))
    return path


SHELL = """
import sys
from nvflare.fuel.flare_api.flare_api import new_secure_session

session = new_secure_session("admin@study.org", sys.argv[1])
for site in sys.argv[2:]:
    try:
        print(site, session.cat_target(site, "", "audit.log").count("deploy") > 0)
    except Exception as error:
        print(site, "refused", error)
session.close()
"""


@with_nvflare
def test_a_site_runs_no_job_but_ours(consortium: Consortium, federations, tmp_path: Path) -> None:
    """The second site shows what happens without the guard; the third has but its settings."""
    for name in ("localhost", "site-2"):
        path = consortium.kits / name / "local" / "resources.json.default"
        path.write_text(json.dumps({**json.loads(path.read_text()), "class_allow_list": ["*"]}))
    consortium.guard("site-1", "site-3")
    path = consortium.kits / "site-3" / "local" / "resources.json"
    settings = json.loads(path.read_text())
    settings["components"] = [part for part in settings["components"] if part["path"] != job.GUARD]
    path.write_text(json.dumps(settings))
    server, first, second, third = consortium.online("site-1", "site-2", "site-3")
    for name in ("code", "class"):
        consortium.submit(foreign_job(tmp_path / "two", name, ["site-1", "site-2"]))
        federations.until((consortium.kits / "site-2" / f"ran-{name}").exists, server, second)
        consortium.submit(foreign_job(tmp_path / "one", name, ["site-3"]))
    assert first.output.count("A job that is not of SynthCube is refused.") == 2
    federations.until(lambda: "is not in allow_list" in third.output, third)
    federations.until(lambda: "This site is not guarded" in second.output, second)
    assert "site-3: NVFLARE_ERROR: BYOC not permitted" in server.output
    assert {path.parent.name for path in consortium.kits.glob("*/ran-*")} == {"site-2"}
    script = tmp_path / "shell.py"
    script.write_text(SHELL)
    sites = ("site-1", "site-2", "site-3")
    shell = consortium.processes.start(PYTHON, script, consortium.kits / "admin@study.org", *sites)
    assert shell.ended() == 0, shell.output
    assert shell.output.splitlines()[-3:-1] == ["site-1 False", "site-2 True"]
    assert "site-3 refused user not authorized" in shell.output


@with_nvflare
def test_a_killed_process_goes_on(
    tiny_config, consortium: Consortium, federations, tmp_path: Path
) -> None:
    """Of SynthCube by the same command; of NVIDIA FLARE with a job that is submitted anew."""
    lists = consortium.processes.simulated(tiny_config(), secure_aggregation=True)
    consortium.guard("localhost", "site-1", "site-2")
    _, client, doomed = consortium.online("site-1", "site-2")
    server = consortium.serve()
    federations.until(lambda: "nvflare job submit -j" in server.output, server)
    number = consortium.submit(tmp_path / "server" / "nvflare-job")
    first, second = (consortium.join(f"site-{n}", path) for n, path in enumerate(lists, start=1))
    federations.until((tmp_path / "server" / "rounds.json").exists, server, first, second)
    second.kill()
    server.kill()
    server, second = consortium.serve(), consortium.join("site-2", lists[1])
    federations.until(lambda: "Round 2 of 2." in second.output, server, first, second)
    for process, words in consortium.processes.running().items():
        if "site-2" in words and "nvflare" in words and "synthcube" not in words:
            os.kill(process, signal.SIGKILL)
    assert doomed.ended() == -signal.SIGKILL
    client = consortium.start("site-2")
    federations.until(lambda: "Successfully registered" in client.output, client)
    consortium.abort(number)
    consortium.submit(tmp_path / "server" / "nvflare-job")
    for command in (server, first, second):
        assert command.ended() == 0, command.output
    consortium.processes.assert_simulated_weights("server", "site-1", "site-2")
    received = {(line.kind, line.site, line.round)
                for line in audit.read(tmp_path / "server" / "audit.jsonl")
                if line.event == "received"}  # fmt: skip
    assert received >= {("weights", site, n) for site in ("site-1", "site-2") for n in (1, 2)}
