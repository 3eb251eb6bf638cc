"""NVIDIA FLARE as the transport: the same bits as the simulation, and no job but ours at a site.

The slow tests start real servers and clients of `.venv-nvflare` (make nvflare-env), from startup
kits that `nvflare provision` makes; they talk over mutual TLS.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from synthcube.federation_nvflare import kit
from synthcube.tasks.federation_audit import audit_table

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


# With NVIDIA FLARE


class Consortium:
    """A server, two sites and an admin with their startup kits, and the commands of a federation."""

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
        sites = [{"name": f"site-{n}", "type": "client", "org": "study"} for n in (1, 2)]
        admin = {"name": "admin@study.org", "type": "admin", "org": "study",
                 "role": "project_admin"}  # fmt: skip
        builders = "workspace.WorkspaceBuilder", "static_file.StaticFileBuilder", "cert.CertBuilder"
        project = {
            "api_version": 3, "name": name, "description": name,
            "participants": [server, *sites, admin],
            "builders": [
                {"path": f"nvflare.lighter.impl.{builder}", "args": arguments}
                for builder, arguments in zip(
                    (*builders, "signature.SignatureBuilder"),
                    ({"template_file": ["master_template.yml"]}, {"config_folder": "config"}, {}, {}),
                    strict=True,
                )
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
    number = consortium.submit(tmp_path / "server" / "nvflare-job")
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
    federations.until(lambda: not list(consortium.kits.glob("*/synthcube.sock")), *flare)
    for path in (*(tmp_path / "server").rglob("*"), *consortium.kits.rglob("*")):
        assert not path.is_file() or federations.SECRET.encode() not in path.read_bytes(), path
    assert federations.SECRET not in "".join(command.output for command in (server, *flare))
