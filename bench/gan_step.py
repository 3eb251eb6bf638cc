"""A training step of dcgan, as a user gets it, against a bare PyTorch loop of its two networks.

Measured as in bench.train_step: every loop in a process of its own, in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.process import apart
from bench.report import Options, Row
from bench.sizes import BATCH_SIZE, SIDE, WARM_UP
from bench.train_step import auto_precision, between, our_steps, row

BARE = (
    "training step of dcgan over a bare loop of the same two networks (generator against "
    "discriminator, then discriminator on real and made images; backward, Adam; tensors in "
    "memory; its own process)"
)
# GaNDLF-Synth's dcgan of 6.3 million parameters, one thread of the same kind of processor.
PREDECESSOR_S = 0.885


def measure(options: Options) -> list[Row]:
    default = apart(auto_precision)
    num_rounds, num_steps = (1, 2) if options.quick else (5, 20)
    rows = []
    for precision in dict.fromkeys([default, "32-true"]):
        ours, bare = [], []
        for _ in range(num_rounds):
            ours.append(median(apart(our_steps, {"name": "dcgan"}, precision, num_steps)))
            bare.append(median(apart(bare_steps, precision, num_steps)))
        bound = 1.05 if precision == default else None
        rows.append(row(f"{BARE}, {precision}", ours, bare, at_most=bound))
        name = f"training step of dcgan, {precision}; the predecessor's takes {PREDECESSOR_S} CPU-s"
        shown = f"{median(ours):.3f} CPU-s ({min(ours):.3f} to {max(ours):.3f})"
        rows.append(Row(name, median(ours), shown, at_most=PREDECESSOR_S))
    return rows


def bare_steps(precision: str, num_steps: int) -> list[float]:
    """The same of a loop in which there is nothing but a step."""
    take = _bare_step(precision)
    starts = []
    for _ in range(WARM_UP + num_steps + 1):
        starts.append(time.process_time())
        take()
    return between(starts)


def _bare_step(precision: str) -> Callable[[], None]:
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    from bench.sampling import image_spec
    from synthcube.models.families.dcgan import DCGANConfig

    family = DCGANConfig().build(image_spec(SIDE))
    maker: Any = family.generator
    judge: Any = family.discriminator
    adams = [
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for network in (maker, judge)
    ]
    real = torch.rand(BATCH_SIZE, 1, SIDE, SIDE) * 2 - 1
    nothing, ones = torch.zeros(BATCH_SIZE, 0), torch.ones(BATCH_SIZE)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")

    def take() -> None:
        judge.requires_grad_(False)
        with mixed:
            generated = maker(torch.randn(BATCH_SIZE, 100), nothing)
            fooled = judge(generated, nothing)
        cross_entropy(fooled.float(), ones).backward()
        adams[0].step()
        adams[0].zero_grad()
        judge.requires_grad_(True)
        with mixed:
            logits = judge(real, nothing), judge(generated.detach(), nothing)
        loss = cross_entropy(logits[0].float(), ones) + cross_entropy(logits[1].float(), 0 * ones)
        loss.backward()
        adams[1].step()
        adams[1].zero_grad()

    return take
