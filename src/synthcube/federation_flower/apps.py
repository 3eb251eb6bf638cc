"""The two apps that Flower runs: each only hands bytes on to the process that started Flower.

So neither imports PyTorch for a message, and nothing of a site's data or errors is in a process
that Flower reads from. What the bytes mean, and whether they are accepted, is decided elsewhere.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Client, Connection

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from synthcube import environment
from synthcube.federation_flower.processes import receive, send

server = ServerApp()
client = ClientApp()

_CONTENT = "content"
_POLL_S, _NODES_S = 0.5, 2.0
_LIFETIME_S = 30 * 24 * 3600.0  # of a message and its reply: a round may take days
_UNANSWERED = 0  # "unknown" among Flower's codes


@client.query()  # type: ignore[untyped-decorator]
def answer(message: Message, context: Context) -> Message:
    """Hand a message to the site, and reply with what it answers."""
    _end_with_parent()
    try:
        with Client(environment.flower_socket(), "AF_UNIX") as site:
            site.send_bytes(_bytes(message))
            return Message(_record(site.recv_bytes()), reply_to=message)
    except Exception:
        # Flower would send the text of an exception to the coordinator.
        return Message(Error(_UNANSWERED, "The site did not answer."), reply_to=message)


@server.main()  # type: ignore[untyped-decorator]
def relay(grid: Grid, context: Context) -> None:
    """Send what the coordinator hands over, and hand it the replies, until it hangs up."""
    _end_with_parent()
    pending: set[str] = set()
    shown = -_NODES_S
    with (
        Client(environment.flower_socket(), "AF_UNIX") as coordinator,
        suppress(EOFError, BrokenPipeError, ConnectionResetError),
    ):
        while True:
            _send_all(grid, coordinator, pending)
            if time.monotonic() - shown >= _NODES_S:
                shown = time.monotonic()
                nodes = [[node.node_id, node.last_activated_at, node.public_key.decode()]
                         for node in grid.get_nodes()]  # fmt: skip
                send(coordinator, {"nodes": nodes})
            _collect(grid, coordinator, pending)


def _end_with_parent() -> None:
    """End this process with the one that started it, whatever it does then."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _send_all(grid: Grid, coordinator: Connection, pending: set[str]) -> None:
    wait_s = _POLL_S
    while coordinator.poll(wait_s):
        header, content = receive(coordinator)
        node = int(header["node"])
        message = Message(_record(content), node, "query", ttl=_LIFETIME_S, group_id="")
        number = next(iter(grid.push_messages([message])), None)
        send(coordinator, {"sent": number or "", "to": node})
        if number:
            pending.add(number)
        wait_s = 0.0


def _collect(grid: Grid, coordinator: Connection, pending: set[str]) -> None:
    for number in sorted(pending):  # one by one: each may be as large as a model
        for reply in grid.pull_messages([number]):
            pending.discard(number)
            fault = reply.error.code if reply.has_error() else None
            content = b"" if reply.has_error() else _bytes(reply)
            send(coordinator, {"reply": number, "fault": fault}, content)


def _record(content: bytes) -> RecordDict:
    """As an array, which Flower sends in pieces of 5 MB; it is never read as one."""
    array = Array("uint8", (len(content),), "bytes", content)
    return RecordDict({_CONTENT: ArrayRecord({_CONTENT: array})})


def _bytes(message: Message) -> bytes:
    records = message.content.array_records
    return records[_CONTENT][_CONTENT].data if _CONTENT in records else b""
