"""Images per second of a training by two processes, over those of one, with the same batches.

Every process has one thread, so that two of them have two cores where one has one. By the clock:
the machine must have nothing else to do.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.images import write_jpegs
from bench.process import one_thread
from bench.report import Options, Row
from bench.sizes import BATCH_SIZE, SIDE

EVERY = 5


def measure(options: Options) -> list[Row]:
    num_rounds, num_rows = (1, 2) if options.quick else (3, 5)
    ratios, speeds, ceilings = [], [], []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder / "images", BATCH_SIZE * EVERY * num_rows, SIDE)
        for number in range(num_rounds):
            one, two = (
                images_per_second(folder, f"{number}-{devices}", devices) for devices in (1, 2)
            )
            ratios.append(two / one)
            speeds.append((two, one))
            ceilings.append(strangers(folder, f"{number}-strangers") / one)
    two, one = (median(rates) for rates in zip(*speeds, strict=True))
    return [
        Row(
            "processes: images per second of ddpm trained by 2 processes on 2 cores over 1 process "
            f"on 1, batch {BATCH_SIZE} of {SIDE}x{SIDE} in all",
            median(ratios),
            f"{median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f}; "
            f"{two:.1f} against {one:.1f} images/s)",
            at_least=1.7,
        ),
        Row(
            "processes: the same of two trainings at once that share nothing, half the batch each: "
            "what this machine can give",
            median(ceilings),
            f"{median(ceilings):.2f} (rounds {min(ceilings):.2f} to {max(ceilings):.2f})",
        ),
    ]


def images_per_second(folder: Path, name: str, num_devices: int) -> float:
    """The median of a training's lines but the first, which has the start in it."""
    return _speed(folder / name, _started(folder, name, num_devices, BATCH_SIZE))


def strangers(folder: Path, name: str) -> float:
    """The sum of two trainings that run at the same time, each with half the batch."""
    names = [f"{name}-{number}" for number in range(2)]
    started = [_started(folder, name, 1, BATCH_SIZE // 2) for name in names]
    pairs = zip(names, started, strict=True)
    return sum(_speed(folder / name, process) for name, process in pairs)


def _started(folder: Path, name: str, num_devices: int, batch_size: int) -> subprocess.Popen[str]:
    config = {
        "model": {"name": "ddpm"},
        "data": {"size": [SIDE, SIDE], "validation_fraction": 0},
        "training": {
            "max_epochs": 1, "batch_size": batch_size, "log_every_n_steps": EVERY,
            "sample_every_n_epochs": 0,
        },
        "compute": {"accelerator": "cpu", "num_devices": num_devices},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "synthcube", "train", "-c", str(path),
         "-d", str(folder / "images"), "-o", str(folder / name)],
        env=one_thread() | {"SYNTHCUBE_CACHE": str(folder / "cache")},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _speed(run: Path, process: subprocess.Popen[str]) -> float:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"synthcube train failed:\n{errors}")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        speeds = [row.get("images_per_second") for row in csv.DictReader(file)]
    return median([float(speed) for speed in speeds if speed][1:])
