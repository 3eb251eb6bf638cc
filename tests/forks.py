"""Commands, and processes that train together, in forks of the tests' own process.

That has imported torch, Lightning and MONAI, which a new process takes five seconds for. What a
start itself must do (imports, launchers, signals, an empty environment) is tested in processes
that are really started.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import multiprocessing
import os
import pty
import runpy
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

LIMIT_S = 240
_GRACE_S = 20
_FORK = multiprocessing.get_context("fork")


class Fork:
    """That work in a copy of this process, in `cwd`, with these changes of the environment."""

    def __init__(
        self, work: Callable[[], object], environment: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        _import_all()
        self._files = [tempfile.TemporaryFile("w+", encoding="utf-8") for _ in "oe"]  # noqa: SIM115

        def child() -> None:
            _as_if_started([file.fileno() for file in self._files])
            os.environ.update(environment)
            os.chdir(cwd or Path.cwd())
            try:
                work()
            finally:
                atexit._run_exitfuncs()

        self.process = _FORK.Process(target=child)
        with warnings.catch_warnings():  # newer Pythons fear for threads, of which we use none
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()

    def ended(self, limit_s: float = LIMIT_S) -> CompletedProcess[str]:
        """Exit code, output and errors; a process that is not done by then is killed."""
        self.process.join(limit_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        assert self.process.exitcode is not None
        return CompletedProcess((), self.process.exitcode, *texts)


def command(*words: object, cwd: Path | None = None, **environment: str) -> CompletedProcess[str]:
    """`synthcube` with these words, ended.

    In a process that is really started where this one has used OpenVINO: the threads of its engine
    are not in a fork, which waits for them for ever.
    """
    if "openvino" in sys.modules:
        return subprocess.run(
            [sys.executable, "-m", "synthcube", *map(str, words)],
            cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
            timeout=LIMIT_S,
        )  # fmt: skip
    return _command(words, cwd, environment).ended()


def watched(*words: object, ctrl_c_at: str = "", **environment: str) -> tuple[int, str]:
    """`synthcube` with these words on a terminal of 100 columns.

    Args:
        ctrl_c_at: Ctrl-C is pressed as soon as this text appears.

    Returns:
        The exit code, and all that it wrote, control characters included.
    """
    from synthcube.__main__ import main

    def run() -> None:
        sys.argv = ["synthcube", *map(str, words)]
        main()

    return on_terminal(run, ctrl_c_at, **environment)


def on_terminal(
    work: Callable[[], object], ctrl_c_at: str = "", **environment: str
) -> tuple[int, str]:
    """The same of that work."""
    _import_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid, screen = pty.fork()
    if not pid:
        code = 1
        try:
            _as_if_started([1, 2])
            os.environ.update({"TERM": "xterm-256color", "NO_COLOR": "", **environment})
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    written, end = b"", time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        try:
            written += os.read(screen, 4096)
        except OSError:  # the other end is closed
            break
        if ctrl_c_at and ctrl_c_at.encode() in written:
            os.write(screen, b"\x03")
            ctrl_c_at = ""
    os.close(screen)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


def commands_together(words: Sequence[object], processes: int = 2) -> list[CompletedProcess[str]]:
    """`synthcube` with these words in every process, as torchrun starts them; each, ended."""
    places = [{**place, "RANK": place["LOCAL_RANK"]} for place in _places(processes)]
    return _all_ended([_command(words, None, place) for place in places])


def script_together(path: Path, *words: object, processes: int = 2, **environment: str) -> str:
    """That script with these words in every process, as Lightning starts them.

    Returns:
        What all of them wrote on standard error; none may fail.
    """

    def run() -> None:
        sys.argv = [str(path), *map(str, words)]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    ended = _all_ended([Fork(run, {**environment, **place}) for place in _places(processes)])
    said = "".join(fork.stderr for fork in ended)
    assert [fork.returncode for fork in ended] == [0] * processes, said
    return said


def _command(words: Sequence[object], cwd: Path | None, environment: Mapping[str, str]) -> Fork:
    from synthcube.cli import main

    def run() -> None:
        sys.argv = ["synthcube", *map(str, words)]
        main()

    return Fork(run, environment, cwd)


def _places(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each process; nothing where there is one."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0",
              "WORLD_SIZE": str(processes)}  # fmt: skip
    return [{**common, "LOCAL_RANK": str(i)} for i in range(processes)]


def _all_ended(forks: list[Fork]) -> list[CompletedProcess[str]]:
    """The others wait in vain for one that has failed: they get a little while."""
    end = time.monotonic() + LIMIT_S
    while any(fork.process.is_alive() for fork in forks) and time.monotonic() < end:
        if any(fork.process.exitcode for fork in forks):
            end = min(end, time.monotonic() + _GRACE_S)
        time.sleep(0.02)
    return [fork.ended(limit_s=0) for fork in forks]


def _import_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import synthcube.tasks.evaluate
        import synthcube.tasks.export
        import synthcube.tasks.infer
        import synthcube.tasks.train  # noqa: F401


def _as_if_started(files: Sequence[int]) -> None:
    """Undo what pytest has done to this process: its streams, its filters of warnings."""
    gc.freeze()  # a search for garbage would copy the memory that is shared with pytest
    atexit._clear()
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
    # Not in the encoding of the locale, which libraries change.
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
