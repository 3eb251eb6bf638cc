"""How fast an untrained model of default size draws images: training changes no speed."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from bench.process import apart
from bench.report import Options, Row
from bench.sizes import BATCH_SIZE, SIDE

BOUNDS = {("rectified_flow", "bf16-mixed"): 4.0, ("rectified_flow", "32-true"): 4.0}


def measure(options: Options) -> list[Row]:
    num_batches = 1 if options.quick else 3
    rows = []
    for family_name in ("rectified_flow", "ddpm"):
        for asked in ("auto", "32"):
            speed, precision = apart(images_per_second, family_name, num_batches, asked)
            what = f"{family_name}, default sampler, {SIDE}x{SIDE}, batch {BATCH_SIZE}, {precision}"
            name = f"sampling: {what}: images per CPU-second"
            row = Row(name, speed, f"{speed:.2f}", at_least=BOUNDS.get((family_name, precision)))
            rows += [row] if name not in {known.name for known in rows} else []
    return rows


def images_per_second(family_name: str, num_batches: int, asked: str) -> tuple[float, str]:
    """The median batch's images for each CPU-second, and the precision they are made in."""
    import numpy as np
    import torch

    from synthcube import compute
    from synthcube.models import inference, registry

    device = torch.device("cpu")
    precision, _ = compute.resolve_precision(asked, device)
    family: Any = registry.find(family_name)(name=family_name).build(image_spec(SIDE)).eval()
    seeds = inference.image_seeds(0, BATCH_SIZE)
    values = np.zeros((BATCH_SIZE, 0), np.float32)
    nothing = {"values": torch.zeros(BATCH_SIZE, 0), "source": torch.zeros(BATCH_SIZE, 0)}
    with compute.inference(precision, device):  # the first call chooses kernels
        family.network(torch.zeros(BATCH_SIZE, 1, SIDE, SIDE), torch.zeros(BATCH_SIZE), nothing)
    speeds = []
    for _ in range(num_batches):
        start = time.process_time()
        images = inference.generate(family, seeds, values, precision, device)
        speeds.append(len(images) / (time.process_time() - start))
    return median(speeds), precision


def image_spec(side: int) -> Any:
    """Grey pictures of side x side."""
    from synthcube.schema import ImageSpec

    return ImageSpec(
        size=(side, side),
        channels=1,
        spacing_mm=(1, 1, 1),
        affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        intensity_range=((0, 255),),
        file_format="png",
    )
