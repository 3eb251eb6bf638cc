"""A site on Flower: it answers what the coordinator asks, as it would ask on our own network."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType

from synthcube import storage
from synthcube.errors import FederationError, SynthCubeError
from synthcube.federation import identity
from synthcube.federation.agreement import Agreement, SiteFacts
from synthcube.federation.client import Client
from synthcube.federation.messages import FAULT_KINDS, RefusalError, SiteFault, State
from synthcube.federation_flower import keys
from synthcube.federation_flower.messages import Answer, Order, decoded, encoded
from synthcube.federation_flower.processes import (
    FOREIGN,
    KEY,
    REFUSED,
    SENT,
    Process,
    listening,
    require_flower,
)

log = logging.getLogger("synthcube")

_CHECK_S, _PAUSE_S, _FAREWELL_S = 15.0, 2.0, 60.0


class FlowerClient(Client):
    """Talks to the coordinator for one site, through a SuperNode that runs within this context.

    A client of our own network asks; this one waits for an order, which holds the reply to what it
    would have asked for.

    Args:
        certificates: folder with the key of the site, which is the key of its SuperNode.
        root: folder with the authority's certificate; None: `certificates`.
        Others as of :class:`synthcube.federation.client.Client`.

    Raises:
        FederationError: Flower is missing, or the key is of a kind that it does not take.
    """

    def __init__(
        self, address: str, certificates: Path, root: Path | None, site: str | None, plan: str,
        patience_minutes: float,
    ) -> None:  # fmt: skip
        require_flower()
        tls = identity.client_context(certificates, root)
        super().__init__(address, tls, site, plan, patience_minutes)
        self._certificates, self._root = certificates, (root or certificates) / identity.ROOT
        self._site, self._plan = site, plan
        self._orders: queue.SimpleQueue[tuple[Connection, Order, bytes]] = queue.SimpleQueue()
        self._current: tuple[Connection, Order, bytes] | None = None
        self._held = ExitStack()
        self._process: Process | None = None
        self._is_on_its_way = False
        """Whether an answer has not reached the coordinator yet."""

    def __enter__(self) -> FlowerClient:
        with ExitStack() as held:
            self._scratch = held.enter_context(storage.scratch_folder())
            keys.write_private_key(self._certificates, self._scratch / KEY)
            self._require_reach()
            listener = held.enter_context(listening(self._scratch))
            threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
            held.callback(self._end)
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with self._held:
            if error and not isinstance(error, Exception):
                return  # a signal, which leaves no time
            if self._current and error:
                name = type(error).__name__ if isinstance(error, SynthCubeError) else "other"
                number = max(1, self._order.state.round)
                self.tell_fault(number, name if name in FAULT_KINDS else "other")
            elif self._current:
                self._answer(Answer(nonce=self._order.nonce))
            end = time.monotonic() + _FAREWELL_S
            while self._process and self._process.code is None and time.monotonic() < end:
                self._read_signs(self._process)
                if not self._is_on_its_way:
                    break
                time.sleep(0.1)

    def state(self) -> State:
        """Where the federation stands; waits for an order of the coordinator."""
        while self._current is None:
            self._watch()
            with suppress(queue.Empty):
                self._current = self._orders.get(timeout=0.2)
        order = self._order
        if order.refusal:
            raise RefusalError(order.refusal.code, *order.refusal.faults)
        if order.state.plan != self._plan:
            raise RefusalError(
                "plan", f"the plan is {order.state.plan[:12]}, not {self._plan[:12]}"
            )
        if self._site and order.state.site != self._site:
            raise RefusalError("site", f"the certificate is that of {order.state.site}")
        return order.state

    def send_facts(self, facts: SiteFacts) -> State:
        """Tell the facts of this site's data."""
        state = self.state()
        self._answer(Answer(nonce=self._order.nonce, facts=facts))
        return state.model_copy(update={"has_yours": True})

    def agreement(self) -> Agreement:
        """What the sites have agreed on."""
        self.state()
        if self._order.agreement is None:
            raise FederationError("The coordinator's message has no agreement in it.")
        return self._order.agreement

    def send_update(self, number: int, path: Path) -> State:
        """Send the weights of a round; a refusal of them comes with the next order."""
        state = self.state()
        digest = storage.sha256(path)
        self._answer(Answer(nonce=self._order.nonce, update_sha256=digest), path.read_bytes())
        return state.model_copy(update={"has_yours": True})

    def take_average(self, number: int, path: Path, limit: int) -> None:
        """Write the average of a round to a file of at most `limit` bytes, in one step."""
        state = self.state()
        assert self._current
        average = self._current[2]
        if number != state.round - (state.phase != "done") or not average:
            raise FederationError(f"The coordinator has sent no average of round {number}.")
        if len(average) > limit:
            raise FederationError(
                f"The average of round {number} is refused: it is larger than {limit} bytes, which "
                "the model has."
            )
        storage.write_with(path, lambda file: file.write_bytes(average))

    def tell_fault(self, number: int, kind: str) -> None:
        """Tell the kind of this site's error."""
        if self._current:
            fault = SiteFault(round=number, kind=kind)
            self._answer(Answer(nonce=self._order.nonce, fault=fault))

    @property
    def _order(self) -> Order:
        assert self._current
        return self._current[1]

    def _answer(self, answer: Answer, file: bytes = b"") -> None:
        assert self._current
        connection, self._current = self._current[0], None
        with connection:
            try:
                self._is_on_its_way = True
                connection.send_bytes(encoded(answer, file))
            except OSError:  # its SuperNode has ended meanwhile: the coordinator asks again
                log.warning("An answer was not taken: the coordinator will ask again.")

    def _listen(self, listener: Listener) -> None:
        """Take orders, each from a process of Flower that waits for the answer."""
        with suppress(OSError):  # once the listener is closed
            while True:
                connection = listener.accept()
                try:
                    order, average = decoded(connection.recv_bytes(), Order)
                except (EOFError, OSError, FederationError):
                    log.warning("A message of the coordinator is not one of SynthCube.")
                    connection.close()
                else:
                    self._orders.put((connection, order, average))

    def _watch(self) -> None:
        """Keep a SuperNode running. Raises FederationError where that has no prospect."""
        if self._process is None:
            self._process = self._started()
        self._read_signs(self._process)
        if self._process.code == REFUSED:
            raise FederationError(
                f"The coordinator at {self.address} does not know the key of this site: "
                f"{identity.CERTIFICATE} must be in its --site_certificates."
            )
        if self._process.code is not None:  # the coordinator was started anew
            self._process.end()
            self._process = None
            time.sleep(_PAUSE_S)
            self._require_reach()
        elif time.monotonic() - self._checked > _CHECK_S:
            self._require_reach()

    def _read_signs(self, process: Process) -> None:
        while sign := process.sign():
            if sign == FOREIGN:
                log.warning("The coordinator sent code of its own, which is refused.")
            else:
                self._is_on_its_way = False

    def _started(self) -> Process:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        return Process(
            ["-m", "synthcube.federation_flower.nodes", "supernode",
             "--superlink", f"{host}:{self._port}", "--root-certificates", self._root.absolute(),
             "--auth-supernode-private-key", self._scratch / KEY,
             "--host", "127.0.0.1", "--port", port],
            self._scratch, signs=(FOREIGN, SENT),
        )  # fmt: skip

    def _end(self) -> None:
        if self._process:
            self._process.end()

    def _require_reach(self) -> None:
        """Wait until the coordinator is there; Flower has one text for all that can be wrong.

        Raises FederationError if it is not trusted, or away for too long.
        """
        self._patiently(self._reach)
        self._checked = time.monotonic()

    def _reach(self) -> None:
        with closing(self._connection()) as connection:
            connection.connect()
