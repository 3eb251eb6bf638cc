"""Serve: the coordinator of a federation, which has no images and averages what sites send."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from synthcube import storage
from synthcube.errors import FederationError
from synthcube.federation import EngineName
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.plan import read_plan, site_settings
from synthcube.tasks import federated_model, hub_pins, run_folder
from synthcube.tasks.federated_model import AGREEMENT, ARTIFACT, AVERAGE
from synthcube.tasks.federation_engines import ENGINES, Endpoint, Engine
from synthcube.training import accountant

log = logging.getLogger("synthcube")

_FAREWELL_MINUTES = 10.0


def serve(
    plan_path: Path,
    certificates: Path,
    site_certificates: Path | None,
    run: Path,
    *,
    address: str = "",
    round_minutes: float = 120.0,
    root: Path | None = None,
    admin: str = "",
    engine: EngineName | Engine = "https",
    overrides: Sequence[str] = (),
) -> Path:
    """Lead the sites of a plan through all rounds; returns the artifact.

    The same call continues what a kill has stopped.

    Args:
        certificates: folder with the certificate and key of the coordinator, and the authority's;
            for nvflare its startup kit.
        site_certificates: YAML with the certificate of each site; None for nvflare.
        run: folder of the federation.
        address: HOST:PORT to listen on; empty: a default, and for nvflare that of the kit.
        round_minutes: how long a round waits for all sites; then the plan's `minimum_sites` are
            enough.
        root: folder with the authority's certificate; None: `certificates`.
        admin: SHA-256 of the common name in the certificate of who may ask for the status.
        engine: what carries the messages, or its name.
        overrides: what the coordinator chooses itself, such as the path of the first stage.

    Raises:
        FederationError: the sites cannot train together, or too few of them came.
    """
    plan = read_plan(plan_path)
    endpoint = Endpoint(certificates, address, site_certificates, root, admin)
    chosen = ENGINES[engine] if isinstance(engine, str) else engine
    serving = chosen.serving(plan, endpoint)
    inputs = {"--plan": plan_path, "--certificates": certificates}
    if site_certificates:
        inputs["--site_certificates"] = site_certificates
    storage.require_separate({"output_path": run}, inputs)
    federated_model.claim(run, "serve")
    settings = site_settings(plan, overrides)
    start = settings.training.start_from_sha256
    if plan.server_optimizer and start and not settings.training.start_from:
        raise FederationError(
            "The plan's server_optimizer needs the trained weights that the sites start from: give "
            f"their place by --set training.start_from=...; their SHA-256 is {start}."
        )
    if settings.training.privacy:
        accountant.require_installed()  # it checks what the sites have spent
    settings = hub_pins.resolved(settings)
    storage.make_folder(run, "output_path")
    with run_folder.locked(run):
        storage.settle(run / ARTIFACT)
        federated_model.record_plan(run, plan)
        coordinator = Coordinator(
            plan, run, settings.data.conditions, round_minutes,
            partial(federated_model.expected, settings), run / AGREEMENT, run / AVERAGE,
        )  # fmt: skip
        with serving(coordinator):
            agreement = coordinator.lead()
            state = federated_model.initial_model(settings, agreement).state_dict()
            folder = federated_model.save(run, plan, agreement, settings, state)
            if absent := coordinator.say_farewell(60 * min(round_minutes, _FAREWELL_MINUTES)):
                log.warning(
                    "The last average was not taken by %s; the same command offers it again.",
                    ", ".join(absent),
                )
    return folder
