"""The coordinator on a network: who gets in, what is refused, and what a kill leaves. No training.

The updates are small tensors; tests/tasks/test_join.py trains.
"""

from __future__ import annotations

import http.client
import json
import math
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from synthcube.errors import FederationError
from synthcube.federation import audit, averaging, identity
from synthcube.federation.aggregation import ExpectedModel
from synthcube.federation.agreement import SiteFacts
from synthcube.federation.client import Client
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.messages import RefusalError, State
from synthcube.federation.plan import FederationPlan
from synthcube.federation.server import Server
from synthcube.federation.update import Update, UpdateHeader, read_update, write_update
from synthcube.schema import ImageSpec

IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
)  # fmt: skip
SITES = ("site-a", "site-b", "site-c")
PLAN = FederationPlan(config={"seed": 0}, sites=SITES, rounds=3)
SHAPES = {"w": torch.empty(2, 3, device="meta"), "b": torch.empty(3, device="meta")}
CONSTANTS = "0" * 64
IMAGES = {"site-a": 30, "site-b": 10, "site-c": 5}


@pytest.fixture(scope="module")
def study(certificates: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with certificates by owner; `stranger` is in no list, `foreign` of another CA."""
    folder = tmp_path_factory.mktemp("study")
    authority = certificates.Authority(folder / "own")
    owners = {name: authority.issue(name) for name in (*SITES, "server", "stranger", "admin")}
    owners["elsewhere"] = authority.issue("elsewhere", host="127.0.0.9")
    other = certificates.Authority(folder / "other")
    owners["foreign"] = other.issue("foreign")
    certificates.site_list(folder / "sites.yaml", [owners[name] for name in SITES], SITES)
    return {**owners, "list": folder / "sites.yaml"}


class Network:
    """A coordinator that serves, and a client for every site."""

    def __init__(self, study: Mapping[str, Path], folder: Path, minutes: float) -> None:
        self.study, self.folder = study, folder
        self.coordinator = Coordinator(
            PLAN, folder, {}, minutes, lambda _: ExpectedModel(SHAPES, CONSTANTS),
            folder / "agreement.json", folder / "average.safetensors",
        )  # fmt: skip
        sites = identity.site_certificates(study["list"], PLAN)
        allowed = {identity.fingerprint(value): site for site, value in sites.items()}
        self.server = Server(
            ("127.0.0.1", 0), identity.server_context(study["server"]), allowed, self.coordinator,
            identity.common_name_digest("Admin"),
        )  # fmt: skip
        self.outcome: object = None

    def client(self, site: str, owner: str = "", plan: str = PLAN.sha256) -> Client:
        tls = identity.client_context(self.study[owner or site])
        return Client(f"127.0.0.1:{self.server.port}", tls, site, plan, 0.0)

    def lead(self) -> None:
        try:
            self.outcome = self.coordinator.lead()
        except FederationError as error:
            self.outcome = error

    def agreed(self, sites: tuple[str, ...] = SITES) -> dict[str, Client]:
        clients = {site: self.client(site) for site in sites}
        for site, client in clients.items():
            client.send_facts(facts(site))
        self.until(lambda: self.coordinator.state(sites[0]).phase == "rounds")
        return clients

    def until(self, is_over: Any) -> None:
        end = time.monotonic() + 20
        while not is_over():
            assert time.monotonic() < end
            time.sleep(0.01)

    def rounds(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "rounds.json").read_text())["rounds"]


@pytest.fixture
def network(study: dict[str, Path], tmp_path: Path):
    """Starts a coordinator in a folder; the same folder again continues it."""

    @contextmanager
    def start(minutes: float = 5.0) -> Iterator[Network]:
        running = Network(study, tmp_path / "run", minutes)
        threads = [
            threading.Thread(target=running.server.serve_forever, args=(0.02,)),
            threading.Thread(target=running.lead, daemon=True),
        ]
        with running.server:
            for thread in threads:
                thread.start()
            try:
                yield running
            finally:
                running.server.shutdown()
                threads[0].join()

    return start


def facts(site: str, **changes: Any) -> SiteFacts:
    return SiteFacts(
        **{"plan": PLAN.sha256, "images": IMAGES[site], "image": IMAGE, **changes}  # type: ignore[arg-type]
    )


def update(network: Network, site: str, number: int = 1, value: float = 1.0, **changes: Any):
    agreement = network.coordinator._agreement
    assert agreement
    header = {
        "plan": PLAN.sha256, "agreement": agreement.sha256, "round": number,
        "images": IMAGES[site], "constants": CONSTANTS, **changes,
    }  # fmt: skip
    tensors = {name: torch.full(blank.shape, value) for name, blank in SHAPES.items()}
    return Update(UpdateHeader.model_validate(header), tensors)


def send(
    network: Network, client: Client, site: str, number: int = 1, value: float = 1.0, **changes: Any
) -> None:
    path = network.folder.with_name(f"sent-{site}")
    write_update(path, update(network, site, number, value, **changes))
    client.send_update(number, path)


def test_three_sites_get_the_average_of_their_weights(network, tmp_path: Path) -> None:
    with network() as running:
        clients = running.agreed()
        for number in (1, 2, 3):
            for place, (site, client) in enumerate(reversed(clients.items())):
                assert client.state().round == number
                assert not client.state().has_yours
                send(running, client, site, number, value=number + 0.1 * place)
            running.until(lambda n=number: running.coordinator._last_round() == n)
            path = tmp_path / "average"
            clients["site-a"].take_average(number, path, 10_000)
            expected = averaging.average_update(
                PLAN, running.coordinator._agreement, number,
                {site: update(running, site, number, number + 0.1 * place)
                 for place, site in enumerate(reversed(SITES))}, SHAPES,
            )  # fmt: skip
            average = read_update(path)
            assert average.header == expected.header
            assert all(torch.equal(average.tensors[n], expected.tensors[n]) for n in SHAPES)
        running.until(lambda: running.outcome is not None)
        assert clients["site-b"].state().phase == "done"
        assert [record["sites"] for record in running.rounds()] == [IMAGES] * 3
        lines = audit.read(running.folder / "audit.jsonl")
        assert [(line.event, line.kind, line.site) for line in lines[:4]] == [
            ("received", "facts", "site-a"), ("received", "facts", "site-b"),
            ("received", "facts", "site-c"), ("received", "weights", "site-c"),
        ]  # fmt: skip
        assert running.coordinator.say_farewell(0.01) == ["site-b", "site-c"]


STRANGERS = {
    "another authority": ("site-a", "foreign", "foreign-root",
                          "does not accept the certificate of this site .*unknown ca"),
    "not in the list": ("site-a", "stranger", "", "SHA-256 [0-9a-f]{64} is not in the list"),
    "another's label": ("site-b", "site-a", "", "the certificate is that of site-a"),
}  # fmt: skip


@pytest.mark.parametrize(("site", "owner", "root", "message"), STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_refused_and_told_why(
    network, study, tmp_path: Path, site: str, owner: str, root: str, message: str
) -> None:
    with network() as running:
        if root:  # it trusts the coordinator, which does not trust it
            folder = tmp_path / "mixed"
            folder.mkdir()
            for name, source in (("crt.crt", owner), ("key.key", owner), ("root.crt", "server")):
                (folder / name).write_bytes((study[source] / name).read_bytes())
            running.study = {**study, owner: folder}
        with pytest.raises(FederationError, match=message):
            running.client(site, owner).state()
        assert running.client("site-a").state().phase == "facts"  # the others get in as before


def test_a_site_refuses_a_coordinator_of_another_authority_or_name(network, study) -> None:
    with network() as running:
        with pytest.raises(FederationError, match=r"certificate is not accepted: .*root\.crt"):
            running.client("site-a", "foreign").state()
        running.server.tls = identity.server_context(study["elsewhere"])
        with pytest.raises(FederationError, match=r"not accepted: IP address mismatch.* 127\.0"):
            running.client("site-a").state()


def test_without_tls_nobody_gets_an_answer(network, study) -> None:
    with network() as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)
        with pytest.raises((http.client.HTTPException, OSError)):
            asked(connection)
        without = ssl.create_default_context(cafile=str(study["server"] / "root.crt"))
        secure = http.client.HTTPSConnection(
            "127.0.0.1", running.server.port, timeout=10, context=without
        )
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            asked(secure)


def asked(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    with closing(connection):
        connection.request("GET", "/v1/state")
        return connection.getresponse()


def test_a_server_without_tls_is_named(study, tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as plain:
        thread = threading.Thread(target=plain.serve_forever, args=(0.02,))
        thread.start()
        tls = identity.client_context(study["site-a"])
        client = Client(f"127.0.0.1:{plain.server_port}", tls, "site-a", PLAN.sha256, 0.0)
        with pytest.raises(FederationError, match="it does not speak TLS"):
            client.state()
        plain.shutdown()
        thread.join()


def test_each_reason_why_the_coordinator_is_away_is_told_once(study, monkeypatch, caplog) -> None:
    class Breaking(Client):
        reasons = iter(["Connection refused", "Connection refused", "Handshake failed"] * 2)

        def _connection(self) -> http.client.HTTPConnection:
            if reason := next(self.reasons, ""):
                raise OSError(0, reason)
            raise RefusalError("over", "over")

    monkeypatch.setattr("synthcube.federation.client._FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("synthcube.federation.client._LONGEST_PAUSE_S", 0.001)
    tls = identity.client_context(study["site-a"])
    with pytest.raises(RefusalError):
        Breaking("127.0.0.1:1", tls, "site-a", PLAN.sha256, 1.0).state()
    assert [record.getMessage() for record in caplog.records] == [
        f"The coordinator at 127.0.0.1:1 is away ({reason}); trying again."
        for reason in ("Connection refused", "Handshake failed")
    ]


def test_another_plan_is_refused_at_the_door(network) -> None:
    with network() as running:
        with pytest.raises(RefusalError, match=f"the plan is {PLAN.sha256[:12]}, not 111111111111"):
            running.client("site-a", plan="1" * 64).state()
        with pytest.raises(RefusalError, match="the facts are of another plan"):
            running.client("site-a").send_facts(facts("site-a", plan="1" * 64))


REFUSED = {
    "nan": ({"value": math.nan}, "not_finite", "b: holds numbers that are not finite"),
    "a liar": ({"images": 10**9}, "images", "claims 1000000000 images, 30 were agreed on"),
    "a negative": ({"images": -5}, "images", "claims -5 images"),
    "another plan": ({"plan": "1" * 64}, "plan", "is of another plan"),
    "another agreement": ({"agreement": "1" * 64}, "agreement", "is of another agreement"),
    "another round": ({"round": 2}, "round", "is of round 2"),
    "whole numbers": ({"constants": "1" * 64}, "constants", "its whole numbers are not those"),
}


@pytest.mark.parametrize(("changes", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_update_is_refused_and_the_round_goes_on_without_it(
    network, changes: dict[str, Any], code: str, message: str
) -> None:
    with network() as running:
        clients = running.agreed()
        with pytest.raises(RefusalError, match=message):
            send(running, clients["site-a"], "site-a", **changes)
        for site in ("site-b", "site-c"):
            send(running, clients[site], site, value=2.0)
        running.until(lambda: running.coordinator._last_round() == 1)
        (record,) = running.rounds()
        assert record["refused"] == {"site-a": code}
        assert record["sites"] == {"site-b": 10, "site-c": 5}
        average = read_update(running.folder / "average.safetensors")
        assert average.tensors["b"].unique().tolist() == [2.0]


def test_other_weights_are_refused_and_their_names_stay_out(network, caplog) -> None:
    with network() as running:
        clients = running.agreed()
        path = running.folder.with_name("other")
        planted = update(running, "site-a")
        tensors = {**planted.tensors, "Erika": torch.zeros(1), "w": torch.zeros(2)}
        write_update(path, Update(planted.header, tensors))
        with pytest.raises(RefusalError) as refusal:
            clients["site-a"].send_update(1, path)
        assert refusal.value.code == "weights"
        text = str(refusal.value)
        assert "has other weights: Erika" in text
        assert "w: [2] of float32, and [2, 3] of float32 is needed" in text
        path.write_bytes(b"Erika" * 100)
        with pytest.raises(RefusalError, match="its header is too long"):
            clients["site-a"].send_update(1, path)
        path.write_bytes(bytes(1 << 20))
        with pytest.raises(RefusalError, match="1048576 bytes are more than"):
            clients["site-a"].send_update(1, path)
        for file in running.folder.rglob("*"):
            assert file.is_dir() or b"Erika" not in file.read_bytes()
        assert "Erika" not in caplog.text


def test_a_late_update_is_refused_by_name_and_the_site_goes_on(network, tmp_path: Path) -> None:
    with network(minutes=0.02) as running:
        clients = running.agreed()
        for site in ("site-a", "site-b"):
            send(running, clients[site], site)
        running.until(lambda: running.coordinator._last_round() == 1)  # without waiting for ever
        running.coordinator.round_minutes = 5.0
        assert running.rounds()[0]["absent"] == ["site-c"]
        assert [client.state().has_sent for client in clients.values()] == [True, True, False]
        with pytest.raises(RefusalError, match=r"round 1 is over: .* of round 1") as refusal:
            send(running, clients["site-c"], "site-c")
        assert refusal.value.code == "late"
        assert clients["site-c"].state().round == 2
        assert clients["site-c"].state().has_sent
        places = (running.folder / "agreement.json", running.folder / "average")
        again = Coordinator(PLAN, running.folder, {}, 1.0, lambda _: ExpectedModel(SHAPES), *places)
        assert again.state("site-c").has_sent
        clients["site-c"].take_average(1, tmp_path / "average", 10_000)
        send(running, clients["site-c"], "site-c", 2)
        assert clients["site-c"].state().has_yours
        with pytest.raises(RefusalError, match=r"round 2 is not over"):
            send(running, clients["site-c"], "site-c", 3)


def test_too_few_sites_stop_it_and_nothing_is_lost(network) -> None:
    with network() as running:
        clients = running.agreed()
        send(running, clients["site-b"], "site-b")
    with network(minutes=0.002) as again:
        again.until(lambda: again.outcome is not None)
        text = str(again.outcome)
        assert "Round 1 has too few sites: 1 came, minimum_sites is 2" in text
        assert "Missing: site-a, site-c" in text
        assert not (again.folder / "average.safetensors").exists()
    with network() as third:
        third.until(lambda: third.coordinator.state("site-b").has_yours)
        clients = {site: third.client(site) for site in SITES}
        for site in ("site-a", "site-c"):
            send(third, clients[site], site)
        third.until(lambda: third.coordinator._last_round() == 1)
        assert third.rounds()[0]["sites"] == IMAGES


def test_a_restarted_coordinator_knows_facts_agreement_and_updates(
    network, study, tmp_path: Path
) -> None:
    with network() as running:
        running.client("site-a").send_facts(facts("site-a"))
    with network() as again:
        assert again.client("site-a").state().has_yours
        for site in ("site-b", "site-c"):
            again.client(site).send_facts(facts(site))
        again.until(lambda: again.coordinator.state("site-a").phase == "rounds")
        agreement = again.client("site-a").agreement()
        send(again, again.client("site-c"), "site-c", value=4.0)
    waiting = Network(study, tmp_path / "run", 5.0)  # it serves, and does not lead yet
    with waiting.server:
        states = {site: waiting.coordinator.state(site) for site in SITES}
    assert {(state.phase, state.round) for state in states.values()} == {("rounds", 1)}
    assert [site for site, state in states.items() if state.has_yours] == ["site-c"]
    with network() as third:
        assert third.client("site-a").agreement() == agreement
        third.until(lambda: third.coordinator.state("site-c").has_yours)
        for site in ("site-a", "site-b"):
            send(third, third.client(site), site, value=4.0)
        third.until(lambda: third.coordinator._last_round() == 1)


def test_sites_that_cannot_agree_are_told_why(network) -> None:
    with network() as running:
        other = IMAGE.model_copy(update={"size": (32, 16)})
        clients = {site: running.client(site) for site in SITES}
        for site, image in zip(SITES, (IMAGE, IMAGE, other), strict=True):
            clients[site].send_facts(facts(site, image=image))
        running.until(lambda: running.coordinator.state("nobody").phase == "failed")
        for client in clients.values():
            assert client.state().faults == (
                "size: [32, 16] at site-c, [16, 16] at site-a; the plan's config must make them "
                "the same",
            )
        running.until(lambda: running.outcome is not None)
        assert "The sites cannot train together" in str(running.outcome)
    with network() as again:  # they tell their facts again
        again.agreed()


def test_an_error_at_a_site_is_told_by_its_kind_alone(network) -> None:
    with network() as running:
        clients = running.agreed()
        clients["site-a"].tell_fault(1, "NonFiniteLossError")
        clients["site-a"].tell_fault(7, "other")  # of no round that runs
        for site in ("site-b", "site-c"):
            send(running, clients[site], site)
        running.until(lambda: running.coordinator._last_round() == 1)
        assert running.rounds()[0]["failed"] == {"site-a": "NonFiniteLossError"}
        text = Raw('{"round": 2, "kind": "No such file: /data/Erika"}')
        with pytest.raises(RefusalError, match="SiteFault: 1 faults"):
            clients["site-a"]._ask("POST", "/v1/fault", State, text)


class Raw:
    """A message that holds what no message of SynthCube holds."""

    def __init__(self, text: str) -> None:
        self.text = text

    def model_dump_json(self) -> str:
        return self.text


def test_an_administrator_alone_is_told_where_it_stands(network) -> None:
    with network() as running:
        admin = running.client("site-a", "admin")
        before = admin.status()
        assert (before.phase, before.round, before.rounds) == ("facts", 0, 3)
        assert before.awaited == SITES
        clients = running.agreed()
        send(running, clients["site-a"], "site-a")
        with pytest.raises(RefusalError):
            send(running, clients["site-b"], "site-b", value=math.nan)
        status = admin.status()
        assert (status.phase, status.round, status.done) == ("rounds", 1, ())
        assert (status.arrived, status.awaited) == (("site-a",), ("site-c",))
        assert status.refused == {"site-b": "not_finite"}
        for site in ("site-b", "site-c"):
            send(running, clients[site], site)
        running.until(lambda: running.coordinator._last_round() == 1)
        (done,) = admin.status().done
        assert done.sites == IMAGES
        for owner, code in {"site-a": "unknown", "stranger": "certificate"}.items():
            with pytest.raises(RefusalError) as refusal:
                running.client("site-a", owner).status()
            assert refusal.value.code == code
        with pytest.raises(RefusalError, match=r"the plan is"):
            running.client("site-a", "admin", plan="f" * 64).status()


def test_an_average_that_is_too_large_is_refused(network, tmp_path: Path) -> None:
    with network() as running:
        clients = running.agreed()
        for site, client in clients.items():
            send(running, client, site)
        running.until(lambda: running.coordinator._last_round() == 1)
        with pytest.raises(FederationError, match="larger than 100 bytes"):
            clients["site-a"].take_average(1, tmp_path / "average", 100)
        assert not (tmp_path / "average").exists()
        with pytest.raises(RefusalError, match="the newest average is of round 1"):
            clients["site-a"].take_average(2, tmp_path / "average", 10_000)


def test_a_coordinator_that_is_away_is_waited_for(network, study, tmp_path: Path) -> None:
    tls = identity.client_context(study["site-a"])
    client = Client("127.0.0.1:9", tls, "site-a", PLAN.sha256, 0.01)
    with pytest.raises(FederationError, match=r"could not be reached for 0.01 minutes .*goes on"):
        client.state()


def test_weights_whose_reply_was_lost_are_not_sent_again(network) -> None:
    with network() as running:
        client = running.agreed()["site-a"]
        client.patience_minutes = 1.0
        taken: list[str] = []
        take_update, reply = running.coordinator.take_update, running.coordinator.state

        def taking(site: str, *arguments: Any) -> None:
            take_update(site, *arguments)
            taken.append(site)

        def breaking_once(site: str) -> State:
            if len(taken) == 1:
                taken.append("broke off")
                raise OSError("the coordinator is killed before it replies")
            return reply(site)

        running.coordinator.take_update = taking  # type: ignore[method-assign]
        running.coordinator.state = breaking_once  # type: ignore[method-assign]
        send(running, client, "site-a")
        assert taken == ["site-a", "broke off"]
        assert client.state().has_yours
