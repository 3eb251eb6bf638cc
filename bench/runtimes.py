"""How fast other runtimes draw images, against torch: the same model, sampler and 32 bits."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench.process import apart
from bench.report import Options, Row
from bench.sampling import image_spec
from bench.sizes import BATCH_SIZE, SIDE

# What OpenVINO is held to; ONNX Runtime is measured beside it. Torch computes dcgan with channels
# last, where its convolutions are as fast as OpenVINO's: 2.5 is out of reach.
BOUNDS = {"rectified_flow": 1.5, "ddpm": 1.5, "dcgan": None, "stylegan": 2.5}
RUNTIMES = ("openvino", "onnx")


def measure(options: Options) -> list[Row]:
    num_rounds = 1 if options.quick else 3
    rows = []
    bounds = {"dcgan": BOUNDS["dcgan"]} if options.quick else BOUNDS  # the quickest to convert
    for family, bound in bounds.items():
        with tempfile.TemporaryDirectory() as name:
            apart(convert, family, name)
            speeds: dict[str, list[float]] = {runtime: [] for runtime in ("torch", *RUNTIMES)}
            for _ in range(num_rounds):
                for runtime, measured in speeds.items():
                    measured.append(apart(images_per_second, family, runtime, name))
        for runtime in RUNTIMES:
            pairs = zip(speeds[runtime], speeds["torch"], strict=True)
            ratios = [ours / torch for ours, torch in pairs]
            shown = (
                f"{median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f}; "
                f"{median(speeds[runtime]):.2f} against {median(speeds['torch']):.2f} images)"
            )
            what = f"{family}, default sampler, {SIDE}x{SIDE}, batch {BATCH_SIZE}, 32-true"
            title = f"sampling with {runtime} over torch: {what}: images per CPU-second"
            at_least = bound if runtime == "openvino" else None
            rows.append(Row(title, median(ratios), shown, at_least=at_least))
    return rows


def convert(family_name: str, folder: str) -> None:
    """Put the networks of an untrained model of default size into `folder`."""
    from synthcube.sharing.conversion import convert as into

    for runtime in RUNTIMES:
        into(_model(family_name), Path(folder), runtime)


def images_per_second(family_name: str, runtime: str, folder: str) -> float:
    """Images for each CPU-second, once kernels are chosen: the best of a few batches."""
    import numpy as np
    import torch

    from synthcube.models import inference
    from synthcube.sharing.conversion import substitute

    family = _model(family_name)
    if runtime != "torch":
        substitute(family, Path(folder), runtime)
    seeds = inference.image_seeds(0, BATCH_SIZE)
    values, device = np.zeros((BATCH_SIZE, 0), np.float32), torch.device("cpu")
    in_one_pass = family_name in ("dcgan", "stylegan")
    rates = []
    for _ in range(10 if in_one_pass else 2):
        start = time.process_time()
        images = inference.generate(family, seeds, values, "32-true", device)
        rates.append(len(images) / (time.process_time() - start))
    return max(rates[1:])


def _model(family_name: str) -> Any:
    import torch

    from synthcube.models import registry

    torch.manual_seed(0)
    config = registry.find(family_name)(name=family_name)
    return config.build(image_spec(SIDE)).eval().requires_grad_(False)
