"""The coordinator on Flower: it asks each site, and hands what comes to the core.

Which site an answer is from follows from keys alone: Flower tells which key a node has proved to
have, and an answer must repeat a random number that only this node could fetch.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from synthcube import storage
from synthcube.errors import FederationError, SynthCubeError
from synthcube.federation.agreement import Agreement
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.identity import CERTIFICATE, KEY
from synthcube.federation.messages import Refusal, RefusalError, State
from synthcube.federation_flower import bundle, keys
from synthcube.federation_flower.messages import Answer, Order, decoded, encoded
from synthcube.federation_flower.processes import (
    OPEN,
    READY,
    Process,
    listening,
    output,
    receive,
    require_flower,
    send,
)

log = logging.getLogger("synthcube")

_POLL_S, _PAUSE_S = 0.2, 15.0
_INVALID_BUNDLE = 7  # of Flower's codes of errors
_CONFIG = """\
[superlink]
default = "local"

[superlink.local]
address = "127.0.0.1:{port}"
insecure = true
"""


@contextmanager
def served(
    coordinator: Coordinator, address: tuple[str, int], certificates: Path,
    sites: Mapping[str, bytes],
) -> Iterator[None]:  # fmt: skip
    """Serve a coordinator to sites on Flower within this context.

    Args:
        address: host and port to listen on.
        certificates: folder with the certificate of the coordinator and its key.
        sites: certificates by label, in DER form.

    Raises:
        FederationError: Flower is missing, does not start, or a certificate is of another kind.
    """
    require_flower()
    labels = {label: keys.public_key(certificate, label) for label, certificate in sites.items()}
    with ExitStack() as held:
        scratch = held.enter_context(storage.scratch_folder())
        inner, outer = held.enter_context(socket.socket()), held.enter_context(_listening(address))
        inner.bind(("127.0.0.1", 0))
        listener = held.enter_context(listening(scratch))
        superlink = Process(
            ["-m", "synthcube.federation_flower.nodes", "superlink", inner.fileno(),
             outer.fileno(), (certificates / CERTIFICATE).absolute(),
             (certificates / KEY).absolute()],
            scratch, signs=(READY, OPEN), sockets=(inner.fileno(), outer.fileno()),
        )  # fmt: skip
        held.callback(superlink.end)
        _await(superlink, READY)
        storage.write_text(scratch / "config.toml", _CONFIG.format(port=inner.getsockname()[1]))
        flwr = Path(sys.executable).with_name("flwr")
        for label, key in labels.items():
            path = scratch / f"{label}.pub"
            path.write_bytes(keys.as_openssh(key))
            output([flwr, "supernode", "register", path, "local"], scratch)
        output([flwr, "run", bundle.write_app(scratch), "local"], scratch)
        superlink.tell(OPEN)
        _await(superlink, OPEN)
        host, port = outer.getsockname()[:2]
        log.info("Serving on Flower at %s, port %d.", host, port)
        courier = _Courier(
            coordinator, {keys.as_flower_tells(key): label for label, key in labels.items()}
        )
        ended = threading.Event()
        thread = threading.Thread(target=courier.run, args=(listener, superlink, ended))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _await(superlink: Process, sign: str) -> None:
    if not superlink.await_sign(sign):
        raise FederationError("Flower's SuperLink did not start:", superlink.last_lines)


def _listening(address: tuple[str, int]) -> socket.socket:
    host, port = address
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise FederationError(
            f"--address {host}:{port} cannot be listened on: {error.strerror or error}."
        ) from error
    return bound


@dataclass(slots=True)
class _Ask:
    """An order that a site has not answered yet."""

    nonce: str
    state: State
    average_sha256: str = ""
    average_bytes: int = 0


@dataclass(slots=True)
class _Site:
    """What is known of a site's node, and what it was asked."""

    label: str
    node: int | None = None
    activated: str = ""
    ask: _Ask | None = None
    refusal: Refusal | None = None
    agreement: Agreement | None = None
    is_informed: bool = False
    paused_until: float = 0.0


@dataclass(slots=True)
class _Courier:
    """Asks the sites what the coordinator needs, and hands it their answers.

    Args:
        labels: of the sites, by their key as Flower tells it.
    """

    coordinator: Coordinator
    labels: Mapping[str, str]
    _sites: dict[str, _Site] = field(init=False)
    _sent: deque[tuple[_Site, _Ask]] = field(init=False, default_factory=deque)
    _pending: dict[str, tuple[_Site, _Ask]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._sites = {label: _Site(label) for label in self.labels.values()}

    def run(self, listener: Listener, superlink: Process, ended: threading.Event) -> None:
        """Serve the app of the coordinator until `ended`."""
        connections: deque[Connection] = deque()
        accepting = threading.Thread(target=_accept, args=(listener, connections), daemon=True)
        accepting.start()
        try:
            while not ended.wait(0 if connections else _POLL_S):
                if superlink.code is not None:
                    raise EOFError
                if connections:
                    self._step(connections[0])
        except SynthCubeError as error:  # such as a full disk
            self.coordinator.stop(error)
        except Exception as error:  # whatever it is, the leading thread must not wait for ever
            self.coordinator.stop(
                FederationError(
                    f"Flower has ended ({type(error).__name__}). Nothing is lost: the same command "
                    "goes on. Its last lines:",
                    superlink.last_lines,
                )
            )
        finally:
            for connection in connections:
                connection.close()

    def _step(self, app: Connection) -> None:
        while app.poll(_POLL_S):
            header, content = receive(app)
            if "nodes" in header:
                self._see(header["nodes"])
            elif "sent" in header:
                site, ask = self._sent.popleft()
                if header["sent"]:
                    self._pending[header["sent"]] = (site, ask)
                else:
                    self._pause(site, ask)
            else:
                site, ask = self._pending.pop(header["reply"])
                if site.ask is ask:
                    site.ask = None
                    self._take(site, ask, header["fault"], content)
        for site in self._sites.values():
            with suppress(RefusalError):  # a round has ended meanwhile
                self._ask(app, site)

    def _see(self, nodes: list[list[Any]]) -> None:
        """Note which nodes are online; one that was started anew does not know its order."""
        online = {self.labels.get(key): (node, activated) for node, activated, key in nodes}
        for site in self._sites.values():
            if site.label not in online:
                site.node = None
                continue
            site.node, activated = online[site.label]
            if activated != site.activated:
                site.activated, site.ask, site.refusal = activated, None, None
                site.paused_until = 0.0
                log.info("%s is connected.", site.label)

    def _ask(self, app: Connection, site: _Site) -> None:
        if site.node is None or site.ask or time.monotonic() < site.paused_until:
            return
        state = self.coordinator.state(site.label)
        is_over = state.phase in ("failed", "done")
        if (site.is_informed if is_over else state.has_yours) and not site.refusal:
            return
        average, refusal = b"", site.refusal
        if not refusal and state.phase in ("rounds", "done"):
            try:
                site.agreement = site.agreement or self.coordinator.agreement(site.label)
                if number := state.round - (state.phase == "rounds"):
                    average = self.coordinator.average(site.label, number).read_bytes()
            except RefusalError as error:
                if error.code in ("late", "not_yet"):
                    raise
                refusal = error.reply
        site.ask = _Ask(secrets.token_hex(32), state, hashlib.sha256(average).hexdigest(),
                        len(average))  # fmt: skip
        order = Order(nonce=site.ask.nonce, state=state, agreement=site.agreement, refusal=refusal)
        self._sent.append((site, site.ask))
        send(app, {"node": site.node}, encoded(order, average))

    def _take(self, site: _Site, ask: _Ask, fault: int | None, content: bytes) -> None:
        """Hand an answer to the coordinator; what it refuses is told with the next order."""
        if fault is not None:
            if fault == _INVALID_BUNDLE:
                log.warning("%s refuses our bundle: it has another version.", site.label)
            self._pause(site, ask)
            return
        try:
            answer, file = _verified(content, ask.nonce)
        except FederationError:
            log.warning("An answer that should be of %s is refused.", site.label)
            self._pause(site, ask)
            return
        if site.refusal:
            site.refusal = None
            self._pause(site, ask)
            return
        if not answer.fault or ask.state.phase == "failed":
            self._note_sent(site, ask)
        try:
            self._hand_over(site.label, ask.state, answer, file)
        except RefusalError as error:
            if error.code != "late":
                site.refusal = error.reply
        if answer.fault:
            self._pause(site, ask)

    def _note_sent(self, site: _Site, ask: _Ask) -> None:
        """Note what a site has received, as it has answered."""
        state = ask.state
        if ask.average_bytes:
            number = state.round - (state.phase == "rounds")
            self.coordinator.average_was_sent(
                site.label, number, ask.average_sha256, ask.average_bytes
            )
        site.is_informed = state.phase in ("failed", "done")
        if state.phase == "failed":
            self.coordinator.failure_was_told(site.label)

    def _hand_over(self, label: str, state: State, answer: Answer, file: bytes) -> None:
        if answer.fault:
            self.coordinator.take_fault(label, answer.fault)
        elif answer.facts:
            self.coordinator.take_facts(label, answer.facts, len(answer.facts.model_dump_json()))
        elif answer.update_sha256:
            self._take_update(label, state.round, answer.update_sha256, file)

    def _take_update(self, label: str, number: int, announced: str, file: bytes) -> None:
        digest = hashlib.sha256(file).hexdigest()
        try:
            model = self.coordinator.require_round(label, number)
        except RefusalError:
            self.coordinator.note_refused(label, number, digest, len(file))
            raise
        if len(file) > model.update_bytes or digest != announced:
            self.coordinator.note_refused(label, number, digest, len(file))
            if digest != announced:
                raise RefusalError("damaged", "it is not what was sent: its hash is another one")
            raise RefusalError("size", f"{len(file)} bytes are more than {model.update_bytes}")
        with storage.scratch_folder(self.coordinator.updates) as folder:
            path = folder / "update.safetensors"
            path.write_bytes(file)
            self.coordinator.take_update(label, number, path, digest)

    def _pause(self, site: _Site, ask: _Ask) -> None:
        """Ask a site again, but not at once."""
        if site.ask is ask:
            site.ask = None
        site.paused_until = time.monotonic() + _PAUSE_S


def _accept(listener: Listener, connections: deque[Connection]) -> None:
    with suppress(OSError):  # once the listener is closed
        connections.append(listener.accept())


def _verified(content: bytes, nonce: str) -> tuple[Answer, bytes]:
    """An answer and its file, of the node that the nonce was sent to. Raises FederationError."""
    answer, file = decoded(content, Answer)
    if not secrets.compare_digest(answer.nonce, nonce):
        raise FederationError("An answer is refused: it is not of the site that was asked.")
    return answer, file
