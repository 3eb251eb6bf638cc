"""Signals at any moment of a command: they end it in good order, and are no fault of any file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube import interruption
from synthcube.cli import main
from synthcube.errors import PreemptedError
from synthcube.tasks.train import train
from synthcube.training.preemption import Preemption

LIMIT_S = 20
MORE = ["training.batch_size=4", "training.max_epochs=3"]
# What is done with files: a signal comes with one of them.
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree"}

# -- while a command starts --------------------------------------------------------------------

START = """
import os, runpy, sys
number, module, *words = sys.argv[1:]
class Signals:
    def find_spec(self, name, path, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Signals())
sys.argv = ["synthcube", *words]
runpy.run_module("synthcube", run_name="__main__", alter_sys=True)
"""


def started(number: signal.Signals, module: str, *words: object) -> subprocess.CompletedProcess:
    """The command, which gets the signal when it is about to import that module."""
    return subprocess.run(
        [sys.executable, "-c", START, str(int(number)), module, *map(str, words)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["synthcube.cli", "typer.main", "synthcube.tasks.describe"])
def test_ctrl_c_at_the_start_ends_every_command_quietly(module: str) -> None:
    done = started(signal.SIGINT, module, "families")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "stopped: Ctrl-C came while SynthCube was starting.\n"


@pytest.mark.parametrize(
    ("command", "module"),
    [("train", "torch"), ("infer", "torch"), ("check", "pydantic"), ("train", "numpy")],
)
def test_ctrl_c_while_heavy_libraries_are_imported(
    command: str, module: str, tmp_path: Path
) -> None:
    words = ["-m", tmp_path] if command == "infer" else ["-c", tmp_path, "-d", tmp_path]
    done = started(signal.SIGINT, module, command, *words, "-o", tmp_path / "out")
    if command == "check":  # has no output: a usage error would be 2
        done = started(signal.SIGINT, module, command, *words)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    "module",
    ["synthcube.cli", "torch", pytest.param("synthcube.training.fit", marks=pytest.mark.slow)],
)
def test_a_training_that_is_preempted_at_its_start_ends_with_75(
    number: signal.Signals, module: str, tmp_path: Path
) -> None:
    words = ["train", "-c", tmp_path, "-d", tmp_path, "-o", tmp_path / "out"]
    done = started(number, module, *words)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith(f"stopped: {number.name} came before the training began.")
    assert not (tmp_path / "out").exists()


def test_sigterm_ends_other_commands_as_it_ends_every_program() -> None:
    assert started(signal.SIGTERM, "typer", "families").returncode == -signal.SIGTERM


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As in the background of a script."""
    command = [sys.executable, "-c", START, "2", "typer", "--help"]
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Train, sample, judge" in done.stdout


# -- what may swallow it -----------------------------------------------------------------------


class Dropped:
    """Python drops what is raised while an object is removed."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


def remove_an_object() -> None:
    Dropped()
    time.sleep(5)


def read_with_a_library() -> None:
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    except BaseException as error:
        raise RuntimeError("PytorchStreamReader failed") from error


@pytest.mark.parametrize("work", [remove_an_object, read_with_a_library])
def test_a_signal_is_neither_lost_nor_taken_for_a_fault(work: Callable[[], None]) -> None:
    start = time.monotonic()
    with pytest.raises(PreemptedError, match=r"^SIGUSR1 came"):  # noqa: SIM117
        with Preemption(["SIGUSR1"]).listening():
            work()
    assert time.monotonic() - start < 4


def test_a_signal_that_was_swallowed_stops_the_training_before_it_begins() -> None:
    began = False
    with Preemption(["SIGUSR1"]).listening() as preemption:
        with contextlib.suppress(BaseException):  # as some libraries do
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(PreemptedError, match=r"^SIGUSR1 came"), preemption.deferred():
            began = True
    assert not began


# -- at any moment of a run that is resumed ----------------------------------------------------


def ended(work: Callable[[], object], errors: Path) -> int | None:
    """How a copy of this process ends that does that; None where it takes too long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except PreemptedError as stop:
            code = stop.exit_code
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            errors.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def at_file_operation(moment: int, act: Callable[[], object], folders: Sequence[Path]) -> list[str]:
    """From now on this process does that at its operation of that number in those folders.

    Returns:
        All of them, as they come.
    """
    seen: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(tuple(map(str, folders))):
            seen.append(f"{event} {arguments[:2]}")
            if len(seen) == moment:
                act()

    sys.addaudithook(watch)
    return seen


def test_ctrl_c_that_stops_no_training_in_good_order_ends_it_with_130(
    tiny_config, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is no stop signal, or is given twice; Lightning takes it, and would end with 1."""
    words = ["train", "-c", tiny_config(), "-d", phantoms, "-o", tmp_path / "run"]
    words += ["--set", "training.stop_signals=[SIGTERM]"]
    monkeypatch.setattr(sys, "argv", ["synthcube", *map(str, words)])

    def work() -> None:
        def watch(event: str, arguments: tuple[object, ...]) -> None:
            if event == "os.rename" and str(arguments[1]).endswith("last.ckpt"):
                os.kill(os.getpid(), signal.SIGINT)

        interruption.guard_start(sys.argv[1:])
        sys.addaudithook(watch)
        main()

    assert ended(work, tmp_path / "errors") == 130


class Resumed:
    """A run of two epochs, to be trained on to a third one, again and again from there."""

    def __init__(self, config: Path, data: Path, folder: Path) -> None:
        self.config, self.data, self.folder = config, data, folder
        train(config, data, folder / "begun", overrides=[*MORE, "training.max_epochs=2"])
        self.run = folder / "run"
        self.folders = (config, data, self.run, Path(os.environ["SYNTHCUBE_CACHE"]))
        shutil.copytree(folder / "begun", self.run)
        count = folder / "count"

        def counted() -> None:
            seen = at_file_operation(0, lambda: None, self.folders)
            self.again()
            count.write_text(str(len(seen)))

        shutil.rmtree(self.folders[-1])  # images are read, and preprocessed
        assert ended(counted, folder / "errors") == 0, (folder / "errors").read_text()
        self.operations = int(count.read_text())
        self.run.rename(folder / "straight")

    def again(self) -> None:
        train(self.config, self.data, self.run, overrides=MORE)

    def signalled(self, number: signal.Signals, moment: int) -> None:
        """Send a signal at that file operation, and go on with the same command."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.folder / "begun", self.run)
        shutil.rmtree(self.folders[-1])

        def work() -> None:
            interruption.guard_start(["train"])  # as the command does
            at_file_operation(moment, lambda: os.kill(os.getpid(), number), self.folders)
            self.again()

        errors = self.folder / "errors"
        errors.write_text("")
        code = ended(work, errors)
        assert code == 75, f"{number.name} at {moment} of {self.operations}: {errors.read_text()}"
        self.again()
        for name in ("last", "best"):
            a, b = (
                torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
                for run in (self.folder / "straight", self.run)
            )
            assert all(torch.equal(a[key], b[key]) for key in a), (number, moment)
        a, b = (
            load_file(run / "artifact" / "weights.safetensors")
            for run in (self.folder / "straight", self.run)
        )
        assert all(torch.equal(a[key], b[key]) for key in a), (number, moment)


@pytest.fixture
def resumed(tiny_config, phantoms: Path, tmp_path: Path) -> Resumed:
    return Resumed(tiny_config(), phantoms, tmp_path)


@pytest.mark.slow
def test_a_signal_at_any_moment_of_a_resumed_run_ends_with_75(resumed: Resumed) -> None:
    for place in range(4):
        number = (signal.SIGTERM, signal.SIGUSR1)[place % 2]
        resumed.signalled(number, 1 + place * (resumed.operations - 1) // 3)


@pytest.mark.slow
def test_a_signal_at_fifty_five_moments_of_a_resumed_run(resumed: Resumed) -> None:
    for place in range(55):
        number = (signal.SIGTERM, signal.SIGUSR1)[place % 2]
        resumed.signalled(number, 1 + place * (resumed.operations - 1) // 54)


# -- output that nobody reads ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["init"], ["families"]])
@pytest.mark.parametrize("stream", ["1", "1 and 2"])
def test_output_that_nobody_reads_ends_a_command_as_it_does_others(
    words: list[str], stream: str, tmp_path: Path
) -> None:
    """As `synthcube families | head -1`: nothing is said, and the code is that of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    with (tmp_path / "err").open("w") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "synthcube", *words], cwd=tmp_path,
            stdout=writer, stderr=errors if stream == "1" else writer,
        )  # fmt: skip
    os.close(writer)
    assert done.returncode == 141
    assert (tmp_path / "err").read_text() == ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_behind_the_output_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "synthcube", "families"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: standard output: No space left on device.\n"


def test_a_signal_just_before_work_that_can_be_dropped_waits_for_the_caller() -> None:
    preemption = Preemption(("SIGTERM",))
    with preemption.deferred():
        preemption.heard = "SIGTERM"
        with preemption.immediate():
            pass
        with pytest.raises(PreemptedError, match="SIGTERM came between steps"):
            preemption.stop_if_heard()
