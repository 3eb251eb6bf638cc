"""What `synthcube evaluate` costs on many pictures: time, processor time, memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL.Image
import torch

from bench.process import apart
from bench.report import Options, Row

SIDE = 64
SETS = ("predictions", "labels", "train_data")


def measure(options: Options) -> list[Row]:
    number = 60 if options.quick else 10_000
    few, many = (apart(cost, size) for size in (max(number // 10, 40), number))
    minutes = many["seconds"] / 60
    return [
        Row(
            f"evaluate: minutes for three sets of {number:,} PNG of 64x64, two threads",
            minutes,
            f"{minutes:.2f} (CPU {many['cpu'] / 60:.2f})",
            at_most=3,
        ),
        Row(
            f"evaluate: peak memory of {number:,} pictures, GB",
            many["bytes"] / 1e9,
            f"{many['bytes'] / 1e9:.2f} ({few['bytes'] / 1e9:.2f} with a tenth)",
            at_most=2,
        ),
    ]


def cost(number: int) -> dict[str, float]:
    """Of one evaluation in this process, from the files to results.yaml."""
    from synthcube import environment
    from synthcube.tasks.evaluate import evaluate

    environment.calm_threads()
    torch.set_num_threads(2)
    with TemporaryDirectory() as name:
        folder = Path(name)
        sets = [_write(folder / name, number, seed) for seed, name in enumerate(SETS)]
        start, start_cpu = time.perf_counter(), time.process_time()
        evaluate(sets[0], sets[1], folder / "results.yaml", train_data=sets[2])
        done, done_cpu = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": done - start, "cpu": done_cpu - start_cpu,
        "bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }  # fmt: skip


def _write(folder: Path, number: int, seed: int) -> Path:
    """Smooth noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for index in range(number):
        coarse = rng.random((SIDE // 8, SIDE // 8), np.float32) * 255
        picture = PIL.Image.fromarray(coarse).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
        pixels = np.asarray(picture) + 10 * rng.random((SIDE, SIDE), np.float32)
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:05d}.png")
    return folder
