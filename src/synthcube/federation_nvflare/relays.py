"""What NVFLARE's processes build of this package: they hand bytes on, and refuse all other jobs.

They import neither PyTorch nor what trains, and know nothing of a site but the folder of its
startup kit. What the bytes mean, and whether they are accepted, is decided elsewhere.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from contextlib import suppress
from pathlib import Path

import nvflare
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.core_cell import ReturnCode as CellReturnCode
from nvflare.fuel.f3.cellnet.core_cell import make_reply as make_cell_reply
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.message import Message
from nvflare.private.admin_defs import Message as Command
from nvflare.private.admin_defs import error_reply
from nvflare.private.defs import CellMessageHeaderKeys
from nvflare.private.fed.client import scheduler_cmds, training_cmds
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

from synthcube import environment
from synthcube.federation_nvflare import job

_CHANNEL, _TOPIC = "synthcube", "message"
_TIMEOUT_S = 300.0  # the coordinator checks all of an update before it replies
_POLL_S = 1.0


class SiteGuard(FLComponent):  # type: ignore[misc]
    """Limits the NVFLARE client of a site to the app of SynthCube; the site's resources name it.

    As it comes, a site does what the server asks and says is authorized. Here it deploys no other
    app, and does nothing that our job does not need: no shell command, no report of the machine.

    Raises RuntimeError for another release of NVFLARE.
    """

    def __init__(self) -> None:
        super().__init__()
        if not nvflare.__version__.startswith(job.VERSION):
            raise RuntimeError(f"SynthCube needs NVFLARE {job.VERSION}*, not {nvflare.__version__}")
        ClientRequestProcessors.request_processors[:] = [
            _OurApp(),
            scheduler_cmds.CheckResourceProcessor(),
            scheduler_cmds.CancelResourceProcessor(),
            scheduler_cmds.StartJobProcessor(),
            training_cmds.AbortAppProcessor(),
            training_cmds.ClientStatusProcessor(),
            training_cmds.NotifyJobStatusProcessor(),
        ]

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Tell the processes of jobs that this client is guarded."""
        if event_type == EventType.SYSTEM_START:
            environment.mark_guarded()


class _OurApp(training_cmds.DeployProcessor):  # type: ignore[misc]
    def process(self, req: Command, app_ctx: object) -> Command:
        if not isinstance(req.body, bytes) or not job.is_ours(req.body):
            training_cmds.logger.error("A job that is not of SynthCube is refused.")
            return error_reply("This site runs the job of SynthCube alone.")
        return super().process(req, app_ctx)


class SiteRelay(Executor):  # type: ignore[misc]
    """Hands what the process with the images sends to the server of the job, and the reply back."""

    def __init__(self) -> None:
        super().__init__()
        self._listens = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Listen from the start of the job. Raises RuntimeError at a site that is not guarded."""
        if event_type != EventType.START_RUN or self._listens:
            return
        if not environment.is_guarded():
            raise RuntimeError("This site is not guarded: run `synthcube federate guard`.")
        engine = fl_ctx.get_engine()
        cell, target = engine.get_cell(), FQCN.join([FQCN.ROOT_SERVER, fl_ctx.get_job_id()])

        class Handler(socketserver.BaseRequestHandler):
            request: socket.socket

            def handle(self) -> None:
                """Who gets no reply asks again."""
                with suppress(OSError):
                    message = Message(payload=job.read_all(self.request))
                    reply = cell.send_request(
                        channel=_CHANNEL, topic=_TOPIC, target=target, request=message,
                        timeout=_TIMEOUT_S, optional=True,
                    )  # fmt: skip
                    if reply.get_header(MessageHeaderKey.RETURN_CODE) == CellReturnCode.OK:
                        self.request.sendall(_content(reply) or b"")

        server = job.Server(Path(engine.get_workspace().get_root_dir()), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._listens = True

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Refuse: there are no tasks."""
        return make_reply(ReturnCode.TASK_UNKNOWN)


class ServerRelay(Controller):  # type: ignore[misc]
    """Hands what comes from a site to `synthcube federate serve`, with the name of the site.

    The name is that of a token which NVFLARE's server has signed, and checks in every message.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kit = Path()

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Take messages of sites from now on."""
        engine = fl_ctx.get_engine()
        self._kit = Path(engine.get_workspace().get_root_dir())
        engine.get_cell().register_request_cb(channel=_CHANNEL, topic=_TOPIC, cb=self._relay)

    def _relay(self, request: Message) -> Message:
        name, content = request.get_header(CellMessageHeaderKeys.CLIENT_NAME), _content(request)
        if content is None:
            return make_cell_reply(CellReturnCode.INVALID_REQUEST)
        try:
            with job.connected(self._kit) as coordinator:
                coordinator.sendall(json.dumps(name).encode() + b"\n")
                coordinator.sendall(content)
                coordinator.shutdown(socket.SHUT_WR)
                return make_cell_reply(CellReturnCode.OK, body=job.read_all(coordinator))
        except OSError:
            return make_cell_reply(CellReturnCode.SERVICE_UNAVAILABLE)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Wait until the coordinator says that the federation is over; a killed one does not."""
        while not abort_signal.triggered:
            with suppress(OSError), job.connected(self._kit) as coordinator:
                coordinator.sendall(job.NOBODY)
                if _is_over(coordinator, abort_signal):
                    return
            time.sleep(_POLL_S)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is to be done."""


def _is_over(coordinator: socket.socket, abort_signal: Signal) -> bool:
    coordinator.settimeout(_POLL_S)
    while not abort_signal.triggered:
        with suppress(TimeoutError):
            return bool(coordinator.recv(1))
    return True


def _content(message: Message) -> bytes | None:
    """The bytes in a message of NVFLARE; None if it has something else in it."""
    payload = message.payload
    return bytes(payload) if isinstance(payload, (bytes, bytearray, memoryview)) else None
