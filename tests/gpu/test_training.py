"""What a training does differently on a GPU: precision, compilation, memory, and a kernel."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from synthcube import compute
from synthcube.models import registry

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

HERE = Path(__file__).parent
DETERMINISTIC = "compute.deterministic=true"
WITHOUT_BLOCKS = {"dcgan"}
DIFFERENTIATED_TWICE = {"stylegan"}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["validation/loss"]) for row in csv.DictReader(file)
                if row["validation/loss"]]  # fmt: skip


def test_auto_is_bfloat16_where_the_gpu_computes_in_it(
    device: torch.device, tiny_config, train_here: Callable[..., Path]
) -> None:
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    else:
        has_bfloat16 = compute.computes_in_bf16(device)
    expected = "bf16-mixed" if has_bfloat16 else "32-true"
    assert compute.resolve_precision("auto", device)[0] == expected
    run = train_here(tiny_config(), "run", "compute.precision=auto", "training.max_epochs=1")
    record = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert expected in json.dumps(record)


@pytest.mark.parametrize("family", sorted({*registry.names()} - WITHOUT_BLOCKS))
def test_activation_checkpointing_changes_no_bit(
    family: str, tiny_config, train_here: Callable[..., Path]
) -> None:
    common = ["training.max_epochs=1", DETERMINISTIC]
    plain = weights(train_here(tiny_config(family), "plain", *common))
    again = [*common, "compute.activation_checkpointing=true"]
    recomputed = weights(train_here(tiny_config(family), "recomputed", *again))
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []


@pytest.mark.parametrize("family", sorted({*registry.names()} - DIFFERENTIATED_TWICE))
def test_compiled_networks_learn_the_same(
    family: str, tiny_config, train_apart, train_here: Callable[..., Path], tmp_path: Path
) -> None:
    """In a process of its own: a compiler's imports warn. Its kernels round otherwise."""
    plain = train_here(tiny_config(family), "plain")
    one = "compute.num_devices=1"
    ended = train_apart(tiny_config(family), "compiled", one, "compute.compile=true")
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(plain), rel=0.02)
    assert not [name for name in weights(tmp_path / "compiled") if "_orig_mod" in name]


LITTLE_MEMORY = {
    "gpu": """
import torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(1e8 / total)
""",
    "cpu": """
import resource
import lightning, monai, torchio  # what is loaded anyway is no part of the limit
from synthcube.tasks import train
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (250 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
""",
}


def test_out_of_memory_names_three_keys(tiny_config, train_apart, accelerator: str) -> None:
    ended = train_apart(
        tiny_config("ddpm"), "run", "compute.num_devices=1", "model.channels=[256, 256]",
        "training.batch_size=8", before=LITTLE_MEMORY[accelerator],
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    where = "the GPU" if accelerator == "gpu" else "this machine or container"
    assert f"error: Out of memory on {where}" in ended.stderr
    assert ended.stderr.count("  - ") == 3
    assert "There is no checkpoint yet, and nothing half-written." in ended.stderr
    assert "Traceback" not in ended.stderr


SMALL = {"channels": [16, 32, 64], "attention_from": 2, "num_res_blocks": 1}
CASES: list[dict[str, Any]] = [
    {"family": "rectified_flow", "size": [64, 64], "batch_size": 16},
    {"family": "rectified_flow", "size": [64, 64], "batch_size": 16, "precision": "bf16-mixed"},
    {"family": "rectified_flow", "size": [64, 64], "batch_size": 16, "recomputed": True},
    {"family": "rectified_flow", "size": [32, 32, 32], "batch_size": 4, "model": SMALL},
    {"family": "autoencoder_kl", "size": [64, 64], "batch_size": 16},
    {"family": "dcgan", "size": [64, 64], "batch_size": 32},
]
WORKSPACES = 40e6
"""Bytes of cuBLAS's and cuDNN's workspaces, which the estimate does not know."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: json.dumps(case).replace('"', ""))
def test_the_estimate_is_within_a_quarter_of_the_peak(
    case: dict[str, Any], accelerator: str
) -> None:
    if (accelerator, case.get("precision")) == ("cpu", "bf16-mixed"):
        pytest.skip("the estimate for a CPU is tested in tests/training/test_memory.py")
    script = HERE.parent / "training" / "peak_of_training.py"
    ended = subprocess.run(
        [sys.executable, str(script), json.dumps({**case, "accelerator": accelerator})],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    taken, estimated = map(int, ended.stdout.splitlines()[-1].split()[:2])
    low, high = max(1.0, taken - WORKSPACES), taken
    assert 0.75 * low < estimated < 1.25 * high, f"{estimated / 1e6:.0f} of {taken / 1e6:.0f} MB"


@pytest.mark.parametrize(("channels", "side"), [(16, 32), (64, 48)])
def test_a_convolution_of_volumes_in_bfloat16_is_right_fast_and_small(
    channels: int, side: int, device: torch.device
) -> None:
    """cuDNN before 9.15 with torch 2.9 computed it wrongly, slowly and with much memory."""
    on_gpu = device.type == "cuda"
    if on_gpu and not compute.computes_in_bf16(device):
        pytest.skip("this GPU does not compute in bfloat16")
    side = side if on_gpu else 6
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, side, side, side, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, 3, generator=generator) / (channels * 27) ** 0.5
    expected = functional.conv3d(x, weight, padding=1)
    seconds, peaks = {}, {}
    for dtype, bound in ((torch.float32, 0.002), (torch.bfloat16, 0.02)):
        inputs = [value.to(device, dtype).requires_grad_() for value in (x, weight)]
        output = _convolved(inputs, device)
        error = (output.float().cpu() - expected).abs().max() / expected.abs().max()
        assert float(error) < bound, f"{dtype}: off by {float(error):.2g} of the largest value"
        seconds[dtype], peaks[dtype] = _cost(inputs, device)
    if on_gpu:
        assert seconds[torch.bfloat16] < 1.5 * seconds[torch.float32], seconds
        assert peaks[torch.bfloat16] < 1.2 * peaks[torch.float32], peaks


def _convolved(inputs: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    output = functional.conv3d(*inputs, padding=1)
    output.float().square().mean().backward()
    assert all(torch.isfinite(value.grad).all() for value in inputs if value.grad is not None)
    return output.detach()


def _cost(inputs: list[torch.Tensor], device: torch.device) -> tuple[float, int]:
    """Seconds of five passes, and the peak in bytes, which is 0 on a CPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(5):
        _convolved(inputs, device)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if on_gpu else 0
