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
    cases = [(name, 0) for name in registry.names()] + [("rectified_flow", 1)]
    for side in (32,) if options.quick else (64, 128):
        for name, levels in cases:
            peak, seconds = apart(step_peak, name, side, levels)
            kind = f"{name} with wavelet_levels {levels}" if levels else name
            rows.append(Row(
                f"memory: peak of training steps of {kind} on one volume of {side}^3, 32-true",
                peak, f"{peak:.2f} GB ({seconds:.1f} CPU-s a step)",
                at_most=LATENT_GB if name == "latent_diffusion" else None,
            ))  # fmt: skip
    return rows


def step_peak(name: str, side: int, wavelet_levels: int = 0) -> tuple[float, float]:
    """Most resident memory in gigabytes, libraries included, and CPU-seconds of the second step."""
    import resource

    changed = {"wavelet_levels": wavelet_levels} if wavelet_levels else {}
    take = bare_step(defaults(name) | changed, (side,) * 3, 1)
    take()
    start = time.process_time()
    take()
    seconds = time.process_time() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, seconds
