"""The sampling loop that diffusion and flow families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A network under its condition: (x_t (B, C, *spatial), time (B,)) to its prediction."""


def integrate(
    scheduler: Any,
    predict: Predict,
    start: torch.Tensor,
    generators: Sequence[torch.Generator],
    num_steps: int,
) -> torch.Tensor:
    """Carry noise to images along a scheduler of diffusers.

    Args:
        scheduler: a fresh scheduler of diffusers; it is set to `num_steps` here.
        predict: (x_t (B, C, *spatial), time (B,) in the scheduler's own units) to what the
            scheduler expects of a network: noise, velocity, flow or image.
        start: standard normal noise, (B, C, *spatial), float32.
        generators: one for each image, for samplers that add noise on the way.
        num_steps: steps of the solver; a Heun step calls the network twice.

    Returns:
        Images, (B, C, *spatial), float32, not clipped.
    """
    scheduler.set_timesteps(num_steps)
    x_t = start
    for time in scheduler.timesteps:
        prediction = predict(x_t, time.to(x_t).expand(len(x_t))).float()
        x_t = scheduler.step(prediction, time, x_t, generator=list(generators)).prev_sample
    return x_t
