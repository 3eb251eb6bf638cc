"""The coordinator on NVFLARE: our own service, at a socket that the job in its server connects to.

Which site a message is from, NVFLARE's server has checked; the job tells it before the message.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from synthcube.errors import FederationError
from synthcube.federation.coordinator import Coordinator
from synthcube.federation.server import RelayedHandler
from synthcube.federation_nvflare import job

log = logging.getLogger("synthcube")

_LONGEST_NAME = 1 << 10
_POLL_S = 0.1


@contextmanager
def served(coordinator: Coordinator, kit: Path) -> Iterator[None]:
    """Serve a coordinator in the folder of a guarded startup kit within this context.

    Raises FederationError where another one is served there.
    """
    with suppress(OSError):
        job.connected(kit).close()
        raise FederationError(f"--certificates {kit}: another coordinator is served there.")
    folder = job.write_job(coordinator.folder, coordinator.plan.sites)
    with _Server(kit, coordinator) as server:
        thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), daemon=True)
        thread.start()
        log.info("Serving NVFLARE in %s. Once all sites are connected: nvflare job submit -j %s",
                 kit, folder)  # fmt: skip
        try:
            yield
            server.is_over = True
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


class _Server(job.Server):
    admin = ""  # nobody may ask for the status
    daemon_threads, block_on_close = False, True  # the job must hear that it is over

    def __init__(self, kit: Path, coordinator: Coordinator) -> None:
        self.coordinator, self.is_over, self.ended = coordinator, False, threading.Event()
        self.on_their_way: dict[str, tuple[int, str, int]] = {}
        super().__init__(kit, _Handler)


class _Handler(RelayedHandler):
    def handle(self) -> None:
        line = self.rfile.readline(_LONGEST_NAME)
        if line == job.NOBODY:
            self.server.ended.wait()
            if self.server.is_over:
                self.wfile.write(b"1")
        elif line:
            self.name = str(json.loads(line))
            super().handle()
