"""Flower's two services, as `python -m synthcube.federation_flower.nodes superlink | supernode`.

Flower 1.42 trusts whoever reaches it: its control interface starts any app for anybody, and a site
runs whatever bundle it is sent. Here the network reaches nothing of a SuperLink but what sites
need, and a SuperNode runs our bundle alone. Both end with their standard input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from synthcube.federation_flower import bundle
from synthcube.federation_flower.processes import FOREIGN, KEY, OPEN, READY, REFUSED, SENT

# Modules that are hidden by functions of their name.
flower_superlink = importlib.import_module("flwr.superlink.cli.flower_superlink")
start_client_internal: Any = importlib.import_module("flwr.supernode.start_client_internal")

Asgi = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

_FLEET = "/v1/fleet/"


# The coordinator


def superlink(inner: int, outer: int, certificate: str, key: str) -> None:
    """Serve all of Flower on a socket of this machine, and the sites on the other, over TLS.

    It prints READY once this machine is served, reads a line, opens to the sites, prints OPEN, and
    ends with its standard input.

    Args:
        inner, outer: numbers of bound sockets.
    """
    local, public = socket.socket(fileno=inner), socket.socket(fileno=outer)
    port = str(local.getsockname()[1])
    sys.argv[1:] = ["--insecure", "--host", "127.0.0.1", "--port", port,
                    "--disable-runtime-dependency-installation"]  # fmt: skip
    # Authentication cannot be asked for without TLS, which is on the other socket here.
    config = dataclasses.replace(
        flower_superlink._parse_superlink_lifespan_config(), enable_supernode_auth=True
    )
    _welcome_back()
    app = create_app(config, flower_superlink.SuperLinkLifespan)
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False}
    for_all = uvicorn.Config(app, **quiet)
    for_sites = uvicorn.Config(
        _only_sites(app), lifespan="off", ssl_certfile=certificate, ssl_keyfile=key,
        proxy_headers=False, **quiet,
    )  # fmt: skip
    asyncio.run(_serve(((uvicorn.Server(for_all), local), (uvicorn.Server(for_sites), public))))


async def _serve(servers: tuple[tuple[uvicorn.Server, socket.socket], ...]) -> None:
    loop, tasks = asyncio.get_running_loop(), []
    for (server, listening), word in zip(servers, (READY, OPEN), strict=True):
        tasks.append(asyncio.create_task(server.serve(sockets=[listening])))
        while not server.started:
            if tasks[-1].done():
                os._exit(1)
            await asyncio.sleep(0.05)
        print(word, flush=True)
        if not await loop.run_in_executor(None, sys.stdin.readline):
            break
    _end()


def _only_sites(app: Asgi) -> Asgi:
    """Of an app only what the sites need: the rest would let anybody run code here."""

    async def served(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith(_FLEET):
            await app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    return served


def _welcome_back() -> None:
    """Let a site in again at once after a kill; Flower would refuse it for a minute.

    So Flower refuses only keys that it does not know.
    """
    activate = fleet_handlers.activate_node

    def activated(request: Any, state: Any) -> Any:
        node = state.get_node_id_by_public_key(request.public_key)
        if node is not None:
            state.deactivate_node(node)
        return activate(request, state)

    fleet_handlers.activate_node = activated


# A site


class _ForeignBundleError(Exception):
    pass


def supernode(*words: str) -> None:
    """Run a SuperNode with these words, which runs our bundle alone."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    start_client_internal._pull_and_store_message = _guarded(
        start_client_internal._pull_and_store_message
    )
    start_client_internal._push_messages = _reported(start_client_internal._push_messages)
    _end_if_refused()
    sys.argv[1:] = words
    try:
        flower_supernode()
    finally:
        # Flower's threads would keep a process that does nothing any more.
        os._exit(1)


def _end_with_input() -> None:
    sys.stdin.read()
    Path(KEY).unlink(missing_ok=True)  # else it would stay after a kill
    _end()


def _guarded(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """A step of a SuperNode that refuses a foreign bundle, and stays online for ours."""

    def guarded(
        *, receive: Any, get_run: Any, get_fab: Any, state: Any, object_store: Any, **others: Any
    ) -> int | None:  # fmt: skip
        message: Message | None = None

        def received() -> Any:
            nonlocal message
            if (content := receive()) is not None:
                message = content[0]
            return content

        def run(*arguments: Any) -> Run:
            run: Run = get_run(*arguments)
            if run.primary_task_type == TaskType.AGENT_APP:
                raise _ForeignBundleError
            return run

        def ours(*arguments: Any) -> Fab:
            fab: Fab = get_fab(*arguments)
            if not bundle.is_ours(fab.content):
                raise _ForeignBundleError
            return fab

        try:
            return pull(receive=received, get_run=run, get_fab=ours, state=state,
                        object_store=object_store, **others)  # fmt: skip
        except _ForeignBundleError:
            assert message
            print(FOREIGN, flush=True)
            error = Error(ErrorCode.INVALID_FAB, "This site runs the bundle of SynthCube alone.")
            reply = Message(error, reply_to=message)
            start_client_internal._insert_message(reply, state, object_store)
            return int(message.metadata.run_id)

    return guarded


def _reported(push: Callable[..., None]) -> Callable[..., None]:
    """A step of a SuperNode that tells when a reply is at the coordinator."""

    def reported(**arguments: Any) -> None:
        push(**arguments)
        print(SENT, flush=True)

    return reported


def _end_if_refused() -> None:
    """End with REFUSED where the coordinator does not know the key of this site."""
    activate = FleetHttpClient.ActivateNode

    def activated(client: FleetHttpClient, request: Any) -> Any:
        try:
            return activate(client, request)
        except Exception as error:
            if getattr(getattr(error, "response", None), "is_client_error", False):
                os._exit(REFUSED)
            raise

    FleetHttpClient.ActivateNode = activated


def _end() -> NoReturn:
    """End at once with all children, which do not hear of it while they start."""
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            with suppress(OSError):
                os.kill(int(child), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "superlink":
        superlink(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6])
    else:
        supernode(*sys.argv[2:])
