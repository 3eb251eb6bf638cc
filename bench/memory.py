"""Whether the memory of a training depends on how many images there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.images import write_jpegs
from bench.process import one_thread
from bench.report import Options, Row

BATCH_SIZE, GROWTH = 20, 10
# small, so that what the images take is not lost in what the model takes
MODEL = {"name": "rectified_flow", "channels": [8, 8, 8, 8], "wavelet_levels": 0}


def measure(options: Options) -> list[Row]:
    num_images = 40 if options.quick else 1000
    few = peak_bytes(num_images, max_epochs=GROWTH)
    many = peak_bytes(num_images * GROWTH, max_epochs=1)
    num_steps = num_images // BATCH_SIZE * GROWTH
    ratio = many / few
    return [
        Row(
            f"memory: peak of training on {num_images * GROWTH:,} images over that on "
            f"{num_images:,} ({num_steps} steps each, the cache built in between)",
            ratio,
            f"{ratio:.3f} ({many / 1e6:.0f} against {few / 1e6:.0f} MB)",
            at_least=0.95,
            at_most=1.05,
        )
    ]


def peak_bytes(num_images: int, max_epochs: int) -> int:
    """Peak resident memory of `synthcube train`, from an empty cache."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_jpegs(folder / "images", num_images)
        config = {
            "model": MODEL,
            "data": {"size": [64, 64], "validation_fraction": 0},
            "training": {"max_epochs": max_epochs, "batch_size": BATCH_SIZE},
            "compute": {"accelerator": "cpu"},
        }
        (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-m", "synthcube", "train"]
        command += ["-c", str(folder / "config.yaml"), "-d", str(folder / "images")]
        command += ["-o", str(folder / "run")]
        environment = one_thread() | {"SYNTHCUBE_CACHE": str(folder / "cache")}
        log = folder / "log.txt"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            # not getrusage(RUSAGE_CHILDREN): that is the largest of all children so far
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"synthcube train failed:\n{log.read_text(encoding='utf-8')}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
