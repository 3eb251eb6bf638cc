"""Series: trainings one after another, each in its own process, so that a crash ends only one."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from synthcube import config, environment
from synthcube.data.manifest import read_manifest
from synthcube.errors import ConfigError, PreemptedError, SynthCubeError, results_or_faults
from synthcube.storage import make_folder, require_separate

log = logging.getLogger("synthcube")

# Signals to the series are passed on to the training that is running.
_FORWARDED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one training of a series ended."""

    run: Path
    exit_code: int | None  # None: not started; below 0: ended by the signal of that number

    @property
    def text(self) -> str:
        if self.exit_code is None:
            return "not started"
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        texts = {
            0: "done",
            1: "a bug of SynthCube",
            SynthCubeError.exit_code: "failed",
            PreemptedError.exit_code: "stopped by a signal",
        }
        return texts.get(self.exit_code, f"ended with exit code {self.exit_code}")


@dataclass
class _Child:
    """The running training, and the signals that ended the series."""

    process: subprocess.Popen[bytes] | None = None
    received: list[int] = field(default_factory=list)


def train_series(
    config_paths: Sequence[Path],
    data_path: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
) -> list[Outcome]:
    """Train each config into the folder of its name in `out`; after a failure the next one starts.

    Raises SynthCubeError before the first start if an input is faulty.

    Args:
        options: further words of the command line, for every training.
    """
    runs = _runs(config_paths, out)
    results_or_faults(
        *(partial(_resolve, path, overrides) for path in config_paths),
        partial(read_manifest, data_path),
    )
    require_separate({"output_path": out}, {"data_path": data_path})
    make_folder(out, "output_path")
    words = [word for override in overrides for word in ("--set", override)]
    outcomes = []
    with _forwarding() as child:
        for number, (path, run) in enumerate(zip(config_paths, runs, strict=True), start=1):
            if child.received:
                outcomes.append(Outcome(run, None))
                continue
            log.info("Training %d of %d: %s into %s.", number, len(runs), path, run)
            command = ["-m", "synthcube", "train", "-c", path, "-d", data_path, "-o", run]
            outcomes.append(Outcome(run, _run(child, [*command, *options, *words])))
    return outcomes


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """The exit code of a series: of a preemption if a signal ended it, so that a queue starts it
    again; 1 if a training was killed or crashed; else the highest of the trainings."""
    codes = [outcome.exit_code for outcome in outcomes if outcome.exit_code is not None]
    if PreemptedError.exit_code in codes or len(codes) < len(outcomes):
        return PreemptedError.exit_code
    return 1 if any(code == 1 or code < 0 for code in codes) else max(codes)


def _runs(config_paths: Sequence[Path], out: Path) -> list[Path]:
    """The run folder of each config, all different."""
    processes = environment.launched_processes()
    if processes > 1:
        raise ConfigError(
            f"Several configs in one call train one after another, and a launcher has started "
            f"{processes} processes for the call: give one config to each start of the launcher."
        )
    counts = Counter(path.stem for path in config_paths)
    faults = [
        f"{name}: {', '.join(str(path) for path in config_paths if path.stem == name)}"
        for name, count in counts.items()
        if count > 1
    ]
    if faults:
        raise ConfigError(
            f"Each config is trained into the folder of its name in {out}: names must differ.",
            faults,
        )
    return [out / path.stem for path in config_paths]


def _resolve(config_path: Path, overrides: Sequence[str]) -> None:
    config.load(config_path, overrides).model.resolved()


def _run(child: _Child, words: Sequence[object]) -> int:
    # In its own session, so that Ctrl-C reaches it only once, through this process.
    child.process = subprocess.Popen(
        [sys.executable, *map(str, words)], start_new_session=True, stdin=subprocess.DEVNULL
    )
    if child.received:  # between the check and the start
        child.process.send_signal(child.received[0])
    return child.process.wait()


@contextmanager
def _forwarding() -> Iterator[_Child]:
    """Pass the signals that end a training on to the running one."""
    child = _Child()

    def forward(number: int, _: Any) -> None:
        child.received.append(number)
        if child.process and child.process.poll() is None:
            child.process.send_signal(number)

    numbers = [getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
