"""What fidelity and diversity of many pictures cost: time, processor time, memory."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bench.process import apart
from bench.report import Options, Row

SIDE = 64
SETS = ("predictions", "labels", "train_data")


def measure(options: Options) -> list[Row]:
    number = 60 if options.quick else 10_000
    few, many = (apart(cost, each) for each in (max(number // 10, 40), number))
    minutes = many["seconds"] / 60
    per_second = len(SETS) * number / many["extract_cpu"]
    return [
        Row(
            f"evaluation: minutes for features of three sets of {number:,} pictures of 64x64, "
            "fidelity and diversity, one thread",
            minutes,
            f"{minutes:.2f} (features {many['extract'] / 60:.2f}, CPU {many['cpu'] / 60:.2f})",
            at_most=3,
        ),
        Row(
            "evaluation: features per CPU-second, efficientnet-lite0",
            per_second,
            f"{per_second:,.0f}",
        ),
        Row(
            f"evaluation: peak memory of {number:,} pictures, GB",
            many["bytes"] / 1e9,
            f"{many['bytes'] / 1e9:.2f} ({few['bytes'] / 1e9:.2f} with a tenth)",
            at_most=2,
        ),
    ]


def cost(number: int) -> dict[str, float]:
    """Of one evaluation in this process."""
    from synthcube.evaluation.config import EvaluationConfig
    from synthcube.evaluation.features.extractors import load_extractor
    from synthcube.evaluation.features.tables import extract
    from synthcube.evaluation.fidelity.diversity import diversity
    from synthcube.evaluation.fidelity.findings import fidelity

    config = EvaluationConfig()
    with TemporaryDirectory() as name:
        folder = Path(name)
        sets = [_images(folder, each, number, seed) for seed, each in enumerate(SETS)]
        start, start_cpu = time.perf_counter(), time.process_time()
        extractor = load_extractor(config.extractor, rank=2)
        features = [extract(each, extractor, sets[1].bounds, config, folder) for each in sets]
        extracted, extracted_cpu = time.perf_counter(), time.process_time()
        fidelity(*sets[:2], *features[:2], config, 0)
        judged = time.perf_counter()
        diversity(*sets[:2], config, 0)
        done, done_cpu = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": done - start, "extract": extracted - start, "fidelity": judged - extracted,
        "cpu": done_cpu - start_cpu, "extract_cpu": extracted_cpu - start_cpu,
        "bytes": peak * (1 if sys.platform == "darwin" else 1024),
    }  # fmt: skip


def _images(folder: Path, name: str, number: int, seed: int):  # type: ignore[no-untyped-def]
    """Smooth noise, in pieces, as an evaluation keeps its images."""
    from synthcube.data.manifest import Manifest, Row
    from synthcube.evaluation.images import ImageSet

    rng = np.random.default_rng(seed)
    path = folder / f"{name}.f32"
    with path.open("wb") as file:
        for start in range(0, number, 500):
            coarse = rng.random((min(500, number - start), SIDE // 4, SIDE // 4), np.float32)
            images = np.kron(coarse, np.ones((1, 4, 4), np.float32))
            images += 0.1 * rng.random(images.shape, np.float32)
            file.write(images.tobytes())
    rows = tuple(Row((folder / f"{i}.png",), f"{name} {i}") for i in range(number))
    return ImageSet(
        name, Manifest(folder, rows), (1, SIDE, SIDE), (1.0, 1.0, 1.0), True, 0, number, "",
        ((0.0, 1.1),), path,
    )  # fmt: skip
