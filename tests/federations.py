"""Federations of real processes, on any engine, and the bits that they must come to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import synthcube
from synthcube.data.phantom import write_phantoms
from synthcube.tasks.federate import simulate
from synthcube.tasks.federation_plan import write_plan

EXACT = ["compute.deterministic=true", "compute.accelerator=cpu", "compute.precision='32'"]
SHARED = ["training.ema={decay: 0.9}", "training.sample_every_n_epochs=0"]
SECRET = "Erika-Mustermann"
LIMIT_S = 400.0


class Command:
    """A command that runs."""

    def __init__(self, words: Sequence[object], environment: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*map(str, words)], env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def close(self) -> None:
        self._output.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL

    def ended(self) -> int:
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end:\n{self.output}") from None


class Processes:
    """Commands whose every process is found by its TMPDIR.

    Args:
        folder: of the federation: plan.json, and the folders of its parties.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        self.environment = {
            **os.environ, "TMPDIR": str(scratch), "HOME": str(scratch), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(synthcube.__file__).parents[1]),
        }  # fmt: skip
        self.commands: list[Command] = []

    def start(self, *words: object) -> Command:
        self.commands.append(Command(words, self.environment))
        return self.commands[-1]

    def running(self) -> dict[int, str]:
        """Numbers and commands of all that were started here, by the kernel's word."""
        mark = f"TMPDIR={self.scratch}".encode()
        return {
            number: _read(number, "cmdline").replace(b"\0", b" ").decode()
            for number in (int(path.name) for path in Path("/proc").glob("[0-9]*"))
            if mark in _read(number, "environ").split(b"\0")
        }

    def end(self) -> dict[int, str]:
        """End what still runs; returns what the commands have left behind."""
        for command in self.commands:
            command.process.terminate()
            command.process.wait(60)
            command.close()
        end = time.monotonic() + 60
        while (left := self.running()) and time.monotonic() < end:
            time.sleep(0.2)
        for number in left:
            os.kill(number, signal.SIGKILL)
        return left

    def simulated(self, config: Path, **options: Any) -> list[Path]:
        """Lists of images of the two sites of a simulation, which runs here; writes the plan."""
        data = write_phantoms(self.folder / SECRET, num=12, size=(16, 16)).parent
        simulate(config, data, self.folder / "simulated", sites=2, num_rounds=2, minimum_sites=2,
                 overrides=[*EXACT, *SHARED], **options)  # fmt: skip
        write_plan(config, self.folder / "plan.json", sites=["site-1", "site-2"], num_rounds=2,
                   overrides=SHARED, **options)  # fmt: skip
        return [self.folder / "simulated" / "sites" / f"site-{n}" / "data.csv" for n in (1, 2)]

    def assert_simulated_weights(self, *names: str) -> None:
        expected = load_file(self.folder / "simulated" / "artifact" / "weights.safetensors")
        for name in names:
            weights = load_file(self.folder / name / "artifact" / "weights.safetensors")
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[key], value) for key, value in expected.items()), name


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Processes that must be gone at the end."""
    scratch = Path(tempfile.mkdtemp(prefix="fl"))  # short, as paths of sockets must be
    started = Processes(folder, scratch)
    try:
        yield started
    finally:
        left = started.end()
        shutil.rmtree(scratch, ignore_errors=True)
    assert not left


def until(is_over: Callable[[], object], *commands: Command) -> None:
    end = time.monotonic() + LIMIT_S
    while not is_over():
        texts = [command.output for command in commands]
        assert all(command.process.poll() is None for command in commands), texts
        assert time.monotonic() < end, texts
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _read(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return b""
