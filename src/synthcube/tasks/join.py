"""Join: a site of a federation, which trains on its own images and sends weights and counts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from synthcube import storage
from synthcube.data.manifest import read_manifest, require_outside
from synthcube.errors import FederationError, SynthCubeError, first_faults
from synthcube.federation import EngineName, averaging
from synthcube.federation.aggregation import ExpectedModel
from synthcube.federation.agreement import Agreement
from synthcube.federation.client import Client
from synthcube.federation.messages import FAULT_KINDS, RefusalError
from synthcube.federation.plan import read_plan, site_settings
from synthcube.federation.update import read_average, read_header
from synthcube.tasks import federated_model, hub_pins, run_folder
from synthcube.tasks.federated_model import AGREEMENT, ARTIFACT, AVERAGE
from synthcube.tasks.federated_site import Site
from synthcube.tasks.federation_engines import ENGINES, Endpoint, Engine
from synthcube.training import checkpoints

log = logging.getLogger("synthcube")

_POLL_S = 2.0


def join(
    plan_path: Path,
    data_path: Path,
    certificates: Path,
    run: Path,
    *,
    address: str = "",
    site: str | None = None,
    patience_minutes: float = 60.0,
    root: Path | None = None,
    engine: EngineName | Engine = "https",
    overrides: Sequence[str] = (),
) -> Path:
    """Train as a site of a federation until its last round; returns the artifact.

    The same call continues what a kill or a signal has stopped.

    Args:
        certificates: folder with the certificate and key of this site, and the authority's; for
            nvflare its startup kit.
        run: folder of this site.
        address: HOST:PORT of the coordinator; empty for nvflare, whose kit has it.
        site: label of this site; None: that of its certificate at the coordinator.
        patience_minutes: how long the coordinator may be away.
        root: folder with the authority's certificate; None: `certificates`.
        engine: what carries the messages, or its name.
        overrides: what a site chooses itself, such as the device and the path of the first stage.

    Raises:
        FederationError: the coordinator refuses this site or its data, or is away for too long.
        PreemptedError: a signal stopped it.
    """
    plan = read_plan(plan_path)
    if site and site not in plan.sites:
        raise FederationError(
            f"--site {site}: the plan has no such site; its sites are {', '.join(plan.sites)}."
        )
    endpoint = Endpoint(certificates, address, root=root)
    chosen = ENGINES[engine] if isinstance(engine, str) else engine
    connecting = chosen.connecting(plan, endpoint, site, patience_minutes)
    inputs = {"--plan": plan_path, "--certificates": certificates, "data_path": data_path}
    storage.require_separate({"output_path": run}, inputs)
    federated_model.claim(run, "join")
    settings = site_settings(plan, overrides)
    if settings.training.start_from_sha256 and not settings.training.start_from:
        raise FederationError(
            "The plan starts from trained weights: give their place at this site by --set "
            f"training.start_from=...; their SHA-256 is {settings.training.start_from_sha256}."
        )
    manifest = read_manifest(data_path)
    require_outside({"output_path": run}, manifest)
    with connecting as client:
        label = client.state().site  # which tells whether it is known, before any work
        settings = hub_pins.resolved(settings)
        storage.make_folder(run, "output_path")
        with run_folder.locked(run):
            storage.settle(run / ARTIFACT)
            federated_model.record_plan(run, plan)
            member = Site(label, run, plan, settings)
            member.record_images([row.cells for row in manifest.rows])
            agreement = _agree(client, member)
            model = ExpectedModel(federated_model.shapes(settings, agreement))
            _train_rounds(client, member, agreement, model)
            own = checkpoints.weights(member.checkpoint)
            return federated_model.save(run, plan, agreement, settings, own)


def _agree(client: Client, member: Site) -> Agreement:
    """The agreement of the sites, checked against the data of this one."""
    before = federated_model.recorded_agreement(member.folder)
    facts = member.facts()
    state = client.state()
    if state.phase == "facts":
        if before:
            raise FederationError(
                f"{member.folder / AGREEMENT}: this site has agreed already, and the coordinator "
                "has not: it has lost its state. Start in other folders."
            )
        member.log_facts(facts)
        state = client.send_facts(facts)
    while state.phase == "facts":
        time.sleep(_POLL_S)
        state = client.state()
    if state.phase == "failed":
        raise FederationError("The sites cannot train together:", state.faults)
    agreement = client.agreement()
    if before and before != agreement:
        raise FederationError(
            f"{member.folder / AGREEMENT}: this site has agreed on something else. Start in "
            "another folder."
        )
    member.accept(agreement, facts)
    storage.write_json(member.folder / AGREEMENT, agreement.model_dump(mode="json"))
    return agreement


def _train_rounds(client: Client, member: Site, agreement: Agreement, model: ExpectedModel) -> None:
    """Train and send in each round until the last average is here."""
    plan, state = member.plan, client.state()
    while state.phase != "done":
        if state.has_yours:
            time.sleep(_POLL_S)
            state = client.state()
            continue
        number = state.round
        average = _average(client, member, agreement, number - 1, model) if number > 1 else None
        if number > 1 and average is None:  # another round has ended meanwhile
            state = client.state()
            continue
        log.info("Round %d of %d.", number, plan.rounds)
        with _told(client, number):
            member.require_budget(has_sent=state.has_sent)
            path = member.train_round(agreement, number, average)
        try:
            state = client.send_update(number, path)
        except RefusalError as refusal:
            if refusal.code != "late":
                raise
            log.warning("Round %d was over before this site was ready: it goes on.", number)
            state = client.state()
    average = _average(client, member, agreement, plan.rounds, model)
    if average is None:
        raise FederationError("The coordinator does not have the last average any more.")
    member.receive_average(agreement, plan.rounds, average)


def _average(
    client: Client, member: Site, agreement: Agreement, number: int, model: ExpectedModel
) -> Path | None:
    """The file with the average of a round, checked; None if a newer one has replaced it."""
    path = member.folder / AVERAGE
    if path.exists() and read_header(path).round == number:
        return path
    try:
        client.take_average(number, path, model.update_bytes)
    except RefusalError as refusal:
        if refusal.code == "late":
            return None
        raise
    average = read_average(path, member.plan.sha256, agreement.sha256, number)
    if faults := [fault.text for fault in averaging.weight_faults(average.tensors, model.shapes)]:
        path.unlink()
        raise FederationError("The average of the coordinator is refused:", first_faults(faults))
    return path


@contextmanager
def _told(client: Client, number: int) -> Iterator[None]:
    """Tell the coordinator the kind of an error within this context, and no word of its text."""
    try:
        yield
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, SynthCubeError) else "other"
        client.tell_fault(number, kind if kind in FAULT_KINDS else "other")
        raise
