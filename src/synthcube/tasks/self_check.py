"""Self-check: train, infer, evaluate and export each family on phantoms."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

import synthcube
from synthcube import compute, reading
from synthcube.data.phantom import write_phantoms
from synthcube.models import artifact, registry
from synthcube.models.family import Samples
from synthcube.sharing.config import ExportRequest
from synthcube.sharing.runtimes import NAMES, RuntimeName, RuntimeOrTorch, is_installed
from synthcube.storage import make_folder, sha256, write_text
from synthcube.tasks.evaluate import evaluate
from synthcube.tasks.export import export
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.inference_jobs import IMAGES
from synthcube.tasks.run_folder import CONFIG
from synthcube.tasks.train import train

_NUM_IMAGES, _SIDE, _SPACING_MM = 6, 16, (1.0, 1.5, 3.0)
# Largest error of a convolution in bfloat16, as a share of the largest value: rounding is 0.4%.
_MOST_ERROR = 0.02
_CHANNELS, _VOXELS, _PASSES = 32, 48, 5
_IN_FLOAT32 = "train volumes with compute.precision 32, or install a newer PyTorch and cuDNN"


class SelfCheckError(Exception):
    """A step failed: a fault of this installation or machine, not of a user's input."""


def self_check() -> Iterator[str]:
    """Train, sample and export the smallest model of every family, in a temporary folder.

    Yields:
        One line for each step that succeeded.
    """
    logging.getLogger("synthcube").setLevel(logging.WARNING)
    device = compute.device("auto")
    if device.type == "cuda" and compute.computes_in_bf16(device):
        yield _bf16_convolution(device)
    with tempfile.TemporaryDirectory(prefix="synthcube-self-check-") as name:
        for family in registry.names():
            for rank in (2, 3):
                folder = Path(name) / f"{family}-{rank}d"
                for step, run in _steps(folder, family, rank).items():
                    what = f"{family} in {rank}D, {step}"
                    yield f"{what}: {_timed(run, what):.1f} s"
        for runtime in NAMES:
            what = f"{registry.names()[0]} with {runtime}"
            if is_installed(runtime):
                run = partial(_convert, Path(name) / f"{registry.names()[0]}-2d", runtime)
                yield f"{what}: {_timed(run, what):.1f} s"
            else:
                yield f"{what}: not tried, it is not installed"


def _bf16_convolution(device: torch.device) -> str:
    """A line on a convolution of volumes in bfloat16 against float32.

    cuDNN before 9.15 with torch 2.9 computed it wrongly, slowly and with much memory.

    Raises SelfCheckError if it is wrong.
    """
    side = _VOXELS if device.type == "cuda" else 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, _CHANNELS, side, side, side, generator=generator)
    weight = torch.randn(_CHANNELS, _CHANNELS, 3, 3, 3, generator=generator)
    exact = torch.nn.functional.conv3d(x, weight, padding=1)
    what = "convolution of volumes in bfloat16"
    seconds, peaks = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = x.to(device, dtype), weight.to(device, dtype)
        output = torch.nn.functional.conv3d(inputs[0], inputs[1], padding=1)
        error = float((output.float().cpu() - exact).abs().max() / exact.abs().max())
        if not error < _MOST_ERROR:
            raise SelfCheckError(
                f"{what}: {dtype} is off by {error:.1%} of the largest value: {_IN_FLOAT32}."
            )
        seconds[dtype], peaks[dtype] = _cost(inputs, device)
    if device.type != "cuda":
        return f"{what}: right"
    slower = seconds[torch.bfloat16] / seconds[torch.float32]
    larger = peaks[torch.bfloat16] / peaks[torch.float32]
    advice = f": {_IN_FLOAT32}" if max(slower, larger) > 1.2 else ""
    return (
        f"{what}: right, {slower:.2f} times the time and {larger:.2f} times the memory of "
        f"float32{advice}"
    )


def _cost(inputs: Sequence[torch.Tensor], device: torch.device) -> tuple[float, int]:
    """Seconds of a few convolutions, and their peak of bytes on a GPU, which is 0 on a CPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(_PASSES):
        torch.nn.functional.conv3d(inputs[0], inputs[1], padding=1)
    if on_gpu:
        torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return time.perf_counter() - start, peak


def _steps(folder: Path, family: str, rank: int) -> dict[str, Callable[[], object]]:
    data, run, images, shared = (folder / name for name in ("data", "run", "images", "model"))
    return {
        "phantoms": lambda: _write_inputs(folder, data, family, rank),
        "train": lambda: train(folder / CONFIG, data, run),
        "infer": lambda: _infer(run, images, data),
        # of phantoms: images of so small a model are constant, and would be refused
        "evaluate": lambda: evaluate(
            data, data, folder / "results.yaml", config_path=folder / CONFIG
        ),
        "export": lambda: export(run, shared),
        "verify": lambda: _verify(shared, data, images, folder / "again"),
        "open in Python": lambda: _open(shared, data, images, folder / "opened"),
    }


def _timed(run: Callable[[], object], what: str) -> float:
    start = time.perf_counter()
    try:
        run()
    except Exception as error:
        raise SelfCheckError(f"{what}: {error}") from error
    return time.perf_counter() - start


def _write_inputs(folder: Path, data: Path, family: str, rank: int) -> None:
    make_folder(folder)
    if not data.exists():
        write_phantoms(data, num=_NUM_IMAGES, size=(_SIDE,) * rank, spacing_mm=_SPACING_MM)
    model_config = registry.find(family)
    model = model_config.tiny().model_dump(mode="json")
    if model_config.needs:
        first = folder / model_config.needs
        _write_inputs(first, data, model_config.needs, rank)
        train(first / CONFIG, data, first / "run")
        model["first_stage"] = str(first / "run")
    training = {"max_epochs": 1, "batch_size": 4, "sample_every_n_epochs": 0}
    light = {"extractor": {"name": "radiomic"}, "num_repeats": 2}
    # Lightning would start a process for each further GPU, and each would check all anew.
    one = {"num_devices": 1}
    content = {"model": model, "training": training, "evaluation": light, "compute": one}
    write_text(folder / CONFIG, reading.dump(content))


def _source(model: Path, data: Path) -> Path | None:
    """The images to reconstruct, for a family that does not generate any."""
    family = artifact.load(model).build(torch.device("cpu"))
    return None if isinstance(family, Samples) else data


def _verify(shared: Path, data: Path, images: Path, again: Path) -> None:
    """Check that the exported model makes the same images, byte for byte."""
    _infer(shared, again, data)
    _compare(images / IMAGES, again / IMAGES)


def _open(shared: Path, data: Path, images: Path, opened: Path) -> None:
    """Check that from_pretrained makes the same images from the same seed."""
    model = synthcube.from_pretrained(shared)
    images_of_python = model.reconstruct(data) if _source(shared, data) else model.sample(3)
    images_of_python.save(opened)
    _compare(images / IMAGES, opened)


def _convert(folder: Path, runtime: RuntimeName) -> None:
    """Export for a runtime, which compares its outputs with those of torch, and infer with it."""
    shared, data = folder / runtime, folder / "data"
    export(folder / "run", shared, ExportRequest(runtimes=(runtime,)))
    _infer(shared, folder / f"{runtime}-images", data, runtime)


def _infer(model: Path, out: Path, data: Path, runtime: RuntimeOrTorch = "torch") -> None:
    infer(InferRequest(model, out, num_images=3, data=_source(model, data), runtime=runtime))


def _compare(one: Path, other: Path) -> None:
    first, second = ([sha256(path) for path in sorted(folder.iterdir())] for folder in (one, other))
    if first != second:
        raise ValueError(f"the exported model makes other images: {first} and {second}")
