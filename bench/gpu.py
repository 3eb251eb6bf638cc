"""Training and sampling on a GPU, against bare loops and the card's own ceiling.

Our training and a bare PyTorch loop of the same network take turns in one process: between blocks
of our steps, which Lightning drives, come blocks of bare ones. Both are timed from an idle device
to an idle device. The bare loop has forward, mean squared error, backward, clipping and AdamW on
tensors in memory; ours has the data, the averaged weights and the log too.
"""

from __future__ import annotations

import argparse
import gc
import io
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

GOAL = 0.95
SAMPLING_STEPS = 20
ROW_SECONDS = 6.0  # of measured blocks
COMPILE_SECONDS = 90.0  # expected of a row whose two networks are compiled


@dataclass(frozen=True)
class Case:
    """A network, and the batches that it is trained with."""

    name: str
    size: tuple[int, ...]
    batch_size: int
    channels: int = 1
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """How a network is computed, by ours and by the bare loop alike."""

    name: str
    precision: str = "bf16-mixed"
    tf32: bool = True
    compiled: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class Result:
    """One row of the table; times are those of a step, in seconds."""

    case: Case
    setting: Setting
    ours: float = 0.0
    bare: float = 0.0
    flops: int = 0  # floating-point operations of a step
    peak_gb: float = 0.0
    idle_share: float = 0.0  # of the steps before which the device had nothing left to do
    fault: str = ""

    @property
    def ratio(self) -> float:
        """Our speed over that of the bare loop."""
        return self.bare / self.ours


WIDE = {"channels": [128, 256, 256], "num_res_blocks": 1, "attention_from": 1,
        "num_head_channels": 256, "wavelet_levels": 0}  # fmt: skip
LATENT = {"channels": [256, 256, 512], "num_res_blocks": 2, "attention_from": 1,
          "num_head_channels": 64, "wavelet_levels": 0}  # fmt: skip
CASES = (
    Case("2D default, 64x64", (64, 64), 64),
    Case("2D default, 256x256", (256, 256), 16),
    Case("2D 128/256/256 channels, 64x64", (64, 64), 64, model=WIDE),
    Case("3D default, 64x64x64", (64, 64, 64), 4),
    Case("3D default, 128x128x128", (128, 128, 128), 1),
    Case("latent step, 4x64x64", (64, 64), 16, channels=4, model=LATENT),
)
# The most telling first: where the time ends, the last are left out.
SETTINGS = (
    Setting("bf16"),
    Setting("bf16, channels last", channels_last=True),
    Setting("tf32", precision="32-true"),
    Setting("fp32", precision="32-true", tf32=False),
    Setting("bf16, compiled", compiled=True),
)
TINY = {"channels": [8, 8], "num_res_blocks": 1, "attention_from": 1, "num_norm_groups": 2}
QUICK_CASES = (
    Case("2D tiny", (16, 16), 2, model=TINY),
    Case("3D tiny", (8, 8, 8), 1, model=TINY),  # most CPUs have no fast bfloat16
)
ROWS = tuple((case, setting) for setting in SETTINGS for case in CASES)
QUICK_ROWS = (
    *((case, setting) for setting in SETTINGS[:2] for case in QUICK_CASES),
    (QUICK_CASES[0], SETTINGS[4]),
)


def main(words: Sequence[str]) -> int:
    """Measure, print the tables and save them; 1 where the goal is missed on a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="later rows are left out")
    parser.add_argument("--output", type=Path, default=Path("gpu-bench.md"), help="the tables")
    parser.add_argument("--quick", action="store_true", help="tiny networks, only to see it run")
    options = parser.parse_args(words)
    import torch

    if options.device == "gpu" and not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU here; --device cpu runs it on the CPU")
    device = torch.device("cuda" if options.device == "gpu" else "cpu")
    end = time.monotonic() + 60 * options.minutes
    cases, rows = (QUICK_CASES, QUICK_ROWS) if options.quick else (CASES, ROWS)
    ceiling = matmul_ceiling(device, quick=options.quick)
    results, left_out = measured(rows, device, end, quick=options.quick)
    samplings = sampled(cases, device, end, left_out, 2 if options.quick else SAMPLING_STEPS)
    text = "\n".join(report(results, samplings, left_out, ceiling, device, quick=options.quick))
    print(text)
    options.output.write_text(text + "\n", encoding="utf-8")
    judged = device.type == "cuda" and not options.quick
    return int(judged and any(best.ratio < GOAL for best in best_of_each(results)))


def measured(
    rows: Sequence[tuple[Case, Setting]], device: Any, end: float, *, quick: bool
) -> tuple[list[Result], list[str]]:
    """The rows that there was time for, and the names of the others."""
    results: list[Result] = []
    left_out: list[str] = []
    longest = 0.0
    for case, setting in rows:
        start = time.monotonic()
        expected = max(longest, COMPILE_SECONDS) if setting.compiled and not quick else longest
        if start + expected > end:
            left_out.append(f"{case.name}, {setting.name}")
            continue
        results.append(row(case, setting, device, quick=quick))
        if not setting.compiled:
            longest = max(longest, time.monotonic() - start)
    return results, left_out


def row(case: Case, setting: Setting, device: Any, *, quick: bool) -> Result:
    """One row, or its fault, such as too little memory."""
    import torch

    from synthcube.errors import SynthCubeError

    try:
        with (
            TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),  # no progress bar
            tf32(setting.tf32),
        ):
            warnings.simplefilter("ignore")
            return train_in_turns(case, setting, device, Path(folder), quick=quick)
    except (RuntimeError, SynthCubeError) as error:
        return Result(case, setting, fault=str(error).strip().splitlines()[0][:100])
    finally:
        gc.collect()
        if setting.compiled:
            torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def train_in_turns(
    case: Case, setting: Setting, device: Any, folder: Path, *, quick: bool
) -> Result:
    """Train as `synthcube train` does, with bare steps between blocks of steps."""
    from synthcube.compute import ComputeConfig
    from synthcube.training import TrainingConfig, TrainingRun, fit

    data = _data(case, folder, num_batches=6 if quick else 10_000)
    family = _family(case, data.image, setting).to(device)
    backend = "eager" if quick else "inductor"
    compute = ComputeConfig.model_validate({
        "accelerator": "gpu" if device.type == "cuda" else "cpu", "num_devices": 1,
        "compile": {"backend": backend} if setting.compiled else None,
    })  # fmt: skip
    training = TrainingConfig(
        max_epochs=1, batch_size=case.batch_size, sample_every_n_epochs=0,
        log_every_n_steps=10_000,
    )  # fmt: skip
    turns = Turns(
        device, lambda: bare_step(case, setting, data.image, device, backend),
        steps=1 if quick else 5, seconds=0.0 if quick else ROW_SECONDS,
    )  # fmt: skip
    turns.attach(family)
    run = TrainingRun(
        data, training, compute, folder / "run", 0, setting.precision, device
    )  # fmt: skip
    fit(family, run)
    return Result(
        case, setting, median(turns.ours), median(turns.bare), turns.flops, turns.peak_gb,
        turns.idle / max(1, turns.looked),
    )  # fmt: skip


class Turns:
    """Blocks of our steps and of bare ones, in turns, from the hooks of a training.

    Args:
        bare: builds the bare loop; returns its step, and the operations of one.
        steps: in each block.
        seconds: after so long the training ends, once each has been measured twice.
    """

    def __init__(
        self, device: Any, bare: Callable[[], tuple[Callable[[], None], int]], steps: int,
        seconds: float,
    ) -> None:  # fmt: skip
        self.device, self.build, self.steps, self.seconds = device, bare, steps, seconds
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.flops, self.peak_gb = 0, 0.0
        self.idle = self.looked = 0
        self._take: Callable[[], None] | None = None
        self._number, self._first, self._since = 0, 0.0, 0.0
        self._finished: Any = None

    def attach(self, family: Any) -> None:
        """Let a family call this before and after each batch."""

        def before(*_: Any) -> None:
            self._look()
            if self._number % self.steps == 0:
                self._turn(family)
            self._number += 1

        family.on_train_batch_start = before
        family.on_train_batch_end = lambda *_: self._mark()

    def _look(self) -> None:
        """Count whether the device has done all its work before it gets the next batch."""
        if self._finished is not None:
            self.looked += 1
            self.idle += int(self._finished.query())

    def _mark(self) -> None:
        if self.device.type == "cuda":
            import torch

            self._finished = torch.cuda.Event()
            self._finished.record()

    def _turn(self, family: Any) -> None:
        seconds = (self._now() - self._since) / self.steps
        if self._number == self.steps:  # the first block has chosen and compiled kernels
            self.peak_gb = self._peak_gb()
            self._take, self.flops = self.build()
            self._block()
            self._first = self._now()
        elif self._take is not None:
            self.ours.append(seconds)
            self.bare.append(self._block())
            late = self._now() - self._first > self.seconds
            if late and len(self.ours) >= 2:
                family.trainer.should_stop = True
        self._finished = None  # the device is idle here because we waited for it
        self._since = self._now()

    def _block(self) -> float:
        """Seconds of a bare step, from a block of them."""
        assert self._take is not None
        start = self._now()
        for _ in range(self.steps):
            self._take()
        return (self._now() - start) / self.steps

    def _now(self) -> float:
        wait(self.device)
        return time.perf_counter()

    def _peak_gb(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        import torch

        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


def bare_step(
    case: Case, setting: Setting, image: Any, device: Any, backend: str
) -> tuple[Callable[[], None], int]:
    """A step of the bare loop, and its floating-point operations."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = _family(case, image, setting).network.to(device).train()
    # The fastest that PyTorch has.
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, fused=device.type == "cuda")
    shape = (case.batch_size, case.channels, *case.size)
    x_t, target = (torch.randn(shape, device=device) for _ in range(2))
    t = torch.rand(case.batch_size, device=device) * 1000
    nothing = {
        name: torch.zeros(case.batch_size, 0, device=device) for name in ("values", "source")
    }

    def pass_through() -> None:
        with torch.autocast(device.type, torch.bfloat16, setting.precision == "bf16-mixed"):
            prediction = network(x_t, t, nothing)
        torch.nn.functional.mse_loss(prediction.float(), target).backward()

    with FlopCounterMode(display=False) as counter:
        pass_through()
    optimizer.zero_grad()
    if setting.compiled:
        network.compile(backend=backend)

    def take() -> None:
        optimizer.zero_grad()
        pass_through()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    take()  # compiles
    return take, counter.get_total_flops()


def sampled(
    cases: Sequence[Case], device: Any, end: float, left_out: list[str], steps: int
) -> list[tuple[Case, float]]:
    """Seconds of a batch of images in bfloat16, after one to choose kernels."""
    import numpy as np

    from synthcube.models import inference

    seconds: list[tuple[Case, float]] = []
    for case in cases:
        if time.monotonic() > end:
            left_out.append(f"{case.name}, sampling")
            continue
        image = _spec(case)
        family: Any = _family(case, image, SETTINGS[0], steps).to(device).eval()
        seeds = inference.image_seeds(0, case.batch_size)
        values = np.zeros((case.batch_size, 0), np.float32)
        for _ in range(2):
            start = time.perf_counter()
            inference.generate(family, seeds, values, "bf16-mixed", device)  # ends on the CPU
        seconds.append((case, time.perf_counter() - start))
    return seconds


def matmul_ceiling(device: Any, *, quick: bool) -> float:
    """The most operations in a second that a product of bfloat16 matrices reaches."""
    import torch

    side = 8192 if device.type == "cuda" and not quick else 256
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        for _ in range(5):
            one @ other
        wait(device)
        rates.append(5 * 2 * side**3 / (time.perf_counter() - start))
    return max(rates)


def report(
    results: Sequence[Result], samplings: Sequence[tuple[Case, float]], left_out: Sequence[str],
    ceiling: float, device: Any, *, quick: bool,
) -> Iterator[str]:  # fmt: skip
    """The lines of the Markdown page."""
    yield f"# Speed on {machine(device)}, {date.today().isoformat()}"
    yield ""
    yield from versions(device)
    yield f"- bfloat16 matrix product: {ceiling / 1e12:.3g} TFLOP/s, which is the ceiling below"
    if quick:
        yield "- tiny networks: these numbers mean nothing"
    yield ""
    yield (
        "| network | batch | setting | images/s | ms a step | bare loop, ms | over the bare loop "
        "| share of the ceiling | peak GB | idle before a step |"
    )
    yield "|" + " --- |" * 10
    order = {case.name: place for place, case in enumerate((*CASES, *QUICK_CASES))}
    for one in sorted(results, key=lambda result: order[result.case.name]):
        yield line(one, ceiling, device)
    yield ""
    yield f"| network | images at once | s for {SAMPLING_STEPS} steps, bfloat16 | images/s |"
    yield "|" + " --- |" * 4
    for case, seconds in samplings:
        rate = case.batch_size / seconds
        yield f"| {case.name} | {case.batch_size} | {seconds:.3g} | {rate:.3g} |"
    yield ""
    for best in best_of_each(results):
        verdict = "met" if best.ratio >= GOAL else "MISSED"
        shown = "" if quick or device.type == "cpu" else f": the goal of {GOAL} is {verdict}"
        yield (
            f"- {best.case.name}: fastest in {best.setting.name}, {best.ratio:.2f} of the speed of "
            f"the bare loop{shown}"
        )
    if left_out:
        yield f"- left out, for the time was up: {'; '.join(left_out)}"


def line(one: Result, ceiling: float, device: Any) -> str:
    """A result as a row of the table."""
    start = f"| {one.case.name} | {one.case.batch_size} | {one.setting.name} |"
    if one.fault:
        return f"{start} failed: {one.fault} | | | | | | |"
    share = one.flops / one.ours / ceiling
    on_gpu = device.type == "cuda"
    peak, idle = (f"{one.peak_gb:.2f}", f"{one.idle_share:.0%}") if on_gpu else ("", "")
    return (
        f"{start} {one.case.batch_size / one.ours:.3g} | {1000 * one.ours:.2f} "
        f"| {1000 * one.bare:.2f} | {one.ratio:.3f} | {share:.1%} | {peak} | {idle} |"
    )


def best_of_each(results: Sequence[Result]) -> list[Result]:
    """The fastest setting of each network."""
    best: dict[str, Result] = {}
    for one in results:
        name = one.case.name
        if not one.fault and (name not in best or one.ours < best[name].ours):
            best[name] = one
    return list(best.values())


def machine(device: Any) -> str:
    """Name of the card, or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU ({torch.cpu.get_capabilities().get('cpu_name') or 'unnamed'})"


def versions(device: Any) -> Iterator[str]:
    """Versions of what computes, as list items."""
    import torch

    yield f"- torch {torch.__version__}, CUDA {torch.version.cuda}"
    if device.type == "cuda":
        yield f"- cuDNN {torch.backends.cudnn.version()}"
        words = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        try:
            told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
            yield f"- driver and memory: {told.stdout.splitlines()[0]}"
        except (OSError, subprocess.SubprocessError, IndexError):
            yield "- driver: nvidia-smi does not tell"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let float32 matrices and convolutions be multiplied with TF32, or not."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def wait(device: Any) -> None:
    """Return once the device has done all its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _family(case: Case, image: Any, setting: Setting, steps: int | None = None) -> Any:
    import torch

    from synthcube.models.families.rectified_flow import RectifiedFlowConfig

    model = {"name": "rectified_flow", **case.model}
    if steps:
        model["num_sampling_steps"] = steps
    family: Any = RectifiedFlowConfig.model_validate(model).build(image)
    if setting.channels_last:
        is_2d = len(case.size) == 2
        family.to(memory_format=torch.channels_last if is_2d else torch.channels_last_3d)
    return family


def _spec(case: Case) -> Any:
    from bench.sampling import image_spec

    ranges = ((0, 255),) * case.channels
    return image_spec(8).model_copy(
        update={"size": case.size, "channels": case.channels, "intensity_range": ranges}
    )


def _data(case: Case, folder: Path, num_batches: int) -> Any:
    """Batches of a few images, over and over: their number does not matter to the speed."""
    from synthcube.data.manifest import read_manifest
    from synthcube.data.module import DataModule
    from synthcube.data.phantom import write_phantoms
    from synthcube.data.preprocessing import DataConfig

    number = 2 * case.batch_size
    written = write_phantoms(folder / "data", num=number, size=case.size, channels=case.channels)
    config = DataConfig(size=case.size, validation_fraction=0)
    data: Any = DataModule(
        read_manifest(written.parent), config, batch_size=case.batch_size, seed=0,
        cache=folder / "cache",
    )  # fmt: skip
    repeated = list(range(number)) * (num_batches * case.batch_size // number)
    data.rows = lambda split: repeated if split == "train" else []
    return data
