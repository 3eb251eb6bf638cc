"""A training step of synthcube, as a user gets it, against bare PyTorch loops.

Every loop runs in a process of its own: two in one process would share a heap, and how often the
heap goes back to the system changes a step by a fifth. The processes take turns, so that what
else the machine does slows all alike; a figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bench.images import write_jpegs
from bench.process import apart
from bench.report import Options, Row
from bench.sizes import BATCH_SIZE, SIDE, WARM_UP

if TYPE_CHECKING:
    import torch

MODEL = {"name": "ddpm"}
BARE = (
    "training step of ddpm over a bare loop of the same network (forward, mse, backward, "
    "clip_grad_norm_, AdamW; tensors in memory; its own process)"
)
PREDECESSOR = (
    "training step of ddpm over a bare fp32 loop of the network that GaNDLF-Synth takes from "
    "monai-generative (forward, mse, backward, Adam; tensors in memory; its own process)"
)
DEFAULT = (
    "training step of rectified_flow with its own network (on wavelets) over the same loop of the "
    "predecessor's network"
)


def measure(options: Options) -> list[Row]:
    precision = apart(auto_precision)
    is_bf16 = precision == "bf16-mixed"
    loops: dict[str, tuple[Any, ...]] = {
        "ours": (our_steps, MODEL, precision),
        "bare": (bare_steps, "own", precision),
        "predecessor": (bare_steps, "predecessor", "32-true"),
        "default": (our_steps, {"name": "rectified_flow"}, precision),
    }
    if is_bf16:
        loops |= {"ours32": (our_steps, MODEL, "32-true"), "bare32": (bare_steps, "own", "32-true")}
    num_rounds, num_steps = (1, 2) if options.quick else (5, 10)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(num_rounds):
        for name, (function, *arguments) in loops.items():
            seconds[name].append(median(apart(function, *arguments, num_steps)))
    rows = [row(f"{BARE}, {precision}", seconds["ours"], seconds["bare"], at_most=1.03)]
    if is_bf16:
        rows.append(row(f"{BARE}, 32-true", seconds["ours32"], seconds["bare32"], None))
    bound = 0.60 if is_bf16 else None
    name = f"{PREDECESSOR}, {precision}"
    rows.append(row(name, seconds["ours"], seconds["predecessor"], bound))
    name = f"{DEFAULT}, {precision}"
    return [*rows, row(name, seconds["default"], seconds["predecessor"], at_most=0.35)]


def auto_precision() -> str:
    """What synthcube computes in on this processor unless told otherwise."""
    import torch

    from synthcube import compute

    return compute.resolve_precision("auto", torch.device("cpu"))[0]


def our_steps(model: dict[str, Any], precision: str, num_steps: int) -> list[float]:
    """CPU-seconds from the start of a step to the start of the next, in a training of `model`."""
    import torch

    from synthcube.compute import ComputeConfig
    from synthcube.models import registry
    from synthcube.training import TrainingConfig, TrainingRun, fit

    starts: list[float] = []
    with TemporaryDirectory() as name, redirect_stderr(io.StringIO()):  # no progress bar
        folder = Path(name)
        data = _data(folder, WARM_UP + num_steps + 1)
        family = registry.find(model["name"]).model_validate(model).build(data.image)

        def note(*_: Any) -> None:
            starts.append(time.process_time())

        family.on_train_batch_start = note  # type: ignore[assignment]
        training, place = TrainingConfig(max_epochs=1), ComputeConfig(accelerator="cpu")
        run = folder / "run"
        fit(family, TrainingRun(data, training, place, run, 0, precision, torch.device("cpu")))
    return between(starts)


def bare_steps(network: str, precision: str, num_steps: int) -> list[float]:
    """The same of a loop in which there is nothing but a step."""
    take = _reference_step(network, precision)
    starts = []
    for _ in range(WARM_UP + num_steps + 1):
        starts.append(time.process_time())
        take()
    return between(starts)


def between(starts: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(starts)][WARM_UP:]


def _data(folder: Path, num_batches: int) -> Any:
    from synthcube.data.manifest import read_manifest
    from synthcube.data.module import DataModule
    from synthcube.data.preprocessing import DataConfig

    images = write_jpegs(folder / "images", num_batches * BATCH_SIZE, SIDE)
    config = DataConfig(size=(SIDE, SIDE), validation_fraction=0)
    return DataModule(
        read_manifest(images), config, batch_size=BATCH_SIZE, seed=0, cache=folder / "cache"
    )


def _reference_step(reference: str, precision: str) -> Callable[[], None]:
    import torch

    if reference == "predecessor":
        network = _predecessor()
        adam = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=5e-5)
        return _bare_step(network, adam, "32-true", clip_norm=None)
    network = _own_network()
    adamw = torch.optim.AdamW(network.parameters(), lr=5e-4)
    nothing = {"values": torch.zeros(BATCH_SIZE, 0), "source": torch.zeros(BATCH_SIZE, 0)}

    def follow(x_t: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = network(x_t, step, nothing)
        return output

    return _bare_step(network, adamw, precision, clip_norm=1.0, call=follow)


def _bare_step(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: str,
    clip_norm: float | None, call: Callable[..., torch.Tensor] | None = None,
) -> Callable[[], None]:  # fmt: skip
    import torch

    x_t = torch.randn(BATCH_SIZE, 1, SIDE, SIDE)
    target = torch.randn_like(x_t)
    step = torch.randint(1000, (BATCH_SIZE,)).float()

    def take() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            prediction = (call or network)(x_t, step)
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()

    return take


def _own_network() -> torch.nn.Module:
    from bench.sampling import image_spec
    from synthcube.models.families.ddpm import DDPMConfig

    return DDPMConfig().build_network(image_spec(SIDE))


def _predecessor() -> torch.nn.Module:
    """The network that GaNDLF-Synth builds for its DDPM; it has as many weights as ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its old autocast
        from generative.networks.nets import DiffusionModelUNet

    network: torch.nn.Module = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=(2, 2, 2, 2),
        num_channels=(32, 64, 64, 64), attention_levels=(False, False, True, True),
        norm_num_groups=32, norm_eps=1e-6, num_head_channels=8,
    )  # fmt: skip
    return network


def row(name: str, ours: list[float], reference: list[float], at_most: float | None) -> Row:
    ratios = [a / b for a, b in zip(ours, reference, strict=True)]
    shown = (
        f"{median(ratios):.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f}; "
        f"{median(ours):.2f} against {median(reference):.2f} CPU-s)"
    )
    return Row(name, median(ratios), shown, at_most=at_most)
