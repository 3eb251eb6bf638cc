"""OpenFL as the transport: the same bits as the simulation, and no code from a workspace.

The slow tests run the commands of `.venv-openfl` (make openfl-env) in workspaces of an aggregator
and two sites, with certificates that OpenFL makes; they talk over mutual TLS.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from synthcube.errors import FederationError
from synthcube.federation import audit
from synthcube.federation.plan import read_plan
from synthcube.federation_openfl import workspace
from synthcube.tasks.federation_audit import audit_table

PYTHON = Path(__file__).parents[2] / ".venv-openfl" / "bin" / "python"
SITES = ("site-1", "site-2")


def with_openfl(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as slow, and as one that needs the environment with OpenFL."""
    is_missing = not PYTHON.with_name("fx").exists()
    reason = "there is no .venv-openfl: make openfl-env makes it"
    marks = (
        pytest.mark.slow,
        pytest.mark.timeout(1200),
        pytest.mark.skipif(is_missing, reason=reason),
    )
    for mark in marks:
        test = mark(test)
    return test


# Without OpenFL


@pytest.fixture
def written(tmp_path: Path, tiny_config) -> Path:
    """A workspace, as the coordinator gives it to the sites."""
    folder = tmp_path / "workspace"
    workspace.write_workspace(
        tiny_config(), folder, address="localhost:50273", sites=SITES, num_rounds=2
    )
    return folder


def test_a_workspace_holds_no_code_and_names_our_classes_alone(tmp_path, tiny_config, cli) -> None:
    folder = tmp_path / "workspace"
    words = ("federate", "plan", "-c", tiny_config(), "--sites", "site-1,site-2", "--rounds", "2",
             "--engine", "openfl", "-o", folder)  # fmt: skip
    code, said, _ = cli(*words, "-a", "coordinator.example.org:50273")
    assert code == 0
    plan = read_plan(folder / "plan.json")
    assert plan.sha256 in said
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "plan.json", "plan/plan.yaml", "plan/cols.yaml", "plan/data.yaml",
    }  # fmt: skip
    values = yaml.safe_load((folder / "plan" / "plan.yaml").read_text())
    named = {part["template"] for part in values.values() if "template" in part}
    assert named == {
        f"synthcube.federation_openfl.parties.{name}"
        for name in ("Aggregator", "Collaborator", "Part")
    }
    network = values["network"]["settings"]
    assert (network["agg_addr"], network["agg_port"]) == ("coordinator.example.org", 50273)
    assert network["use_tls"] is network["require_client_auth"] is True
    code, said, _ = cli("federate", "guard", folder)
    assert (code, plan.sha256 in said) == (0, True)
    choices = folder / "plan" / "data.yaml"
    choices.write_text("site-1,/data/images\n")
    assert cli(*words, "-a", "localhost:50274")[0] == 0
    assert choices.read_text() == "site-1,/data/images\n"  # it is the party's own


def test_a_workspace_needs_an_address_and_a_folder_of_its_own(tmp_path, tiny_config, cli) -> None:
    words = ("federate", "plan", "-c", tiny_config(), "--sites", "a,b", "--rounds", "2", "-o",
             tmp_path / "new")  # fmt: skip
    for more in (
        ("--engine", "openfl"),
        ("-a", "localhost:1"),
        ("--engine", "flower", "-a", "a:1"),
    ):
        code, _, errors = cli(*words, *more)
        assert (code, "--engine openfl needs it, and no other" in errors) == (2, True)
    code, _, errors = cli(*words, "--engine", "openfl", "-a", "localhost")
    assert (code, "write it as HOST:PORT" in errors) == (2, True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "plan").mkdir(parents=True)
    (tmp_path / "new" / "plan" / "plan.yaml").write_text("aggregator: {}")
    code, _, errors = cli(*words, "--engine", "openfl", "-a", "localhost:1")
    assert (code, "is a file that this command did not write" in errors) == (2, True)
    assert not (tmp_path / "new" / "plan.json").exists()


def test_a_guarded_workspace_may_hold_what_openfl_writes(written: Path) -> None:
    for name in ("cert/client/col_site-1.key", "save/site-1/run/metrics.csv", "logs/fx.log",
                 "col_site-1_to_agg_cert_request.zip"):  # fmt: skip
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_text("")
    assert workspace.guard(written).sites == SITES


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "plan" / "plan.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    "name",
    ["yaml.py", "src/evil.py", "plan/__init__.py", "save/a/b.pyc", "cert/_ssl.so", ".env",
     "plan/plans/default.yaml", "src/data", "settings.toml"],
)  # fmt: skip
def test_a_workspace_with_anything_else_in_it_is_refused(written: Path, cli, name: str) -> None:
    (written / name).parent.mkdir(parents=True, exist_ok=True)
    (written / name).write_text("")
    code, _, errors = cli("federate", "guard", written)
    assert code == 2
    assert "is no workspace of SynthCube alone: OpenFL may run what is in it." in errors
    assert re.search(rf"{re.escape(name)}: (is code|does not belong here)", errors)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["data_loader"].update(template="src.evil.Evil"),
        lambda values: values["task_runner"].update(template="subprocess.Popen"),
        lambda values: values["aggregator"]["settings"].update(rounds_to_train=3),
        lambda values: values["network"]["settings"].update(use_tls=False),
        lambda values: values.update(connector={"template": "os.system", "settings": {}}),
        lambda values: values["network"].update(defaults="/etc/passwd"),
    ],
)
def test_a_workspace_with_another_plan_of_openfl_is_refused(written: Path, change) -> None:
    changed(written, change)
    with pytest.raises(FederationError, match=r"plan/plan\.yaml: is not what this version"):
        workspace.guard(written)


def test_a_link_other_sites_or_a_damaged_plan_are_refused(written: Path) -> None:
    (written / "cert").rmdir()
    (written / "cert").symlink_to("/etc")
    with pytest.raises(FederationError, match="cert: is a link"):
        workspace.guard(written)
    (written / "cert").unlink()
    (written / "plan" / "cols.yaml").write_text("collaborators: [site-1, site-3]\n")
    with pytest.raises(FederationError, match=r"plan/cols\.yaml: is not what"):
        workspace.guard(written)
    changed(written, lambda values: values.pop("network"))
    with pytest.raises(FederationError, match="names no aggregator"):
        workspace.guard(written)
    plan = json.loads((written / "plan.json").read_text())
    (written / "plan.json").write_text(json.dumps({**plan, "rounds": 0}))
    with pytest.raises(FederationError, match=r"plan\.json is damaged"):
        workspace.guard(written)


def test_a_party_says_where_its_images_are_and_its_run_goes(written: Path) -> None:
    assert workspace.chosen("/data/my images").data == "/data/my images"
    choices = workspace.chosen("{data: /d, run: /r, overrides: [compute.accelerator=cpu]}")
    assert (choices.data, choices.run) == ("/d", "/r")
    assert choices.overrides == ("compute.accelerator=cpu",)
    assert workspace.aggregator_choices(written).round_minutes == 120
    with (written / "plan" / "data.yaml").open("a") as file:
        file.write("site-1,/d\nAGGREGATOR,{round_minutes: 5}\n")
    assert workspace.aggregator_choices(written).round_minutes == 5
    with pytest.raises(FederationError, match=r"plan/data\.yaml is damaged.*\n.*path"):
        workspace.chosen("{path: /d}")


# With OpenFL


class Consortium:
    """Workspaces of an aggregator and two sites, and the commands of each."""

    def __init__(self, processes: Any, federations: ModuleType, certificates: Path) -> None:
        self.processes, self.parts, self.folder = processes, federations, processes.folder
        self.certificates = certificates

    def write(self, config: Path, lists: list[Path], **options: Any) -> None:
        """The workspaces, each with what its owner adds."""
        address = f"localhost:{self.parts.free_port()}"
        workspace.write_workspace(
            config, self["server"], address=address, sites=SITES, num_rounds=2,
            overrides=self.parts.SHARED, **options,
        )  # fmt: skip
        for site, path in zip(SITES, lists, strict=True):
            shutil.copytree(self["server"], self[site])
            self.certify(site, self.certificates / site)
            choices = {"data": str(path), "overrides": self.parts.EXACT, "patience_minutes": 5}
            with (self[site] / "plan" / "data.yaml").open("a") as file:
                file.write(f"{site},{json.dumps(choices)}\n")
        self.certify("server", self.certificates / "server")

    def __getitem__(self, party: str) -> Path:
        return self.folder / f"workspace-{party}"

    def certify(self, party: str, certificates: Path) -> None:
        shutil.copytree(certificates, self[party] / "cert", dirs_exist_ok=True)

    def start(self, party: str, *words: object) -> Any:
        """A command of OpenFL in the workspace of a party: it starts there without any words."""
        start = ("aggregator", "start") if party == "server" else (
            "collaborator", "start", "-n", party)  # fmt: skip
        return self.processes.start(
            "env", "-C", self[party], PYTHON.with_name("fx"), *(words or start)
        )

    def assert_simulated_weights(self) -> None:
        parties = {"server": "AGGREGATOR", **{site: site for site in SITES}}
        runs = [f"workspace-{party}/save/{name}" for party, name in parties.items()]
        self.processes.assert_simulated_weights(*runs)


def make_certificates(folder: Path) -> Path:
    """Those of an authority of its own, each in the folder of its owner."""
    (folder / "plan").mkdir(parents=True)

    def fx(*words: str) -> None:
        done = subprocess.run(
            [PYTHON.with_name("fx"), *words], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    fx("workspace", "certify")
    fx("aggregator", "generate-cert-request", "--fqdn", "localhost")
    fx("aggregator", "certify", "--fqdn", "localhost", "--silent")
    for site in SITES:
        fx("collaborator", "generate-cert-request", "-n", site, "--silent", "--skip-package")
        fx("collaborator", "certify", "-n", site, "--silent")
    keys = {"server": "server/agg_localhost", **{site: f"client/col_{site}" for site in SITES}}
    for owner, key in keys.items():
        for name in ("cert_chain.crt", f"{key}.crt", f"{key}.key"):
            (folder / owner / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "cert" / name, folder / owner / name)
    return folder


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def consortium(
    tmp_path: Path, federations: ModuleType, certificates: Path
) -> Iterator[Consortium]:  # fmt: skip
    with federations.processes(tmp_path) as processes:
        yield Consortium(processes, federations, certificates)


@with_openfl
def test_two_sites_come_to_the_bits_of_the_simulation(
    tiny_config, consortium: Consortium, federations, cli, tmp_path: Path
) -> None:
    lists = consortium.processes.simulated(tiny_config())
    consortium.write(tiny_config(), lists)
    stranger = make_certificates(tmp_path / "stranger") / "site-1"
    for name, keys in (("stranger", stranger), ("liar", consortium.certificates / "site-2")):
        shutil.copytree(consortium["site-1"], consortium[name])
        consortium.certify(name, keys)
    for end in ("crt", "key"):  # a site that says it is another one
        folder = consortium["liar"] / "cert" / "client"
        shutil.copy(folder / f"col_site-2.{end}", folder / f"col_site-1.{end}")
    start = ("collaborator", "start", "-n", "site-1")
    server = consortium.start("server")
    intruder = consortium.start("stranger", *start)
    # Before the server listens, its attempts are refused for that alone.
    federations.until(
        lambda: re.search(r"is away \(.*handshake.*trying again", intruder.output),
        server, intruder,
    )  # fmt: skip
    liar = consortium.start("liar", *start)
    assert liar.ended() == 2
    assert "the aggregator refuses this site: Invalid collaborator" in liar.output
    sites = [consortium.start(site) for site in SITES]
    for command in (server, *sites):
        assert command.ended() == 0, command.output
    consortium.assert_simulated_weights()
    run = consortium["site-1"] / "save" / "site-1"
    _, rows = audit_table(run, consortium["server"] / "save" / workspace.AGGREGATOR)
    assert [row[1] for row in rows] == [
        "sent facts", "received agreement", "sent weights", "received average", "sent weights",
        "received average",
    ]  # fmt: skip
    assert cli("infer", "-m", run, "-o", tmp_path / "drawn", "-n", 2)[0] == 0
    assert len(list((tmp_path / "drawn").rglob("*.png"))) >= 2
    for path in consortium["server"].rglob("*"):
        assert not path.is_file() or federations.SECRET.encode() not in path.read_bytes(), path
    assert federations.SECRET not in server.output


@with_openfl
def test_a_killed_party_goes_on(tiny_config, consortium: Consortium, federations) -> None:
    """With masked weights: what a site has sent is asked for again, and must be the same."""
    lists = consortium.processes.simulated(tiny_config(), secure_aggregation=True)
    consortium.write(tiny_config(), lists, secure_aggregation=True)
    folder = consortium["server"] / "save" / workspace.AGGREGATOR
    server, first, second = (consortium.start(party) for party in ("server", *SITES))
    federations.until((folder / "rounds.json").exists, server, first, second)
    second.kill()
    server.kill()
    server, second = consortium.start("server"), consortium.start("site-2")
    for command in (server, first, second):
        assert command.ended() == 0, command.output
    consortium.assert_simulated_weights()
    received = {(line.kind, line.site, line.round)
                for line in audit.read(folder / "audit.jsonl")
                if line.event == "received"}  # fmt: skip
    assert received >= {("weights", site, n) for site in SITES for n in (1, 2)}


@with_openfl
def test_a_site_runs_no_code_of_a_workspace(
    tiny_config, consortium: Consortium, federations, cli, tmp_path: Path
) -> None:
    """The first command shows what OpenFL does with a workspace that is not guarded."""
    consortium.write(tiny_config(), [tmp_path / "a", tmp_path / "b"])
    folder, ran = consortium["site-1"], tmp_path / "ran"
    (folder / "src").mkdir()
    (folder / "src" / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()")
    loader = yaml.safe_load((folder / "plan" / "plan.yaml").read_text())["data_loader"]
    changed(folder, lambda values: values["data_loader"].update(template="src.evil.Evil"))
    assert consortium.start("site-1").ended() != 0
    assert ran.exists()
    code, _, errors = cli("federate", "guard", folder)
    assert (code, "src/evil.py: is code" in errors) == (2, True)
    ran.unlink()
    changed(folder, lambda values: values.update(data_loader=loader))
    shutil.copytree(folder / "src", consortium["server"] / "src")
    for party in ("site-1", "server"):  # our classes look as well, where OpenFL has come to them
        command = consortium.start(party)
        assert command.ended() == 2, command.output
        assert "is no workspace of SynthCube alone" in command.output
    assert not ran.exists()
