"""What OpenFL builds of this package: an aggregator and collaborators that hand on messages.

Coordinator and sites are those of every federation. OpenFL connects them over mutual TLS, and its
aggregator tells which site a message is from: the common name in its certificate. A message is the
bytes of a request, sent as the result of a task; the reply is fetched as the tensor of that name.
"""

from __future__ import annotations

import http.client
import io
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
from openfl.protocols.base_pb2 import NamedTensor

from synthcube import environment
from synthcube.errors import FederationError, PreemptedError, SynthCubeError
from synthcube.federation.client import RelayedClient
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.plan import FederationPlan
from synthcube.federation.server import RelayedHandler
from synthcube.federation_openfl import workspace

log = logging.getLogger("synthcube")

_CERTIFICATES = Path("cert")
_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)
"""Of an aggregator that is away, or ends: it is tried again."""


class Part:
    """What OpenFL wants to have built, and SynthCube needs no more of than its settings."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def initialize_tensorkeys_for_functions(self) -> None:
        """Nothing: there are no functions."""


class Aggregator:
    """Runs the coordinator beside OpenFL's server, which calls this with what sites send.

    Args:
        aggregator_uuid, federation_uuid: of the plan; OpenFL compares them in every message.
        authorized_cols: the sites of the plan.
        others: of OpenFL, for which there is no use.

    Raises:
        SystemExit: something else is in the workspace.
    """

    single_col_cert_common_name, connector = "", None  # read by OpenFL's server
    admin = ""  # nobody may ask for the status

    def __init__(
        self, aggregator_uuid: str, federation_uuid: str, authorized_cols: Sequence[str],
        **others: object,
    ) -> None:  # fmt: skip
        _set_up()
        self.uuid, self.federation_uuid = aggregator_uuid, federation_uuid
        self.authorized_cols = authorized_cols
        self.coordinator: Coordinator | None = None
        self.on_their_way: dict[str, tuple[int, str, int]] = {}
        self._requests: dict[str, tuple[str, bytes]] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        from synthcube.tasks.federation_engines import Engine
        from synthcube.tasks.serve import serve

        @contextmanager
        def served(coordinator: Coordinator) -> Iterator[None]:
            self.coordinator = coordinator
            yield

        try:
            choices = workspace.aggregator_choices(Path())
            engine = Engine(lambda plan, endpoint: served, _nobody)
            folder = serve(
                Path(workspace.PLAN), _CERTIFICATES, None, _run(choices, workspace.AGGREGATOR),
                round_minutes=choices.round_minutes, engine=engine, overrides=choices.overrides,
            )  # fmt: skip
            log.info("Trained model: %s", folder)
        except BaseException as error:
            self._error = error

    def valid_collaborator_cn_and_id(self, common_name: str, site: str) -> bool:
        """Whether a certificate is that of the site which a message says it is from."""
        return common_name == site and site in self.authorized_cols

    def send_local_task_results(
        self, site: str, round_number: int, name: str, data_size: int, tensors: Sequence[Any]
    ) -> None:
        """Keep a request of a site, in place of one whose reply was not fetched."""
        self._requests[site] = (name, b"".join(tensor.data_bytes for tensor in tensors))

    def get_aggregated_tensor(
        self, name: str, round_number: int, report: bool, tags: tuple[str, ...], lossless: bool,
        site: str,
    ) -> Any:  # fmt: skip
        """The reply to a request; empty if it is not here, or there is no coordinator yet."""
        sent, request = self._requests.pop(site, ("", b""))
        if sent != name or not self.coordinator:
            return NamedTensor()
        try:
            return NamedTensor(name=name, data_bytes=_Answer(request, site, self).wfile.getvalue())
        except Exception as error:  # OpenFL would send its text
            log.warning("A message of %s could not be answered: %s.", site, type(error).__name__)
            log.debug("Its error:", exc_info=True)
            return NamedTensor()

    def all_quit_jobs_sent(self) -> bool:
        """Whether the federation is over. Raises the error that has ended it."""
        with _ending():
            if self._error:
                raise self._error
        return not self._thread.is_alive()


class _Answer(RelayedHandler):
    wfile: io.BytesIO

    def __init__(self, request: bytes, site: str, server: Aggregator) -> None:
        self.rfile, self.wfile, self.name = io.BytesIO(request), io.BytesIO(), site
        super().__init__(None, (site, 0), server)  # type: ignore[arg-type]  # there is no socket

    def setup(self) -> None:
        """Nothing: all is in memory."""

    finish = setup


class Collaborator:
    """Trains as a site of the federation.

    Args:
        collaborator_name: label of the site, and common name of its certificate.
        task_runner: with what the site chooses in its data loader.
        client: of OpenFL.
        others: of OpenFL, for which there is no use.

    Raises:
        SystemExit: something else is in the workspace.
    """

    def __init__(
        self, collaborator_name: str, task_runner: Part, client: Any, **others: object
    ) -> None:
        _set_up()
        self._site, self._client = collaborator_name, client
        self._line: str = task_runner.settings["data_loader"].settings["data_path"]

    def ping(self) -> None:
        """Ask the aggregator whether it is there."""
        self._client.ping()

    def run(self) -> None:
        """Train until the last round. Raises SystemExit where the federation ends otherwise."""
        from synthcube.tasks.federation_engines import Engine
        from synthcube.tasks.join import join

        def connecting(
            plan: FederationPlan, endpoint: object, site: str | None, patience_minutes: float
        ) -> AbstractContextManager[OpenFLClient]:
            return nullcontext(OpenFLClient(self._client, site, plan.sha256, patience_minutes))

        with _ending():
            choices = workspace.chosen(self._line)
            if not choices.data:
                raise FederationError(f"plan/data.yaml: {self._site} has no data, its images.")
            folder = join(
                Path(workspace.PLAN), Path(choices.data), _CERTIFICATES,
                _run(choices, self._site), site=self._site, overrides=choices.overrides,
                patience_minutes=choices.patience_minutes,
                engine=Engine(_nobody, connecting),
            )  # fmt: skip
        log.info("Trained model: %s", folder)


class OpenFLClient(RelayedClient):
    """Talks to the coordinator for one site, through `client`, which is OpenFL's.

    Other arguments as of :class:`synthcube.federation.client.Client`.
    """

    def __init__(self, client: Any, site: str | None, plan: str, patience_minutes: float) -> None:
        super().__init__(client.uri, None, site, plan, patience_minutes)
        self._client = client

    def _connection(self) -> http.client.HTTPConnection:
        return _Connection(self._reply_to)

    def _reply_to(self, request: bytes) -> bytes:
        name = uuid.uuid4().hex
        try:
            tensor = NamedTensor(name=name, data_bytes=request)
            self._client.send_local_task_results(0, name, 0, [tensor])
            reply = self._client.get_aggregated_tensor(name, 0, False, (), True)
        except grpc.RpcError as error:
            if error.code() in _CODES:
                self._client.reconnect()  # else gRPC waits for minutes before it tries again
                raise OSError(0, error.details()) from error
            raise FederationError(
                f"{self.address}: the aggregator refuses this site: {error.details()}"
            ) from error
        return bytes(reply.data_bytes)


class _Connection(http.client.HTTPConnection):
    """Sends a request as a whole, and reads the whole reply."""

    def __init__(self, reply_to: Callable[[bytes], bytes]) -> None:
        super().__init__("coordinator")
        self._reply_to = reply_to

    def connect(self) -> None:
        self.sock: Any = _Exchange(self._reply_to)


class _Exchange:
    """What a connection uses of a socket."""

    def __init__(self, reply_to: Callable[[bytes], bytes]) -> None:
        self._reply_to, self._request = reply_to, bytearray()

    def sendall(self, content: bytes) -> None:
        self._request += content

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._reply_to(bytes(self._request)))

    def close(self) -> None:
        """Nothing is open."""


def _nobody(*_: object) -> Any:
    """The half of an engine that a party does not use."""
    raise NotImplementedError


def _run(choices: workspace.Choices, party: str) -> Path:
    return Path(choices.run or f"save/{party}")


@contextmanager
def _ending() -> Iterator[None]:
    """End as the command line does at an error within this context, in place of a traceback."""
    try:
        yield
    except (SynthCubeError, PreemptedError) as error:
        log.error("%s", error)
        raise SystemExit(error.exit_code) from error


def _set_up() -> None:
    """As the command line does, before anything heavy is imported; and check the workspace."""
    environment.calm_threads()
    environment.delay_garbage_collection()
    environment.name_user()
    environment.open_log()
    environment.keep_caches_private()
    environment.ready_hub()
    with _ending():
        workspace.guard(Path())
