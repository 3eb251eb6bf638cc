"""Seconds that a checkpoint of 100 million parameters takes, with its average and two moments."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.process import apart
from bench.report import Options, Row

PARAMETERS, LAYERS = 100_000_000, 100


def measure(options: Options) -> list[Row]:
    number, num_rounds = (PARAMETERS // 100, 1) if options.quick else (PARAMETERS, 5)
    seconds, written, size = apart(seconds_of_saving, number, num_rounds)
    return [
        Row(
            f"saving: seconds of a checkpoint of {number / 1e6:.0f} M parameters (weights, "
            "average, two moments), until the training goes on",
            median(seconds),
            f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}; "
            f"{size / 1e9:.2f} GB, on the disk after {median(written):.1f} s)",
            at_most=2.0,
        )
    ]


def seconds_of_saving(number: int, num_rounds: int) -> tuple[list[float], list[float], int]:
    """Seconds of saves that each replace the one before, until they return and until they are on
    the disk; and the bytes of one."""
    from synthcube.training.checkpoints import AtomicCheckpointIO

    content, plugin = checkpoint(number), AtomicCheckpointIO()
    seconds, written = [], []
    # Beside the working folder: the temporary one may be kept in memory, and no run's folder is.
    with TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as name:
        path = Path(name) / "checkpoints" / "last.ckpt"
        for _ in range(num_rounds):
            start = time.perf_counter()
            plugin.save_checkpoint(content, path)
            seconds.append(time.perf_counter() - start)
            plugin.finish()
            written.append(time.perf_counter() - start)
        size = path.stat().st_size
    return seconds, written, size


def checkpoint(number: int) -> dict[str, Any]:
    """What Lightning hands over: named tensors in four roles."""
    import torch

    def tensors() -> dict[str, torch.Tensor]:
        return {f"layer.{i}": torch.randn(number // LAYERS) for i in range(LAYERS)}

    first, second = tensors(), tensors()
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": a, "exp_avg_sq": b}
        for i, (a, b) in enumerate(zip(first.values(), second.values(), strict=True))
    }
    return {
        "epoch": 0,
        "global_step": 1,
        "state_dict": tensors(),
        "current_model_state": tensors(),
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 1e-3}]}],
    }
