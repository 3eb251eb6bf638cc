"""The coordinator on NVFLARE: our own service, at a socket that the job in its server connects to.

Which site a message is from, NVFLARE's server has checked; the job tells it before the message.
"""

from __future__ import annotations

import json
import logging
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from synthcube.errors import FederationError
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.messages import RefusalError
from synthcube.federation.server import Handler
from synthcube.federation_nvflare import job

log = logging.getLogger("synthcube")

_LONGEST_NAME = 1 << 10
_POLL_S = 0.1


@contextmanager
def served(coordinator: Coordinator, kit: Path) -> Iterator[None]:
    """Serve a coordinator in the folder of a guarded startup kit within this context.

    Raises:
        FederationError: another coordinator is served there.
    """
    path = kit / job.SOCKET
    with suppress(OSError):
        job.connected(kit).close()
        raise FederationError(f"--certificates {kit}: another coordinator is served there.")
    path.unlink(missing_ok=True)
    folder = job.write_job(coordinator.folder, coordinator.plan.sites)
    with job.socket_path(kit) as name, _Server(name, coordinator) as server:
        path.chmod(0o600)
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), daemon=True)
        thread.start()
        log.info("Serving NVFLARE in %s. Once all sites are connected: nvflare job submit -j %s",
                 kit, folder)  # fmt: skip
        try:
            yield
            server.is_over = True
        finally:
            path.unlink(missing_ok=True)
            server.shutdown()
            server.ended.set()
            thread.join()


class _Server(socketserver.ThreadingUnixStreamServer):
    admin = ""  # nobody may ask for the status

    def __init__(self, path: str, coordinator: Coordinator) -> None:
        self.coordinator, self.is_over, self.ended = coordinator, False, threading.Event()
        super().__init__(path, _Handler)


class _Handler(Handler):
    def handle(self) -> None:
        line = self.rfile.readline(_LONGEST_NAME)
        self._name = json.loads(line)
        if line != job.NOBODY:
            super().handle()
            return
        self.server.ended.wait()
        if self.server.is_over:
            self.wfile.write(b"1")

    def label(self) -> str:
        """The name that NVFLARE knows the site by, which must be that in the plan."""
        if self._name not in self.server.coordinator.plan.sites:
            log.warning("A site that is not in the plan is refused.")
            raise RefusalError("site", f"{self._name} is no site of the plan")
        return str(self._name)
