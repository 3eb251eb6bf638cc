"""Engines: what carries the messages of a federation, by name.

Coordinator, sites, checks and audit log are the same on all of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from synthcube.errors import FederationError
from synthcube.federation import EngineName, identity
from synthcube.federation.client import Client
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.plan import FederationPlan
from synthcube.federation.server import Server
from synthcube.federation_flower import processes
from synthcube.federation_nvflare import coordinator as nvflare_coordinator
from synthcube.federation_nvflare import kit
from synthcube.federation_nvflare.site import RelayClient

log = logging.getLogger("synthcube")

_LISTEN = "0.0.0.0:50273"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a party of a federation talks to others, and what proves who it is.

    Args:
        certificates: folder with its certificate and key, and the authority's certificate; for
            nvflare its startup kit.
        address: HOST:PORT; nvflare has it in the startup kit.
        site_certificates: at the coordinator, YAML with the certificate of each site.
        root: folder with the authority's certificate; None: `certificates`.
        admin: at the coordinator, SHA-256 of the common name of who may ask for the status.
    """

    certificates: Path
    address: str = ""
    site_certificates: Path | None = None
    root: Path | None = None
    admin: str = ""


Serving = Callable[[Coordinator], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Engine:
    """How the two kinds of parties talk; both functions raise FederationError before any work.

    Args:
        serving: what serves a coordinator within a context.
        connecting: what a site asks through within a context, given its label and how many
            minutes the coordinator may be away.
    """

    serving: Callable[[FederationPlan, Endpoint], Serving]
    connecting: Callable[
        [FederationPlan, Endpoint, str | None, float], AbstractContextManager[Client]
    ]


def _listed_sites(plan: FederationPlan, endpoint: Endpoint) -> dict[str, bytes]:
    if endpoint.site_certificates is None:
        raise FederationError("--site_certificates is missing: the list of the sites.")
    return identity.site_certificates(endpoint.site_certificates, plan)


def _required_address(endpoint: Endpoint) -> str:
    if not endpoint.address:
        raise FederationError("--address is missing: that of the coordinator.")
    return endpoint.address


def _serving_https(plan: FederationPlan, endpoint: Endpoint) -> Serving:
    tls = identity.server_context(endpoint.certificates, endpoint.root)
    listen = identity.parsed_address(endpoint.address or _LISTEN)
    sites = _listed_sites(plan, endpoint)
    allowed = {identity.fingerprint(value): label for label, value in sites.items()}

    @contextmanager
    def served(coordinator: Coordinator) -> Iterator[None]:
        with Server(listen, tls, allowed, coordinator, endpoint.admin) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
            thread.start()
            log.info("Serving at %s, port %d.", server.server_address[0], server.port)
            try:
                yield
            finally:
                server.shutdown()
                thread.join()

    return served


def _connecting_https(
    plan: FederationPlan, endpoint: Endpoint, site: str | None, patience_minutes: float
) -> AbstractContextManager[Client]:
    address = _required_address(endpoint)
    tls = identity.client_context(endpoint.certificates, endpoint.root)
    return nullcontext(Client(address, tls, site, plan.sha256, patience_minutes))


def _serving_flower(plan: FederationPlan, endpoint: Endpoint) -> Serving:
    identity.server_context(endpoint.certificates, endpoint.root)
    listen = identity.parsed_address(endpoint.address or _LISTEN)
    sites = _listed_sites(plan, endpoint)
    processes.require_flower()
    if endpoint.admin:
        raise FederationError("--engine flower tells an administrator no status.")
    from synthcube.federation_flower.coordinator import served

    return partial(served, address=listen, certificates=endpoint.certificates, sites=sites)


def _connecting_flower(
    plan: FederationPlan, endpoint: Endpoint, site: str | None, patience_minutes: float
) -> AbstractContextManager[Client]:
    address = _required_address(endpoint)
    processes.require_flower()
    from synthcube.federation_flower.site import FlowerClient

    return FlowerClient(
        address, endpoint.certificates, endpoint.root, site, plan.sha256, patience_minutes
    )


def _serving_nvflare(plan: FederationPlan, endpoint: Endpoint) -> Serving:
    _require_kit_alone(endpoint)
    kit.require_guarded(endpoint.certificates, "server")
    return partial(nvflare_coordinator.served, kit=endpoint.certificates)


def _connecting_nvflare(
    plan: FederationPlan, endpoint: Endpoint, site: str | None, patience_minutes: float
) -> AbstractContextManager[Client]:
    _require_kit_alone(endpoint)
    return nullcontext(RelayClient(endpoint.certificates, site, plan.sha256, patience_minutes))


def _require_kit_alone(endpoint: Endpoint) -> None:
    options = {"--address": endpoint.address, "--site_certificates": endpoint.site_certificates}
    if needless := [option for option, value in options.items() if value]:
        raise FederationError(
            f"--engine nvflare has it from the startup kit: leave out {' and '.join(needless)}."
        )


ENGINES: dict[EngineName, Engine] = {
    "https": Engine(_serving_https, _connecting_https),
    "flower": Engine(_serving_flower, _connecting_flower),
    "nvflare": Engine(_serving_nvflare, _connecting_nvflare),
}
