"""A site on NVFLARE: it asks as on our own network, through the job that runs in its client."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

from synthcube.federation.client import RelayedClient
from synthcube.federation_nvflare import job, kit


class RelayClient(RelayedClient):
    """Talks to the coordinator for one site, through the NVFLARE client of its startup kit.

    Args:
        folder: of the startup kit.
        Others as of :class:`synthcube.federation.client.Client`.

    Raises:
        FederationError: it is no kit of a site, or not guarded.
    """

    def __init__(
        self, folder: Path, site: str | None, plan: str, patience_minutes: float
    ) -> None:  # fmt: skip
        kit.require_guarded(folder, "site")
        super().__init__(kit.server_address(folder), None, site, plan, patience_minutes)
        self._folder = folder

    def _connection(self) -> http.client.HTTPConnection:
        return _Connection(self._folder)


class _Connection(http.client.HTTPConnection):
    """To the job of NVFLARE at this site, which reads a message until its end."""

    def __init__(self, folder: Path) -> None:
        super().__init__("coordinator")
        self._folder = folder

    def connect(self) -> None:
        try:
            self.sock = job.connected(self._folder)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise OSError(error.errno, "NVFLARE does not run the job of SynthCube here") from error

    def getresponse(self) -> http.client.HTTPResponse:
        self.sock.shutdown(socket.SHUT_WR)
        return super().getresponse()
