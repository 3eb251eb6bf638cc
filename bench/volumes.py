"""Peak memory of a training step of every family on one volume, with the family's defaults."""

from __future__ import annotations

import time

from bench.family_step import bare_step, defaults
from bench.process import apart
from bench.report import Options, Row

LATENT_GB = 12.0  # what latent_diffusion may take at 128^3


def measure(options: Options) -> list[Row]:
    from synthcube.models import registry

    rows = []
    for side in (32,) if options.quick else (64, 128):
        for name in registry.names():
            peak, seconds = apart(step_peak, name, side)
            rows.append(Row(
                f"memory: peak of training steps of {name} on one volume of {side}^3, 32-true",
                peak, f"{peak:.2f} GB ({seconds:.1f} CPU-s a step)",
                at_most=LATENT_GB if name == "latent_diffusion" else None,
            ))  # fmt: skip
    return rows


def step_peak(name: str, side: int) -> tuple[float, float]:
    """Most resident memory in gigabytes, libraries included, and CPU-seconds of the second step."""
    import resource

    take = bare_step(defaults(name), (side,) * 3, 1)
    take()
    start = time.process_time()
    take()
    seconds = time.process_time() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, seconds
