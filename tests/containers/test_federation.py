"""Federations of containers: each party is a user of its own, over TLS on loopback."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="root alone can be several users")
SLOW_FEDERATIONS = (
    ("rectified_flow", 5, "https"), ("latent_diffusion", 2, "https"),
    ("latent_diffusion", 5, "https"), ("dcgan", 2, "https"), ("dcgan", 5, "https"),
    ("rectified_flow", 2, "flower"),
)  # fmt: skip
FIRST_USER = 20_000
SECRET = "Erika-Mustermann"
ALIKE = ["training.max_epochs=2", "training.sample_every_n_epochs=0", "training.batch_size=4"]
EXACT = ["compute.deterministic=true", "compute.accelerator=cpu", "compute.precision='32'"]
LOCKED = ("--rm", "--network=host", "--read-only", "--cap-drop=ALL", "--tmpfs=/tmp")
ONE_THREAD = "--env=OMP_NUM_THREADS=1"  # as the simulation has; sums of two threads differ in bits


@dataclass(frozen=True)
class Party:
    """The coordinator or a site: folders that no other user may enter."""

    name: str
    user: int
    folder: Path

    def write(self, certificates: Path, plan: Path, model: Path | None) -> None:
        """What this party has been sent, and what it has."""
        shutil.copytree(certificates, self.folder / "in" / "keys")
        shutil.copy(plan, self.folder / "in" / "plan.json")
        if model:
            shutil.copytree(model, self.folder / "in" / "first-stage")
        (self.folder / "out").mkdir()
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, self.user, self.user)
            path.chmod(0o700 if path.is_dir() else 0o600)

    @property
    def mounts(self) -> dict[Path, str]:
        return {self.folder / "in": "/in:ro", self.folder / "out": "/out"}


def settings(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--set", text)]


def pictures(parties: Sequence[Party], path: Path) -> None:
    """Other pictures at each site with a list of its own, and one list of all for a simulation."""
    from synthcube.data.phantom import write_phantoms

    with path.open("w", newline="") as all_images:
        everything = csv.writer(all_images)
        everything.writerow(["SubjectID", "Channel_0", "Site"])
        for seed, party in enumerate(parties):
            folder = party.folder / "in" / SECRET
            write_phantoms(folder, num=4, size=(16, 16), seed=seed)
            files = sorted(folder.rglob("*.png"))
            rows = [(f"{party.name}-{number}", file) for number, file in enumerate(files)]
            with (folder.parent / "images.csv").open("w", newline="") as own:
                writer = csv.writer(own)
                writer.writerow(["SubjectID", "Channel_0"])
                writer.writerows(
                    (subject, file.relative_to(folder.parent)) for subject, file in rows
                )
            everything.writerows((subject, file, party.name) for subject, file in rows)


def study(
    family: str, parties: Sequence[Party], folder: Path, forks: ModuleType, certificates: ModuleType
) -> bool:
    """Give the parties, of which the coordinator is the first, what they need; simulate them all.

    Returns:
        whether they have a first stage.
    """
    from synthcube import reading
    from synthcube.models import registry

    def done(*words: object) -> None:
        result = forks.command(*words, SYNTHCUBE_CACHE=str(folder / "cache"))
        assert result.returncode == 0, result.stderr

    server, *sites = parties
    names = [site.name for site in sites]
    for party in parties:
        (party.folder / "in").mkdir(parents=True)
    pictures(sites, folder / "all.csv")

    kind, first_stage = registry.find(family), None
    config = {"model": kind.tiny().model_dump(mode="json")}
    if kind.needs:
        first = {"model": registry.find(kind.needs).tiny().model_dump(mode="json")}
        (folder / "first.yaml").write_text(reading.dump(first))
        done("train", "-c", folder / "first.yaml", "-d", folder / "all.csv", "-o",
             folder / "first", *settings(*ALIKE, *EXACT))  # fmt: skip
        first_stage = folder / "first" / "artifact"
        config["model"]["first_stage"] = str(first_stage)
    (folder / "config.yaml").write_text(reading.dump(config))
    done("federate", "simulate", "-c", folder / "config.yaml", "-d", folder / "all.csv",
         "--site_column", "Site", "-o", folder / "simulated",
         *settings(*ALIKE, *EXACT))  # fmt: skip
    done("federate", "plan", "-c", folder / "config.yaml", "-o", folder / "plan.json",
         "--sites", ",".join(names), "--rounds", 2, *settings(*ALIKE))  # fmt: skip

    authority = certificates.Authority(folder / "authority")
    owners = {party.name: authority.issue(party.name) for party in parties}
    certificates.site_list(
        server.folder / "in" / "sites.yaml", [owners[name] for name in names], names
    )
    for party in parties:
        party.write(owners[party.name], folder / "plan.json", first_stage)
    return bool(first_stage)


@pytest.mark.parametrize(
    ("family", "number", "engine"),
    [
        ("rectified_flow", 2, "https"),
        *(pytest.param(family, number, engine, marks=pytest.mark.slow)
          for family, number, engine in SLOW_FEDERATIONS),
    ],
)  # fmt: skip
def test_users_in_containers_come_to_the_bits_of_the_simulation(
    family: str, number: int, engine: str, docker, request: pytest.FixtureRequest,
    forks: ModuleType, certificates: ModuleType, federations: ModuleType, tmp_path: Path,
) -> None:  # fmt: skip
    image = request.getfixturevalue("flower_image" if engine == "flower" else "image")
    names = [f"site-{index + 1}" for index in range(number)]
    server, *sites = parties = [
        Party(name, FIRST_USER + index, tmp_path / "parties" / name)
        for index, name in enumerate(["server", *names])
    ]
    has_first_stage = study(family, parties, tmp_path, forks, certificates)

    address = f"127.0.0.1:{federations.free_port()}"
    common = ["-p", "/in/plan.json", "--certificates", "/in/keys", "-o", "/out/run", "--address",
              address, "--engine", engine]  # fmt: skip
    local = settings(*["model.first_stage=/in/first-stage"] * has_first_stage)
    serve = ["federate", "serve", *common, "--site_certificates", "/in/sites.yaml",
             "--round_minutes", "9", *local]  # fmt: skip
    join = ["federate", "join", *common, "-d", "/in/images.csv", "--patience_minutes", "5", *local,
            *settings(*EXACT)]  # fmt: skip
    with ThreadPoolExecutor(number + 1) as threads:
        started = [
            threads.submit(
                docker, words, party.mounts, [*LOCKED, ONE_THREAD], party.user, (), image
            )
            for party, words in [(server, serve), *((site, join) for site in sites)]
        ]
        for party, result in zip(parties, started, strict=True):
            assert result.result().returncode == 0, (party.name, result.result().stderr)

    expected = load_file(tmp_path / "simulated" / "artifact" / "weights.safetensors")
    for party in parties:
        weights = load_file(party.folder / "out" / "run" / "artifact" / "weights.safetensors")
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():  # batches are counted at a site alone
            alike = torch.equal(tensor, expected[name]) or name.endswith("num_batches_tracked")
            assert alike, (party.name, name)
        strangers = [path for path in party.folder.rglob("*") if path.lstat().st_uid != party.user]
        assert strangers == []
    rounds = json.loads((server.folder / "out" / "run" / "rounds.json").read_text())["rounds"]
    assert [sorted(record["sites"]) for record in rounds] == [names, names]
    for path in (server.folder / "out").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path

    drawn = docker(
        ["infer", "-m", "/out/run", "-o", "/out/images", "-n", "2"], server.mounts, LOCKED,
        server.user,
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    assert len(list((server.folder / "out" / "images" / "images").iterdir())) == 2
