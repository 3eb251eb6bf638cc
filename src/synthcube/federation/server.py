"""The coordinator's HTTPS service: who is connected, what is asked for, and limits on all of it.

Standard library alone. A connection without a certificate of the authority ends in the handshake;
one that is not in the list gets a refusal. A reply never holds the text of an exception.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import socket
import socketserver
import ssl
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from synthcube import storage
from synthcube.errors import FederationError, SynthCubeError
from synthcube.federation.agreement import SiteFacts
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.identity import common_name_digest, fingerprint
from synthcube.federation.messages import (
    HASH_HEADER,
    MAX_MESSAGE_BYTES,
    PLAN_HEADER,
    RECEIVED,
    SITE_HEADER,
    STATUS,
    RefusalError,
    SiteFault,
)
from synthcube.schema import Schema

S = TypeVar("S", bound=Schema)

log = logging.getLogger("synthcube")

_HANDSHAKE_S, _MESSAGE_S = 20.0, 60.0
_PIECE = 1 << 20
_MOST_DISCARDED = 1 << 34  # of a refused message
_JSON, _WEIGHTS = "application/json", "application/octet-stream"


class Server(socketserver.ThreadingTCPServer):
    """Serves a coordinator to the sites whose certificates are allowed.

    Args:
        address: host and port; port 0 takes a free one.
        tls: requires a certificate of the client.
        allowed: labels of sites by the SHA-256 of their certificates.
        admin: SHA-256 of the common name of who may ask for the status; empty: nobody.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], tls: ssl.SSLContext, allowed: Mapping[str, str],
        coordinator: Coordinator, admin: str = "",
    ) -> None:  # fmt: skip
        self.admin = admin
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.tls, self.allowed, self.coordinator = tls, allowed, coordinator
        try:
            super().__init__(address, Handler)
        except OSError as error:
            host, port = address
            raise FederationError(
                f"--address {host}:{port} cannot be listened on: {error.strerror or error}."
            ) from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Do the handshake in the connection's own thread, so that none can block the others."""
        request.settimeout(_HANDSHAKE_S)
        connection = self.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        try:
            connection.do_handshake()
        except OSError as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            log.warning("A connection from %s is refused: %s.", client_address[0], reason)
            _close_with_alert(connection)
            return
        with connection:
            Handler(connection, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks concerns nobody else; its text stays out of the log."""
        log.warning("A connection from %s broke off.", client_address[0])
        log.debug("Its error:", exc_info=True)


def _close_with_alert(connection: ssl.SSLSocket) -> None:
    """Close so that the other side reads why: unread bytes would make it lose the alert."""
    with suppress(OSError, ValueError), socket.socket(fileno=connection.detach()) as plain:
        plain.settimeout(1.0)
        plain.shutdown(socket.SHUT_WR)
        while plain.recv(_PIECE):
            pass


class Handler(BaseHTTPRequestHandler):
    """Answers one message, of the site that its certificate tells."""

    server: Any  # a Server, or another that has its `coordinator` and `admin`
    timeout = _MESSAGE_S
    server_version, sys_version = "SynthCube", ""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # as in the base
        """Nothing: the coordinator logs what matters."""

    def _answer(self, method: str) -> None:
        text = self.headers.get("Content-Length", "0")
        self._unread = int(text) if re.fullmatch(r"[0-9]{1,15}", text) else 0
        try:
            if (method, self.path) == ("GET", STATUS) and self._is_admin():
                self._require_plan("The administrator")
                self._reply(self.server.coordinator.status())
            else:
                self.route(method, self._site())
        except RefusalError as refusal:
            self._reply(refusal.reply, refusal.status)
        except SynthCubeError as error:  # of the coordinator, such as a full disk
            log.error("A message could not be taken: %s", error)
            self.send_error(500, "not taken")
        # Who is still sending reads the reply only at the end, and not at all after a reset.
        self._unread = min(self._unread, _MOST_DISCARDED)
        while self._unread and self._read(_PIECE):
            pass

    def label(self) -> str:
        """The label of the connected site. Raises RefusalError."""
        connection: Any = self.connection
        digest = fingerprint(connection.getpeercert(binary_form=True) or b"")
        site: str | None = self.server.allowed.get(digest)
        if site is None:
            log.warning("A certificate that is not in the list is refused: %s.", digest)
            raise RefusalError(
                "certificate", f"the certificate with SHA-256 {digest} is not in the list of sites"
            )
        return site

    def _site(self) -> str:
        """The label of the connected site, which has our plan. Raises RefusalError."""
        site = self.label()
        if self.headers.get(SITE_HEADER, site) != site:
            log.warning("%s is refused: it says that it is another site.", site)
            raise RefusalError("site", f"the certificate is that of {site}")
        self._require_plan(site)
        return site

    def _require_plan(self, who: str) -> None:
        plan = self.server.coordinator.plan.sha256
        if (theirs := self.headers.get(PLAN_HEADER, "")) != plan:
            log.warning("%s is refused: it has another plan.", who)
            raise RefusalError("plan", f"the plan is {plan[:12]}, not {theirs[:12]}")

    def _is_admin(self) -> bool:
        """Whether the certificate, which the authority has signed, is that of the administrator."""
        if not self.server.admin:
            return False
        connection: Any = self.connection
        subject = (connection.getpeercert() or {}).get("subject", ())
        names = [value for part in subject for key, value in part if key == "commonName"]
        return [common_name_digest(name) for name in names] == [self.server.admin]

    def route(self, method: str, site: str) -> None:
        """Answer a message of a site. Raises RefusalError."""
        coordinator, address = self.server.coordinator, f"{method} {self.path}"
        if address == "GET /v1/state":
            state = coordinator.state(site)
            self._reply(state)
            if state.phase == "failed":
                coordinator.failure_was_told(site)
        elif address == "GET /v1/agreement":
            self._reply(coordinator.agreement(site))
        elif address == "POST /v1/facts":
            facts, size = self._message(SiteFacts)
            coordinator.take_facts(site, facts, size)
            self._reply(coordinator.state(site))
        elif address == "POST /v1/fault":
            fault, _ = self._message(SiteFault)
            coordinator.take_fault(site, fault)
            self._reply(coordinator.state(site))
        elif match := re.fullmatch(r"PUT /v1/rounds/([1-9][0-9]{0,9})", address):
            self._take_update(site, int(match[1]))
        elif match := re.fullmatch(r"GET /v1/rounds/([1-9][0-9]{0,9})/average", address):
            self._send_average(site, int(match[1]))
        else:
            raise RefusalError("unknown", "there is no such address")

    def _length(self, limit: int) -> int:
        if self._unread > limit:
            raise RefusalError("size", f"{self._unread} bytes are more than {limit}")
        return self._unread

    def _read(self, size: int) -> bytes:
        piece = self.rfile.read(min(size, self._unread))
        self._unread -= len(piece)
        return piece

    def _message(self, kind: type[S]) -> tuple[S, int]:
        size = self._length(MAX_MESSAGE_BYTES)
        content = self._read(size)
        try:
            return kind.model_validate_json(content), size
        except ValidationError as error:
            raise RefusalError(
                "damaged", f"{kind.__name__}: {error.error_count()} faults"
            ) from None

    def _take_update(self, site: str, number: int) -> None:
        coordinator = self.server.coordinator
        announced = self.headers.get(HASH_HEADER, "")
        try:
            model = coordinator.require_round(site, number)
        except RefusalError as refusal:
            if refusal.code == "late" and re.fullmatch(r"[0-9a-f]{64}", announced):
                coordinator.note_refused(site, number, announced, self._unread)
            raise
        size = self._length(model.update_bytes)
        with storage.scratch_folder(coordinator.updates) as folder:
            path = folder / "update.safetensors"
            digest = hashlib.sha256()
            with path.open("wb") as file:
                while piece := self._read(_PIECE):
                    digest.update(piece)
                    file.write(piece)
            num_bytes = path.stat().st_size
            if num_bytes < size or digest.hexdigest() != announced:
                coordinator.note_refused(site, number, digest.hexdigest(), num_bytes)
                raise RefusalError("damaged", "it is not what was sent: its hash is another one")
            coordinator.take_update(site, number, path, digest.hexdigest())
        self._reply(coordinator.state(site))

    def _send_average(self, site: str, number: int) -> None:
        path: Path = self.server.coordinator.average(site, number)
        # A later average replaces the file, and this one stays open.
        with path.open("rb") as file:
            hashed = hashlib.sha256()
            while piece := file.read(_PIECE):
                hashed.update(piece)
            size, digest = file.tell(), hashed.hexdigest()
            file.seek(0)
            self._begin(200, _WEIGHTS, size, digest)
            shutil.copyfileobj(file, self.wfile, _PIECE)
        self.note_average(site, number, digest, size)

    def note_average(self, site: str, number: int, digest: str, size: int) -> None:
        """Note that a site has been sent an average, by its own connection."""
        self.server.coordinator.average_was_sent(site, number, digest, size)

    def _reply(self, message: Schema, status: int = 200) -> None:
        content = message.model_dump_json().encode()
        self._begin(status, _JSON, len(content), hashlib.sha256(content).hexdigest())
        self.wfile.write(content)

    def _begin(self, status: int, kind: str, size: int, digest: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.send_header(HASH_HEADER, digest)
        self.end_headers()


class RelayedHandler(Handler):
    """Answers one message that an engine hands on, of the site that the engine knows as `name`.

    Its server has `on_their_way`: the average that each site was sent last, until it says that it
    is there.
    """

    name = ""

    def label(self) -> str:
        """The name that the engine knows the site by, which must be that in the plan."""
        if self.name not in self.server.coordinator.plan.sites:
            log.warning("A site that is not in the plan is refused.")
            raise RefusalError("site", f"{self.name} is no site of the plan")
        return self.name

    def note_average(self, site: str, number: int, digest: str, size: int) -> None:
        """Wait for the site to say that it is there: it may still be in the engine's memory."""
        self.server.on_their_way[site] = (number, digest, size)

    def route(self, method: str, site: str) -> None:
        """Answer a message of a site. Raises RefusalError."""
        if self.path != RECEIVED:
            super().route(method, site)
            return
        if average := self.server.on_their_way.pop(site, None):
            self.server.coordinator.average_was_sent(site, *average)
        self._reply(self.server.coordinator.state(site))
