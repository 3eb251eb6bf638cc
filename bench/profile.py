"""Where the time of a training step goes, and how near its convolutions are to a matrix product.

Shares of the CPU time of a step of the default network, by kind of operation, from PyTorch's
profiler; then the speed of the convolutions that take most of it beside that of a matrix product
in float32, which is about what one core of the machine can do; and convolutions of a single volume
over those of PyTorch's own choice (synthcube.models.convolution).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.family_step import bare_step
from bench.process import apart
from bench.report import Options, Row
from bench.sizes import BATCH_SIZE, SIDE

_KINDS = {
    "convolution": "convolutions", "attention": "attention", "silu": "SiLU",
    "group_norm": "group norms", "mm": "linear layers", "copy": "copies", "adam": "the optimizer",
}  # fmt: skip
_CONVOLUTIONS = ((32, 32, 1), (64, 64, 2), (128, 64, 4))  # channels in and out, share of the side
_VOLUMES = ((64, 16), (96, 8))  # channels, side


def measure(options: Options) -> list[Row]:
    shares = apart(step_shares, 1 if options.quick else 4)
    rows = [
        Row(f"share of a training step: {kind}", share, f"{share:.1%}")
        for kind, share in sorted(shares.items(), key=lambda pair: -pair[1])
    ]
    product, *speeds = apart(gigaflops)
    rows.append(Row("a matrix product of 512 x 512, float32", product, f"{product:.0f} GFLOP/s"))
    for (channels, out, part), (forward, both) in zip(_CONVOLUTIONS, speeds, strict=True):
        name = f"convolution of {channels} to {out} channels at {SIDE // part} x {SIDE // part}"
        shown = f"{forward / product:.0%} of it forward, {both / product:.0%} with its gradients"
        rows.append(Row(name, both / product, shown))
    ours, plain = apart(volume_seconds, True), apart(volume_seconds, False)
    for (channels, side), after, before in zip(_VOLUMES, ours, plain, strict=True):
        name = f"convolution of one volume of {side}^3, {channels} channels, over PyTorch's choice"
        shown = f"{after / before:.2f} ({1000 * after:.0f} of {1000 * before:.0f} ms)"
        rows.append(Row(name, after / before, shown, at_most=0.8))
    return rows


def volume_seconds(replaced: bool) -> list[float]:
    """CPU-seconds of the convolution of a volume and its gradients, in float32."""
    import torch

    from synthcube.models.convolution import replace_kernels

    if replaced:
        replace_kernels()
    seconds = []
    for channels, side in _VOLUMES:
        layer = torch.nn.Conv3d(channels, channels, 3, padding=1)
        x = torch.randn(1, channels, side, side, side, requires_grad=True)
        seconds.append(_cpu_seconds(partial(_both_passes, layer, x, torch.randn_like(x))))
    return seconds


def step_shares(num_steps: int) -> dict[str, float]:
    """Share of the CPU time of steps by kind of operation."""
    from torch.profiler import ProfilerActivity, profile

    take = bare_step({"name": "ddpm"}, (SIDE, SIDE), BATCH_SIZE)
    take()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(num_steps):
            take()
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        name = event.key.lower()
        kind = next((kind for word, kind in _KINDS.items() if word in name), "the rest")
        seconds[kind] += event.self_cpu_time_total
    whole = sum(seconds.values())
    return {kind: value / whole for kind, value in seconds.items()}


def gigaflops() -> list[Any]:
    """Of a matrix product, then (forward, forward and backward) of each convolution."""
    import torch

    square = torch.randn(512, 512)
    speeds: list[Any] = [2 * 512**3 / _cpu_seconds(lambda: square @ square) / 1e9]
    for channels, out, part in _CONVOLUTIONS:
        side = SIDE // part
        layer = torch.nn.Conv2d(channels, out, 3, padding=1)
        x = torch.randn(BATCH_SIZE, channels, side, side, requires_grad=True)
        gradient = torch.randn(BATCH_SIZE, out, side, side)
        operations = 2 * BATCH_SIZE * channels * out * 9 * side**2 / 1e9
        forward = operations / _cpu_seconds(partial(layer, x))
        both = 3 * operations / _cpu_seconds(partial(_both_passes, layer, x, gradient))
        speeds.append((forward, both))
    return speeds


def _both_passes(layer: Any, x: Any, gradient: Any) -> None:
    layer(x).backward(gradient)


def _cpu_seconds(work: Callable[[], object]) -> float:
    """The least of several runs."""
    least = float("inf")
    for _ in range(5):
        start = time.process_time()
        work()
        least = min(least, time.process_time() - start)
    return least
