"""How long `synthcube --help` takes, and that it loads no torch."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

from bench.process import one_thread
from bench.report import Options, Row

HELP = ("-m", "synthcube", "--help")


def measure(options: Options) -> list[Row]:
    _run()  # the files are in the page cache from now on
    seconds = [_seconds() for _ in range(1 if options.quick else 5)]
    modules = _torch_modules()
    return [
        Row(
            "start-up: wall seconds of `python -m synthcube --help`",
            median(seconds),
            f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})",
            at_most=0.5,
        ),
        Row("start-up: modules of torch loaded by it", modules, str(modules), at_most=0),
    ]


def _seconds() -> float:
    start = time.perf_counter()
    _run()
    return time.perf_counter() - start


def _torch_modules() -> int:
    """Lines of `-X importtime` ("time | total | module") that name torch or a part of it."""
    imported = [line.rpartition("|")[2].strip() for line in _run("-X", "importtime").splitlines()]
    if "synthcube.cli" not in imported:
        raise RuntimeError("-X importtime does not list synthcube.cli: it cannot be trusted here")
    return sum(name.partition(".")[0] == "torch" for name in imported)


def _run(*flags: str) -> str:
    """What the command writes to standard error."""
    command = [sys.executable, *flags, *HELP]
    return subprocess.run(
        command, env=one_thread(), check=True, capture_output=True, text=True
    ).stderr
