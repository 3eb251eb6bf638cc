"""A federation on a network, trained for real: it equals the simulation, through kills as well."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synthcube import __version__, reading
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError, FederationError, ImageError, OutputError
from synthcube.federation import audit
from synthcube.federation.aggregation import ExpectedModel
from synthcube.federation.agreement import Agreement
from synthcube.federation.plan import FederationPlan, read_plan, shared_config, site_settings
from synthcube.federation.update import Update, UpdateHeader, write_update
from synthcube.schema import ImageSpec
from synthcube.tasks import join as joining
from synthcube.tasks.federate import simulate
from synthcube.tasks.federated_site import Site
from synthcube.tasks.federation_audit import audit_table
from synthcube.tasks.federation_plan import write_plan
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.join import join
from synthcube.tasks.serve import serve

EXACT = ["compute.deterministic=true", "compute.accelerator=cpu", "compute.precision='32'"]
SHARED = ["training.ema={decay: 0.9}", "training.sample_every_n_epochs=0"]
ADAM = {"name": "adam", "lr": 0.01}
SECRET = "Erika-Mustermann"
IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
)  # fmt: skip


@pytest.fixture(scope="module")
def study(certificates: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with certificates by owner, and a list of three sites."""
    folder = tmp_path_factory.mktemp("study")
    authority = certificates.Authority(folder)
    labels = [f"site-{number}" for number in (1, 2, 3)]
    owners = {name: authority.issue(name) for name in ("server", *labels)}
    for count in (2, 3):
        some = labels[:count]
        path = folder / f"list-{count}"
        owners[path.name] = certificates.site_list(path, [owners[name] for name in some], some)
    return owners


class Federation:
    """Starts the coordinator and sites of a plan, each in a process of its own."""

    def __init__(self, study: dict[str, Path], folder: Path, forks: ModuleType) -> None:
        self.study, self.folder, self.forks = study, folder, forks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def plan(self, config: Path, sites: int, **options: Any) -> None:
        self.sites = sites
        labels = [f"site-{number + 1}" for number in range(sites)]
        plan = self.folder / "plan.json"
        write_plan(config, plan, sites=labels, **{"num_rounds": 2, "overrides": SHARED, **options})

    def words_to_serve(self, minutes: float = 3.0, extra: Sequence[str] = ()) -> list[object]:
        return ["federate", "serve", "-p", self.folder / "plan.json", "--certificates",
                self.study["server"], "--site_certificates", self.study[f"list-{self.sites}"],
                "-o", self.folder / "server", "--address", self.address, "--round_minutes",
                minutes, *(word for text in extra for word in ("--set", text))]  # fmt: skip

    def words_to_join(self, site: str, data: Path, extra: Sequence[str] = ()) -> list[object]:
        return ["federate", "join", "-p", self.folder / "plan.json", "--certificates",
                self.study[site], "-d", data, "-o", self.folder / site,
                *(["--site", site] if site == "site-1" else []), "--address", self.address,
                "--patience_minutes", 1,
                *(word for text in (*EXACT, *extra) for word in ("--set", text))]  # fmt: skip

    def fork(self, words: Sequence[object]) -> Any:
        return self.forks._command(words, None, {})


@pytest.fixture
def federation(
    study: dict[str, Path], tmp_path: Path, forks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Federation:
    monkeypatch.setattr(joining, "_POLL_S", 0.1)  # in forks too
    return Federation(study, tmp_path, forks)


def simulated(
    config: Path, folder: Path, sites: int = 2, rounds: int = 2, **options: Any
) -> list[Path]:
    """Lists of images of the sites of a simulation, which runs here."""
    data = write_phantoms(folder / SECRET, num=6 * sites, size=(16, 16)).parent
    simulate(config, data, folder / "simulated", sites=sites, num_rounds=rounds,
             minimum_sites=2, overrides=[*EXACT, *SHARED], **options)  # fmt: skip
    return [folder / "simulated" / "sites" / f"site-{n + 1}" / "data.csv" for n in range(sites)]


def images_of(sites: int, folder: Path) -> list[Path]:
    """Folders with images of sites."""
    return [
        write_phantoms(folder / SECRET / str(number), num=6, size=(16, 16), seed=number).parent
        for number in range(sites)
    ]


def ended(forks: Sequence[Any]) -> list[str]:
    """The errors of processes, all of which must have succeeded."""
    results = [fork.ended() for fork in forks]
    assert [result.returncode for result in results] == [0] * len(results), results
    return [result.stderr for result in results]


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = (load_file(run / "artifact" / "weights.safetensors") for run in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():  # batches are counted at a site alone
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, right[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("rectified_flow", {}),
        (
            "rectified_flow",
            {
                "server_optimizer": {"name": "adam", "lr": 0.01},
                "proximal": 0.1,
                "average": "server",
            },
        ),
        ("rectified_flow", {"secure_aggregation": True}),
        ("latent_diffusion", {}),
        ("dcgan", {}),
    ],
)
def test_sites_on_a_network_come_to_the_bits_of_the_simulation(
    family: str, options: dict[str, Any], tiny_config, federation: Federation, tmp_path: Path
) -> None:
    config = tiny_config(family)
    lists = simulated(config, tmp_path, **options)
    federation.plan(config, 2, **options)
    stage = reading.read_yaml(config, ConfigError)["model"].get("first_stage")
    local = [f"model.first_stage={stage}"] if stage else []
    processes = [
        federation.fork(federation.words_to_serve(extra=local)),
        *(federation.fork(federation.words_to_join(f"site-{n}", path, local))
          for n, path in enumerate(lists, start=1)),
    ]  # fmt: skip
    told = ended(processes)[0]
    for name in ("server", "site-1", "site-2"):
        assert_same_weights(tmp_path / "simulated", tmp_path / name)
    infer(InferRequest(tmp_path / "server", tmp_path / "images", num_images="2"))
    assert len(list((tmp_path / "images" / "images").iterdir())) == 2

    assert SECRET not in told
    for path in (tmp_path / "server").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    rounds = json.loads((tmp_path / "server" / "rounds.json").read_text())["rounds"]
    assert [sorted(record["sites"]) for record in rounds] == [["site-1", "site-2"]] * 2
    lines = audit.read(tmp_path / "site-1" / "audit.jsonl")
    assert [(line.event, line.kind, line.round) for line in lines] == [
        ("sent", "facts", 0), ("received", "agreement", 0), ("sent", "weights", 1),
        ("received", "average", 1), ("sent", "weights", 2), ("received", "average", 2),
    ]  # fmt: skip
    received = [line for line in audit.read(tmp_path / "server" / "audit.jsonl")
                if line.site == "site-1"]  # fmt: skip
    assert [line.sha256 for line in received] == [line.sha256 for line in lines]
    _, rows = audit_table(tmp_path / "site-1", tmp_path / "server")
    assert len(rows) == 6


@pytest.mark.slow
def test_the_coordinator_and_a_site_are_killed_and_nothing_is_lost(
    tiny_config, federation: Federation, tmp_path: Path
) -> None:
    config = tiny_config()
    lists = simulated(config, tmp_path)
    federation.plan(config, 2)

    joins = [federation.words_to_join(f"site-{n + 1}", path) for n, path in enumerate(lists)]
    server = federation.fork(federation.words_to_serve())
    sites = [federation.fork(words) for words in joins]
    until((tmp_path / "site-2" / "progress.json").exists)
    kill(sites[1])  # as it begins to train
    until((tmp_path / "server" / "updates" / "site-1.safetensors").exists)
    kill(server)  # with one of two updates
    time.sleep(1)  # in which site 1 asks in vain
    sites[1] = federation.fork(joins[1])
    errors = ended([federation.fork(federation.words_to_serve()), *sites])
    for name in ("server", "site-1", "site-2"):
        assert_same_weights(tmp_path / "simulated", tmp_path / name)
    assert "is away" in errors[1]
    received = [(line.kind, line.site, line.round)
                for line in audit.read(tmp_path / "server" / "audit.jsonl")
                if line.event == "received"]  # fmt: skip
    assert len(set(received)) == len(received), "an update was sent twice"


def until(is_over: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not is_over():
        assert time.monotonic() < end
        time.sleep(0.02)


def kill(fork: Any) -> None:
    os.kill(fork.process.pid, signal.SIGKILL)
    assert fork.ended().returncode == -signal.SIGKILL


@pytest.mark.slow
def test_rounds_go_on_without_a_site_which_comes_back_with_the_average_alone(
    tiny_config, federation: Federation, tmp_path: Path
) -> None:
    """Site 3 tells its facts, has an error in round 1, loses its disk, and comes back later."""
    config = tiny_config()
    lists = images_of(3, tmp_path)
    federation.plan(config, 3, num_rounds=3)
    server = federation.fork(federation.words_to_serve(minutes=0.5))
    trained = Site.train_round

    def failing(site: Site, *arguments: Any) -> Path:
        if site.label == "site-3":
            raise ImageError(f"/data/{SECRET}/scan.nii.gz cannot be read.")
        return trained(site, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "train_round", failing)
        sites = [federation.fork(federation.words_to_join(f"site-{n + 1}", path))
                 for n, path in enumerate(lists)]  # fmt: skip
    result = sites.pop().ended()
    assert result.returncode == 2
    assert SECRET in result.stderr
    until((tmp_path / "server" / "rounds.json").exists)
    (tmp_path / "site-3").rename(tmp_path / "lost")
    third = federation.fork(federation.words_to_join("site-3", lists[2]))
    errors = ended([server, *sites, third])
    assert "This site has no checkpoint: it goes on with the average alone" in errors[-1]
    rounds = json.loads((tmp_path / "server" / "rounds.json").read_text())["rounds"]
    assert rounds[0]["failed"] == {"site-3": "ImageError"}
    assert sorted(rounds[0]["sites"]) == ["site-1", "site-2"]
    assert "site-3" in rounds[2]["sites"]
    for path in (tmp_path / "server").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in errors[0]


@pytest.mark.slow
def test_a_late_site_takes_the_average_and_goes_on(
    tiny_config, federation: Federation, tmp_path: Path
) -> None:
    config = tiny_config()
    lists = images_of(3, tmp_path)
    federation.plan(config, 3, num_rounds=3)
    trained, over = Site.train_round, tmp_path / "server" / "rounds.json"

    def slow(site: Site, agreement: Any, number: int, average: Path | None) -> Path:
        path = trained(site, agreement, number, average)
        if (site.label, number) == ("site-3", 1):
            until(over.exists)
        return path

    server = federation.fork(federation.words_to_serve(minutes=0.2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Site, "train_round", slow)
        sites = [federation.fork(federation.words_to_join(f"site-{n + 1}", path))
                 for n, path in enumerate(lists)]  # fmt: skip
    errors = ended([server, *sites])
    assert "Round 1 was over before this site was ready: it goes on." in errors[-1]
    rounds = json.loads(over.read_text())["rounds"]
    assert rounds[0]["absent"] == ["site-3"]
    assert sorted(rounds[2]["sites"]) == ["site-1", "site-2", "site-3"]
    assert_same_weights(tmp_path / "server", tmp_path / "site-3")
    assert not (tmp_path / "server" / "updates" / "site-3.safetensors").samefile(
        tmp_path / "site-3" / "update.safetensors"
    )


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        (float("nan"), "w", "w: holds numbers that are not finite"),
        (1.0, "x", "other weights: w, x"),
    ],
)
def test_a_site_refuses_an_average_that_it_must_not_use(
    value: float, name: str, message: str, tmp_path: Path
) -> None:
    plan = FederationPlan(config={}, sites=("a", "b"), rounds=2)
    agreement = Agreement(plan=plan.sha256, image=IMAGE, images={"a": 3, "b": 3})
    header = UpdateHeader(plan=plan.sha256, agreement=agreement.sha256, round=1, images=6,
                          constants="0" * 64)  # fmt: skip

    class Coordinator:
        def take_average(self, number: int, path: Path, limit: int) -> None:
            write_update(path, Update(header, {name: torch.full((2,), value)}))

    site: Any = Site("a", tmp_path, plan, None)  # type: ignore[arg-type]
    model = ExpectedModel({"w": torch.empty(2, device="meta")})
    with pytest.raises(FederationError, match=message):
        joining._average(Coordinator(), site, agreement, 1, model)  # type: ignore[arg-type]
    assert not (tmp_path / "average.safetensors").exists()


@pytest.fixture
def plan(tiny_config, tmp_path: Path) -> Path:
    write_plan(tiny_config(), tmp_path / "plan.json", sites=["site-1", "site-2"], num_rounds=2)
    return tmp_path / "plan.json"


def test_a_plan_has_all_that_sites_share_and_no_path(
    tiny_config, tmp_path: Path, cli, first_stage
) -> None:
    config, path = tiny_config("latent_diffusion"), tmp_path / "plan.json"
    words = ("federate", "plan", "-c", config, "-o", path, "--sites", "site-a, site-b")
    code, out, errors = cli(*words, "--rounds", 3, "--local_epochs", 2, "--range", "Age=0,100",
                            "--average", "server", "--average_decay", 0.5)  # fmt: skip
    assert code == 0, errors
    plan = read_plan(path)
    assert out == f"Plan: {path}, SHA-256 {plan.sha256}\n"
    assert (plan.sites, plan.epochs, plan.minimum_sites) == (("site-a", "site-b"), 6, 2)
    assert (plan.average, plan.average_decay) == ("server", 0.5)
    assert plan.config["training"]["ema"] is None
    assert str(tmp_path) not in path.read_text()
    stage = str(first_stage("autoencoder_kl"))
    assert stage not in path.read_text()
    settings = site_settings(plan, [f"model.first_stage={stage}", "compute.accelerator=cpu"])
    assert shared_config(settings) == plan.config
    assert settings.training.max_epochs == 6
    again, _, _ = cli(*words, "--rounds", 4)  # a plan may be written anew
    assert again == 0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OutputError, match="is a file that this command did not write"):
        write_plan(config, tmp_path / "other.json", sites=["a"], num_rounds=1)


def test_a_site_trains_with_the_values_of_the_plan(plan: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed: 0 in the plan, 7 here"):
        site_settings(read_plan(plan), ["seed=7"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"synthcube": "0.0.1"}, rf"made with SynthCube 0\.0\.1, and this is {__version__}"),
        ({"rounds": 0}, "rounds: Input should be greater than or equal to 1"),
        ({"sites": ["../etc"]}, "sites.0: String should match"),
        ({"config": {"model": {"first_stage": "/data/model"}}}, "model.first_stage: a site ch"),
        ({"config": {"compute": {"accelerator": "cuda"}}}, "compute.accelerator: a site chooses"),
        ({"config": {"training": {"start_from": "hf://a/b"}}}, "training.start_from: a site"),
        ({"command": "rm"}, "command: Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_a_plan_that_is_refused(plan: Path, change: dict[str, Any], message: str) -> None:
    plan.write_text(json.dumps(json.loads(plan.read_text()) | change))
    with pytest.raises(FederationError, match=message):
        read_plan(plan)


def test_a_plan_names_no_code_that_this_site_does_not_trust(plan: Path, tmp_path: Path) -> None:
    values = json.loads(plan.read_text())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    optimizer = {"name": "evil:Adam"}
    for model in ({"name": "evil:Config"}, {"name": "rectified_flow", "optimizer": optimizer}):
        plan.write_text(json.dumps(values | {"config": {"model": model}}))
        with pytest.raises(ConfigError, match=r"--trust|--plugins"):
            site_settings(read_plan(plan))
    assert not (tmp_path / "ran").exists()


def test_impossible_plans_are_refused(tiny_config, tmp_path: Path) -> None:
    with pytest.raises(FederationError) as refusal:
        write_plan(tiny_config(), tmp_path / "plan.json", sites=["a", "a", "B c"], num_rounds=1,
                   minimum_sites=4)  # fmt: skip
    text = str(refusal.value)
    assert "--sites a,a,B c: a label is there twice" in text
    assert "--minimum_sites 4: there are 3 sites" in text
    assert "sites.2: String should match pattern" in text
    assert not (tmp_path / "plan.json").exists()


def test_what_a_site_and_a_coordinator_check_before_any_work(
    plan: Path, study: dict[str, Path], phantoms: Path, tmp_path: Path
) -> None:
    arguments = (plan, phantoms, study["site-1"], tmp_path / "run")
    with pytest.raises(FederationError, match="the plan has no such site; its sites are site-1, "):
        join(*arguments, address="127.0.0.1:9", site="elsewhere")
    with pytest.raises(FederationError, match=r"could not be reached for 0 minutes"):
        join(*arguments, address="127.0.0.1:9", site="site-1", patience_minutes=0)
    with pytest.raises(FederationError, match=r"site-3: is not a site of the plan"):
        serve(plan, study["server"], study["list-3"], tmp_path / "run", address="127.0.0.1:0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FederationError, match=rf"--address {address} cannot be listened on"):
            serve(plan, study["server"], study["list-2"], tmp_path / "busy", address=address)
    (tmp_path / "run" / "updates").mkdir(parents=True)
    with pytest.raises(OutputError, match="belongs to synthcube federate serve"):
        join(*arguments, address="127.0.0.1:9", site="site-1")
