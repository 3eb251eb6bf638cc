"""A site's calls to the coordinator: outgoing, over TLS, tried again while it is away."""

from __future__ import annotations

import hashlib
import http.client
import logging
import ssl
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from synthcube import storage
from synthcube.errors import FederationError
from synthcube.federation.agreement import Agreement, SiteFacts
from synthcube.federation.identity import parsed_address, tls_fault
from synthcube.federation.messages import (
    HASH_HEADER,
    MAX_MESSAGE_BYTES,
    PLAN_HEADER,
    RECEIVED,
    SITE_HEADER,
    STATUS,
    Refusal,
    RefusalError,
    SiteFault,
    State,
    Status,
)
from synthcube.schema import Schema

S = TypeVar("S", bound=Schema)
T = TypeVar("T")

log = logging.getLogger("synthcube")

_TIMEOUT_S = 300.0  # the coordinator checks all of an update before it replies
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_PIECE = 1 << 20


class Client:
    """Talks to the coordinator for one site, or for an administrator.

    Args:
        address: HOST:PORT.
        tls: with the certificate of the site; None where another connection is made.
        site: its label, which the coordinator compares with its certificate; None: any.
        plan: hash of its plan.
        patience_minutes: how long the coordinator may be away.
    """

    def __init__(
        self, address: str, tls: ssl.SSLContext | None, site: str | None, plan: str,
        patience_minutes: float,
    ) -> None:  # fmt: skip
        self.address, self.tls, self.patience_minutes = address, tls, patience_minutes
        self._host, self._port = parsed_address(address)
        self._headers = {PLAN_HEADER: plan, **({SITE_HEADER: site} if site else {})}

    def state(self) -> State:
        """Where the federation stands."""
        return self._patiently(partial(self._ask, "GET", "/v1/state", State))

    def status(self) -> Status:
        """Where the federation stands, for an administrator."""
        return self._patiently(partial(self._ask, "GET", STATUS, Status))

    def send_facts(self, facts: SiteFacts) -> State:
        """Tell the facts of this site's data."""
        return self._patiently(partial(self._ask, "POST", "/v1/facts", State, facts))

    def agreement(self) -> Agreement:
        """What the sites have agreed on."""
        return self._patiently(partial(self._ask, "GET", "/v1/agreement", Agreement))

    def send_update(self, number: int, path: Path) -> State:
        """Send the weights of a round. Raises RefusalError, with code late if it is over.

        After a break, weights that have arrived are not sent again.
        """
        broke_off = False

        def send() -> State:
            nonlocal broke_off
            if broke_off:
                state = self._ask("GET", "/v1/state", State)
                if state.round == number and state.has_yours:
                    return state
            broke_off = True
            return self._send_update(number, path)

        return self._patiently(send)

    def take_average(self, number: int, path: Path, limit: int) -> None:
        """Write the average of a round to a file of at most `limit` bytes, in one step."""
        with storage.scratch_folder(path.parent) as folder:
            fetched = folder / path.name
            self._patiently(partial(self._fetch, number, limit, fetched))
            storage.write_with(path, partial(storage.link_or_copy, fetched))

    def tell_fault(self, number: int, kind: str) -> None:
        """Tell the kind of this site's error, once: it is not the time for patience."""
        try:
            self._ask("POST", "/v1/fault", State, SiteFault(round=number, kind=kind))
        except (OSError, http.client.HTTPException, FederationError) as error:
            log.debug("The coordinator was not told of the error: %s", type(error).__name__)

    def _patiently(self, work: Callable[[], T]) -> T:
        """The result of `work`, tried again while the coordinator cannot be reached."""
        pause, end = _FIRST_PAUSE_S, time.monotonic() + 60 * self.patience_minutes
        told: set[str] = set()
        while True:
            try:
                return work()
            except (OSError, http.client.HTTPException) as error:
                fault = tls_fault(error, self._host) if isinstance(error, ssl.SSLError) else ""
                if fault:
                    raise FederationError(
                        f"--address {self.address}: this site does not go on with the coordinator: "
                        f"{fault}"
                    ) from error
                reason = getattr(error, "strerror", None) or type(error).__name__
                if time.monotonic() + pause > end:
                    raise FederationError(
                        f"{self.address}: the coordinator could not be reached for "
                        f"{self.patience_minutes:g} minutes ({reason}). Nothing is lost: the same "
                        "command goes on."
                    ) from error
                if reason not in told:
                    told.add(reason)
                    log.warning("The coordinator at %s is away (%s); trying again.",
                                self.address, reason)  # fmt: skip
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _ask(self, method: str, path: str, kind: type[S], message: Schema | None = None) -> S:
        content = message.model_dump_json().encode() if message else None
        with closing(self._connection()) as connection:
            connection.request(method, path, content, self._headers)
            return _message(self._reply(connection), kind)

    def _send_update(self, number: int, path: Path) -> State:
        headers = {**self._headers, HASH_HEADER: storage.sha256(path),
                   "Content-Length": str(path.stat().st_size)}  # fmt: skip
        with closing(self._connection()) as connection, path.open("rb") as file:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was read
                connection.request("PUT", f"/v1/rounds/{number}", file, headers)
            return _message(self._reply(connection), State)

    def _fetch(self, number: int, limit: int, path: Path) -> None:
        """Write an average to `path`, after a check of its size and its hash."""
        with closing(self._connection()) as connection, path.open("wb") as file:
            connection.request("GET", f"/v1/rounds/{number}/average", headers=self._headers)
            reply = self._reply(connection)
            digest = hashlib.sha256()
            while piece := reply.read(_PIECE):
                digest.update(piece)
                file.write(piece)
                if file.tell() > limit:
                    raise FederationError(
                        f"The average of round {number} is refused: it is larger than {limit} "
                        "bytes, which the model has."
                    )
        if digest.hexdigest() != reply.getheader(HASH_HEADER):
            raise http.client.IncompleteRead(b"")  # cut off: tried again

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=_TIMEOUT_S, context=self.tls
        )

    def _reply(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        """A reply, after its head; raises RefusalError if it is one."""
        reply = connection.getresponse()
        if reply.status == http.client.OK:
            return reply
        if reply.status >= http.client.INTERNAL_SERVER_ERROR:
            raise http.client.HTTPException(f"status {reply.status}")
        refusal = _message(reply, Refusal)
        raise RefusalError(refusal.code, *refusal.faults)


class RelayedClient(Client):
    """Talks to the coordinator through something that may still hold what is sent to the site."""

    def take_average(self, number: int, path: Path, limit: int) -> None:
        """Write the average of a round to a file of at most `limit` bytes, and say that it is here.

        The relay may end before the reply to that, so there is no patience for it.
        """
        super().take_average(number, path, limit)
        with suppress(OSError, http.client.HTTPException, FederationError):
            self._ask("POST", RECEIVED, State)


def _message(reply: http.client.HTTPResponse, kind: type[S]) -> S:
    content = reply.read(MAX_MESSAGE_BYTES + 1)
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise FederationError(
            f"The coordinator's reply is no {kind.__name__}: it is another server, or has another "
            "version."
        ) from error
