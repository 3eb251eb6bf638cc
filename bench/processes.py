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

BATCH_SIZE, SIDE, EVERY = 16, 64, 5


def measure(options: Options) -> list[Row]:
    num_rounds, num_rows = (1, 2) if options.quick else (3, 5)
    ratios, speeds = [], []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder / "images", BATCH_SIZE * EVERY * num_rows, SIDE)
        for number in range(num_rounds):
            one, two = (
                images_per_second(folder, f"{number}-{devices}", devices) for devices in (1, 2)
            )
            ratios.append(two / one)
            speeds.append((two, one))
    two, one = (median(each) for each in zip(*speeds, strict=True))
    return [
        Row(
            "processes: images per second of ddpm trained by 2 processes on 2 cores over 1 process "
            f"on 1, batch {BATCH_SIZE} of {SIDE}x{SIDE} in all",
            median(ratios),
            f"{median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f}; "
            f"{two:.1f} against {one:.1f} images/s)",
            at_least=1.7,
        )
    ]


def images_per_second(folder: Path, name: str, num_devices: int) -> float:
    """The median of a training's lines but the first, which has the start in it."""
    config = {
        "model": {"name": "ddpm"},
        "data": {"size": [SIDE, SIDE], "validation_fraction": 0},
        "training": {
            "max_epochs": 1, "batch_size": BATCH_SIZE, "log_every_n_steps": EVERY,
            "sample_every_n_epochs": 0,
        },
        "compute": {"accelerator": "cpu", "num_devices": num_devices},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "synthcube", "train", "-c", str(path),
         "-d", str(folder / "images"), "-o", str(folder / name)],
        env=one_thread() | {"SYNTHCUBE_CACHE": str(folder / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"synthcube train failed:\n{done.stderr}")
    with (folder / name / "metrics.csv").open(newline="", encoding="utf-8") as file:
        speeds = [row.get("images_per_second") for row in csv.DictReader(file)]
    return median([float(each) for each in speeds if each][1:])
