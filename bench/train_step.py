"""A training step of synthcube, as a user gets it, against bare PyTorch loops.

Both take their steps in turn in one process, so that whatever else the machine does slows both;
a round is a process, its ratio the median of its steps', the figure the median of the rounds.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bench.images import write_jpegs
from bench.process import apart
from bench.report import Options, Row

if TYPE_CHECKING:
    import torch

BATCH_SIZE, SIDE, WARM_UP = 16, 64, 3


@dataclass(frozen=True)
class Round:
    """CPU-seconds of each step after the warm-up: ours, and the reference's just before it."""

    ours: list[float]
    reference: list[float]
    precision: str

    @property
    def ratio(self) -> float:
        return median(a / b for a, b in zip(self.ours, self.reference, strict=True))


def measure(options: Options) -> list[Row]:
    own = "the same network in a bare loop (forward, mse, backward, clip, AdamW; data in memory)"
    rounds = _rounds("own", "auto", options)
    is_bf16 = rounds[0].precision == "bf16-mixed"
    rows = [_row(f"training step over {own}", rounds, at_most=1.03)]
    if is_bf16:
        rows.append(_row(f"training step over {own}", _rounds("own", "32", options), None))
    rows.append(
        _row(
            "training step over GaNDLF-Synth's network of monai-generative in a bare fp32 loop "
            "(forward, mse, backward, Adam; data in memory)",
            _rounds("predecessor", "auto", options),
            at_most=0.60 if is_bf16 else None,
        )
    )
    return rows


def alternate(reference: str, precision_name: str, num_steps: int) -> Round:
    """Train the default ddpm, with a step of the reference before every step of its own."""
    import torch

    from synthcube import runtime
    from synthcube.families.ddpm import DDPMConfig
    from synthcube.training import TrainingConfig, fit

    device = torch.device("cpu")
    precision, _ = runtime.precision(precision_name, device)
    with TemporaryDirectory() as name, redirect_stderr(io.StringIO()):  # no progress bar
        folder = Path(name)
        data = _data(folder, WARM_UP + num_steps + 1)
        family = DDPMConfig().build(data.image)
        reference_step = _reference_step(reference, precision)
        ours: list[float] = []
        others: list[float] = []
        last: list[float] = []

        def take_turns(*_: Any) -> None:
            start = time.process_time()
            ours.extend(start - end for end in last)
            reference_step()
            last[:] = [time.process_time()]
            others.append(last[0] - start)

        family.on_train_batch_start = take_turns  # type: ignore[assignment]
        fit(
            family, data, TrainingConfig(max_epochs=1), runtime.ComputeConfig(accelerator="cpu"),
            run=folder / "run", seed=0, precision=precision, device=device, checkpoint=None,
        )  # fmt: skip
    # The last step of ours is not followed by another: where it ends is not known.
    return Round(ours[WARM_UP:], others[WARM_UP:-1], precision)


def _data(folder: Path, num_batches: int) -> Any:
    from synthcube.data.manifest import read_manifest
    from synthcube.data.module import DataModule
    from synthcube.data.transforms import DataConfig

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
    return _bare_step(network, adamw, precision, clip_norm=1.0)


def _bare_step(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: str,
    clip_norm: float | None,
) -> Callable[[], None]:  # fmt: skip
    import torch

    x_t = torch.randn(BATCH_SIZE, 1, SIDE, SIDE)
    target = torch.randn_like(x_t)
    step = torch.randint(1000, (BATCH_SIZE,)).float()

    def take() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            prediction = network(x_t, step)
        torch.nn.functional.mse_loss(prediction.float(), target).backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()

    return take


def _own_network() -> torch.nn.Module:
    from bench.sampling import image_spec
    from synthcube.families.ddpm import DDPMConfig

    return DDPMConfig().build_network(image_spec(SIDE))


def _predecessor() -> torch.nn.Module:
    """The network that GaNDLF-Synth builds for its DDPM; it has as many weights as ours."""
    from generative.networks.nets import DiffusionModelUNet

    network: torch.nn.Module = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=(2, 2, 2, 2),
        num_channels=(32, 64, 64, 64), attention_levels=(False, False, True, True),
        norm_num_groups=32, norm_eps=1e-6, num_head_channels=8,
    )  # fmt: skip
    return network


def _rounds(reference: str, precision: str, options: Options) -> list[Round]:
    num_rounds, num_steps = (1, 2) if options.quick else (3, 12)
    return [apart(alternate, reference, precision, num_steps) for _ in range(num_rounds)]


def _row(name: str, rounds: list[Round], at_most: float | None) -> Row:
    ratios = [each.ratio for each in rounds]
    ours = median(median(each.ours) for each in rounds)
    reference = median(median(each.reference) for each in rounds)
    shown = (
        f"{median(ratios):.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f}; "
        f"{ours:.2f} against {reference:.2f} CPU-s)"
    )
    return Row(f"{name}, {rounds[0].precision}", median(ratios), shown, at_most=at_most)
