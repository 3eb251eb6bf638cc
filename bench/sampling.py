"""How fast an untrained model of default size draws images: training changes no speed."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from bench.process import apart
from bench.report import Options, Row

BATCH_SIZE = 16


def measure(options: Options) -> list[Row]:
    num_batches = 1 if options.quick else 3
    flow, precision = apart(images_per_second, "rectified_flow", num_batches)
    diffusion, _ = apart(images_per_second, "ddpm", num_batches)
    what = f"default sampler, 64x64, batch {BATCH_SIZE}, {precision}: images per CPU-second"
    bound = 1.5 if precision == "bf16-mixed" else 1.0
    return [
        Row(f"sampling: rectified_flow, {what}", flow, f"{flow:.2f}", at_least=bound),
        Row(f"sampling: ddpm, {what}", diffusion, f"{diffusion:.2f}"),
    ]


def images_per_second(family_name: str, num_batches: int) -> tuple[float, str]:
    """The median batch's images for each CPU-second, and the precision they are made in."""
    import torch

    from synthcube import registry, runtime, sampling

    device = torch.device("cpu")
    precision, _ = runtime.precision("auto", device)
    family: Any = registry.find(family_name)(name=family_name).build(image_spec(64)).eval()
    seeds = sampling.image_seeds(0, BATCH_SIZE)
    with runtime.inference(precision, device):  # the first call chooses kernels
        family.network(torch.zeros(BATCH_SIZE, 1, 64, 64), torch.zeros(BATCH_SIZE))
    speeds = []
    for _ in range(num_batches):
        start = time.process_time()
        images = list(sampling.generate(family, seeds, BATCH_SIZE, precision, device))
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
