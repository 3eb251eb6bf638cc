"""Flower's processes: how they are started and ended, and how they talk to the one that started.

Of this package only `apps` and `nodes` import flwr, and both run in processes of their own. What
starts them need not import it, and they need not import PyTorch.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from synthcube import environment
from synthcube.errors import FederationError

log = logging.getLogger("synthcube")

VERSIONS = "flwr>=1.42,<1.43"
"""The guard wraps private functions of Flower, so other releases are refused."""
_INSTALL = "pip install --constraint constraints-flower.txt 'synthcube[flower]'"
_PATIENCE_S, _MOST_LINES = 10.0, 20
READY, OPEN = "synthcube: ready", "synthcube: open"
FOREIGN, SENT = "synthcube: foreign", "synthcube: sent"
"""Lines that the processes of `nodes` print."""
KEY = "key"
"""Name of the file with a site's key, in the folder that a SuperNode starts in."""
REFUSED = 21
"""Exit code of a SuperNode whose key the coordinator does not know."""


def require_flower() -> None:
    """Raise FederationError where Flower is missing, or of another release than 1.42."""
    try:
        version = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.split(".")[:2] != ["1", "42"]:
        there = f"and flwr {version} is installed" if version else "which is not installed"
        raise FederationError(
            f"--engine flower needs {VERSIONS} and Python 3.11 or newer, {there}. In an "
            f"environment of its own: {_INSTALL}"
        )


class Process:
    """A process of this interpreter's environment, which ends when this one does.

    It must end at the end of its standard input, which no kill of this process can prevent. The
    last lines that it and its children print are kept.

    Args:
        words: of its command line.
        scratch: private folder, in place of the user's folder of Flower.
        signs: lines that it prints to tell something.
        sockets: file numbers that it inherits.
    """

    def __init__(
        self, words: Sequence[object], scratch: Path, signs: Sequence[str] = (),
        sockets: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._started = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=scratch, env=environment.of_flower(scratch),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", pass_fds=tuple(sockets), start_new_session=True,
        )  # fmt: skip
        self._signs, self._seen = signs, queue.SimpleQueue[str]()
        self._last: deque[str] = deque(maxlen=_MOST_LINES)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._started.stdout
        for line in self._started.stdout:
            if (text := line.strip()) in self._signs:
                self._seen.put(text)
            elif text:
                self._last.append(text)
                log.debug("Flower: %s", text)

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._started.poll()

    @property
    def last_lines(self) -> list[str]:
        """What it and its children printed last."""
        return [*self._last]

    def sign(self) -> str:
        """The next line that tells something; empty if there is none now."""
        with suppress(queue.Empty):
            return self._seen.get_nowait()
        return ""

    def await_sign(self, sign: str) -> bool:
        """Wait for a line; whether it came before the process ended."""
        while self.code is None:
            with suppress(queue.Empty):
                if self._seen.get(timeout=0.1) == sign:
                    return True
        return False

    def tell(self, line: str) -> None:
        """Write a line to its standard input."""
        assert self._started.stdin
        with suppress(OSError):
            self._started.stdin.write(f"{line}\n")
            self._started.stdin.flush()

    def end(self) -> None:
        """End it, and wait until it is gone."""
        assert self._started.stdin
        with suppress(OSError):
            self._started.stdin.close()
        try:
            self._started.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._started.kill()
            self._started.wait()


def output(words: Sequence[object], scratch: Path) -> str:
    """What a command of Flower prints. Raises FederationError if it fails."""
    result = subprocess.run(
        [*map(str, words)], cwd=scratch, env=environment.of_flower(scratch),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    if result.returncode:
        lines = (result.stdout + result.stderr).split("\n")
        name = " ".join(["flwr", *map(str, words[1:3])])
        raise FederationError(f"Flower's command {name} failed:", lines[-_MOST_LINES:])
    return result.stdout


def listening(scratch: Path) -> Listener:
    """Listens to Flower's apps on this machine, in a folder of this user alone."""
    path = environment.of_flower(scratch)[environment.FLOWER_SOCKET]
    try:
        return Listener(path, "AF_UNIX")
    except OSError as error:  # Linux takes 107 characters
        raise FederationError(
            f"{path}: Flower's processes cannot meet there ({error.strerror or error}); TMPDIR "
            "must name a folder with a shorter path."
        ) from error


def send(connection: Connection, header: Mapping[str, Any], content: bytes = b"") -> None:
    """Send a message to another process of this user: what it is, and bytes as they are."""
    connection.send_bytes(json.dumps(header).encode())
    connection.send_bytes(content)


def receive(connection: Connection) -> tuple[dict[str, Any], bytes]:
    """A message of :func:`send`; raises EOFError at the end."""
    return json.loads(connection.recv_bytes()), connection.recv_bytes()
