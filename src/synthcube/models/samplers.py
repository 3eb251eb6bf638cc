"""Samplers by name, and the loop that carries noise to images with one of them.

A sampler is a scheduler of diffusers. To add one is one entry in the table below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""A network under its condition: (x_t (B, C, *spatial), time (B,)) to its prediction."""

NumSteps = Annotated[int, Field(ge=2, le=100_000)]

Process = Literal["flow", "diffusion"]


class Sampler(NamedTuple):
    """A scheduler of diffusers, and how it is used."""

    scheduler: str
    """Name of its class."""
    description: str
    num_steps: int | None = 20
    """Steps unless the config says otherwise; None: as many as the process was trained with."""
    flow: Mapping[str, Any] | None = None
    """Arguments with which it samples a flow; None: it cannot."""
    diffusion: Mapping[str, Any] | None = None
    """Arguments with which it samples a diffusion; None: it cannot."""


# Steps even in log signal-to-noise ratio (`use_lu_lambdas`, Lu et al.) keep the spread of the data
# of a diffusion; even in time, 20 steps lose a fifth of it. The DPM-Solver of first order is DDIM.
SAMPLERS = {
    "dpm-solver++": Sampler(
        "DPMSolverMultistepScheduler",
        "second order, one network call a step",
        flow={"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        diffusion={"solver_order": 2, "use_lu_lambdas": True},
    ),
    "ddim": Sampler(
        "DPMSolverMultistepScheduler",
        "first order",
        num_steps=50,
        diffusion={"solver_order": 1, "use_lu_lambdas": True},
    ),
    "euler": Sampler("FlowMatchEulerDiscreteScheduler", "first order", flow={}),
    "heun": Sampler("FlowMatchHeunDiscreteScheduler", "second order, two calls a step", flow={}),
    "ddpm": Sampler(
        "DDPMScheduler",
        "adds noise at every step of the training",
        num_steps=None,
        diffusion={"timestep_spacing": "trailing"},
    ),
}


def of_process(process: Process) -> tuple[str, ...]:
    """Names of the samplers that can sample a process."""
    return tuple(name for name in SAMPLERS if getattr(SAMPLERS[name], process) is not None)


def described(process: Process) -> str:
    """The samplers of a process with what they do, for the description of a field."""
    return ", ".join(f"{name} ({SAMPLERS[name].description})" for name in of_process(process))


def build(name: str, process: Process, **settings: Any) -> Any:
    """A fresh scheduler of diffusers for a process, with further arguments of its class."""
    import diffusers

    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.scheduler)(**settings, **getattr(sampler, process))


if TYPE_CHECKING:
    FlowSampler: TypeAlias = str
    DiffusionSampler: TypeAlias = str
else:
    FlowSampler = Literal[of_process("flow")]
    DiffusionSampler = Literal[of_process("diffusion")]


def integrate(
    scheduler: Any, predict: Predict, start: Tensor, generators: Sequence[torch.Generator],
    num_steps: int,
) -> Tensor:  # fmt: skip
    """Images, (B, C, *spatial), float32, not clipped, out of noise along a scheduler of diffusers.

    Args:
        scheduler: a fresh one; it is set to `num_steps` here.
        predict: (x_t (B, C, *spatial), time (B,) in the scheduler's own units) to what the
            scheduler expects of a network: noise, velocity, flow or image.
        start: standard normal noise, (B, C, *spatial), float32.
        generators: one for each image, for samplers that add noise on the way.
        num_steps: steps of the solver; a Heun step calls the network twice.
    """
    scheduler.set_timesteps(num_steps)
    watch = _WATCH.get()
    adds_noise = "generator" in inspect.signature(scheduler.step).parameters
    random = {"generator": list(generators)} if adds_noise else {}
    x_t = start
    for number, time in enumerate(scheduler.timesteps):
        if watch:
            watch.see(x_t, number / len(scheduler.timesteps))
        # Filled on the device: a copy of the time from the CPU would wait for all steps before.
        prediction = predict(x_t, x_t.new_full((len(x_t),), float(time))).float()
        x_t = scheduler.step(prediction, time, x_t, **random).prev_sample
    return x_t


@dataclass(slots=True)
class _Watch:
    """What :func:`watched` keeps."""

    num_frames: int
    num_images: int
    moments: list[tuple[float, Tensor]]
    decode: Callable[[Tensor], Tensor] | None = None

    def see(self, x_t: Tensor, share: float) -> None:
        if share * self.num_frames >= len(self.moments) - 1e-9:
            images = x_t[: self.num_images].detach()
            images = self.decode(images) if self.decode else images
            self.moments.append((share, images.float().cpu()))


_WATCH: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(num_frames: int, num_images: int) -> Iterator[list[tuple[float, Tensor]]]:
    """Keep what is drawn inside on its way from noise to images.

    Args:
        num_frames: at most so many moments are kept, evenly spaced, the noise first.
        num_images: of the first images of a batch.

    Yields:
        the moments so far: the share of the steps done, in [0, 1), and (num_images, C, *spatial)
        in float32 on the CPU, in the model's range but not clipped.
    """
    watch = _Watch(num_frames, num_images, [])
    token = _WATCH.set(watch)
    try:
        yield watch.moments
    finally:
        _WATCH.reset(token)


@contextmanager
def seen_through(decode: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let :func:`watched` see the images that `decode` makes of what is drawn inside."""
    watch = _WATCH.get()
    token = _WATCH.set(watch and replace(watch, decode=decode))
    try:
        yield
    finally:
        _WATCH.reset(token)


def noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, (B, *shape), one row from each generator, on the CPU.

    Drawn on the CPU whatever the device, so that a seed means the same image everywhere.
    """
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
