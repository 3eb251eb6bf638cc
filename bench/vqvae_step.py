"""A training step of synthcube's vqvae against a bare loop of the predecessor's network.

Both have the 7,088,449 weights of GaNDLF-Synth's VQVAE; bench.train_step says how it is measured.
"""

from __future__ import annotations

import time
import warnings
from statistics import median
from typing import Any

from bench.process import apart
from bench.report import Options, Row
from bench.sizes import BATCH_SIZE, SIDE, WARM_UP
from bench.train_step import auto_precision, between, our_steps, row

CHANNELS = (96, 96, 192)
MODEL = {
    "name": "vqvae", "channels": CHANNELS, "num_res_layers": 3, "num_embeddings": 32,
    "embedding_dim": 64, "codebook_decay": 0.5, "losses": [{"name": "mse"}],
}  # fmt: skip
NAME = (
    "training step of vqvae over a bare fp32 loop of the network that GaNDLF-Synth takes from "
    "monai-generative (forward, mse, backward, Adam; tensors in memory; its own process)"
)


def measure(options: Options) -> list[Row]:
    precision = apart(auto_precision)
    is_bf16 = precision == "bf16-mixed"
    loops: dict[str, tuple[Any, ...]] = {
        "bare": (bare_steps,),
        "ours32": (our_steps, MODEL, "32-true"),
    }
    if is_bf16:
        loops["ours"] = (our_steps, MODEL, precision)
    num_rounds, num_steps = (1, 2) if options.quick else (5, 8)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(num_rounds):
        for name, (function, *arguments) in loops.items():
            seconds[name].append(median(apart(function, *arguments, num_steps)))
    rows = [row(f"{NAME}, 32-true", seconds["ours32"], seconds["bare"], at_most=1.03)]
    if is_bf16:
        rows.append(row(f"{NAME}, {precision}", seconds["ours"], seconds["bare"], at_most=0.70))
    return rows


def bare_steps(num_steps: int) -> list[float]:
    """CPU-seconds of the steps of a loop in which there is nothing else."""
    import torch

    network = predecessor()
    adam = torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
    images = torch.rand(BATCH_SIZE, 1, SIDE, SIDE) * 2 - 1
    starts = []
    for _ in range(WARM_UP + num_steps + 1):
        starts.append(time.process_time())
        adam.zero_grad()
        reconstructed, commitment = network(images)
        (torch.nn.functional.mse_loss(reconstructed, images) + commitment).backward()
        adam.step()
    return between(starts)


def predecessor() -> Any:
    """The network that GaNDLF-Synth builds for its VQVAE."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its old autocast
        from generative.networks.nets import VQVAE

        return VQVAE(
            spatial_dims=2, in_channels=1, out_channels=1, num_channels=CHANNELS,
            num_res_channels=CHANNELS, num_res_layers=3,
            downsample_parameters=((2, 4, 1, 1),) * 3, upsample_parameters=((2, 4, 1, 1, 0),) * 3,
            num_embeddings=32, embedding_dim=64, commitment_cost=0.25, decay=0.5,
        )  # fmt: skip
