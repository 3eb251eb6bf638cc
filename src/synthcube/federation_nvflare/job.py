"""The job that carries the messages of a federation: constant data, so that a site can compare it.

It names two classes of the installed package, and holds no code. What it carries is opaque to it:
at both ends it meets a process of SynthCube at a socket in the folder of the startup kit.
"""

from __future__ import annotations

import io
import json
import os
import socket
import socketserver
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from synthcube import storage

VERSION = "2.9."
"""The guard replaces private parts of NVFLARE, so other releases are refused."""
SITE_RELAY, SERVER_RELAY, GUARD = (
    f"synthcube.federation_nvflare.relays.{name}"
    for name in ("SiteRelay", "ServerRelay", "SiteGuard")
)
SOCKET = "synthcube.sock"
NOBODY = b"null\n"
"""In place of the name of a site: the job itself asks whether the federation is over."""
_SITE = {
    "format_version": 2,
    "executors": [{"tasks": ["none"], "executor": {"path": SITE_RELAY, "args": {}}}],
    "task_data_filters": [],
    "task_result_filters": [],
    "components": [],
}
_SERVER = {
    "format_version": 2,
    "workflows": [{"id": "relay", "path": SERVER_RELAY, "args": {}}],
    "task_data_filters": [],
    "task_result_filters": [],
    "components": [],
}
_SITE_FILE, _SERVER_FILE = (f"config/config_fed_{name}.json" for name in ("client", "server"))
_SIGNATURES = {  # of whoever submits, in each folder; NVFLARE checks them
    f"{folder}.__nvfl_{name}"
    for folder in ("", "config/")
    for name in ("sig.json", "submitter.crt")
}
_LARGEST = 1 << 20


def write_job(folder: Path, sites: Sequence[str]) -> Path:
    """Write the folder that `nvflare job submit` takes; it starts once all sites are there."""
    job = storage.make_folder(folder / "nvflare-job")
    meta = {
        "name": "synthcube", "resource_spec": {}, "min_clients": len(sites),
        "deploy_map": {"server": ["server"], "site": [*sites]},
    }  # fmt: skip
    for name, values in (
        ("meta.json", meta),
        (f"server/{_SERVER_FILE}", _SERVER),
        (f"site/{_SITE_FILE}", _SITE),
    ):
        storage.make_folder((job / name).parent)
        storage.write_json(job / name, values)
    return job


def is_ours(archive: bytes) -> bool:
    """Whether what a site should run is the app of this version of SynthCube, and nothing else."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            files = [entry for entry in opened.infolist() if not entry.is_dir()]
            names = [entry.filename for entry in files]
            if {*names} - _SIGNATURES != {_SITE_FILE} or len({*names}) < len(names):
                return False
            if any(entry.file_size > _LARGEST for entry in files):
                return False
            return bool(json.loads(opened.read(_SITE_FILE)) == _SITE)
    except (ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return False


class Server(socketserver.ThreadingUnixStreamServer):
    """Listens in the folder of a kit, for this user alone, in place of whoever did before."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, kit: Path, handler: type[socketserver.BaseRequestHandler]) -> None:
        path = kit / SOCKET
        path.unlink(missing_ok=True)
        with _short_path(kit) as name:
            super().__init__(name, handler)
        path.chmod(0o600)


def connected(kit: Path) -> socket.socket:
    """A connection to whoever listens in the folder of a kit. Raises OSError if nobody does."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _short_path(kit) as name:
            connection.connect(name)
    except OSError:
        connection.close()
        raise
    return connection


@contextmanager
def _short_path(kit: Path) -> Iterator[str]:
    """A name of the socket that is short, as names of sockets must be."""
    folder = os.open(kit, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{SOCKET}"
    finally:
        os.close(folder)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side has ended."""
    with connection.makefile("rb") as file:
        return file.read()
