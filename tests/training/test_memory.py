"""The estimate of memory against what trainings take, and what is said when there is too little."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from synthcube import environment
from synthcube.compute import ComputeConfig
from synthcube.models import registry
from synthcube.schema import ImageSpec
from synthcube.storage import sha256
from synthcube.training import TrainingConfig, memory

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def spec(side: int, rank: int = 2) -> ImageSpec:
    return ImageSpec(
        size=(side,) * rank, channels=1, spacing_mm=(1, 1, 1),
        affine=((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
        intensity_range=((0, 255),), file_format="png",
    )  # fmt: skip


def need(name: str = "ddpm", **training: object) -> memory.MemoryEstimate:
    model = registry.find(name).tiny()
    return memory.MemoryEstimate(
        model, spec(16), TrainingConfig(**training), ComputeConfig(), "32-true", CPU
    )


@pytest.mark.parametrize("family", registry.names())
def test_a_traced_step_takes_what_a_real_one_does(family: str, monkeypatch) -> None:
    config, training = registry.find(family).tiny(), TrainingConfig(batch_size=3)
    real = memory.estimate(config, spec(16), training, mixed=False)
    monkeypatch.setattr(memory, "_REAL_STEP_LIMIT", 0)
    traced = memory.estimate(config, spec(16), training, mixed=False)
    assert traced.step == pytest.approx(real.step, rel=0.1)
    assert (traced.weights, traced.optimizer) == (real.weights, real.optimizer)


def test_every_part_is_counted() -> None:
    model = registry.find("ddpm").tiny()
    plain = memory.estimate(model, spec(16), TrainingConfig(ema=None), mixed=False)
    weights = sum(weight.numel() * 4 for weight in model.build(spec(16)).parameters())
    assert plain.weights >= weights
    assert plain.optimizer == 2 * weights, "AdamW keeps two moments"
    assert plain.average == 0
    other = type(model).model_validate(model.model_dump() | {"optimizer": {"name": "SGD"}})
    assert memory.estimate(other, spec(16), TrainingConfig(), mixed=False).optimizer == 0
    averaged = memory.estimate(model, spec(16), TrainingConfig(), mixed=False)
    assert averaged.average == averaged.weights
    twice = memory.estimate(
        model, spec(16), TrainingConfig(batch_size=32), mixed=False, num_workers=2
    )
    assert 1.8 < twice.step / averaged.step < 2.0
    assert twice.loading == 4 * 32 * 16 * 16 * 4
    half = memory.estimate(model, spec(16), TrainingConfig(), mixed=False, processes=2)
    assert 0.5 < half.step / averaged.step < 0.6
    added = memory.estimate(model, spec(16), TrainingConfig(accumulate=2), mixed=False)
    assert added.step == averaged.step + weights
    dcgan = registry.find("dcgan").tiny()
    family = dcgan.build(spec(16))
    both = sum(weight.numel() * 4 for weight in family.parameters())
    assert memory.estimate(dcgan, spec(16), TrainingConfig(), mixed=False).optimizer == 2 * both


def test_an_estimate_draws_nothing() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    need().estimate()
    _ = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())


SMALL = {"channels": [16, 32, 64], "attention_from": 2, "num_res_blocks": 1}
GRID = [
    {"family": "ddpm", "size": [32, 32], "batch_size": 16},
    {"family": "ddpm", "size": [64, 64], "batch_size": 8, "channels": 3},
    {"family": "ddpm", "size": [64, 64], "batch_size": 16, "recomputed": True},
    {"family": "ddpm", "size": [32, 32, 32], "batch_size": 2, "model": SMALL},
    {"family": "ddpm", "size": [32, 32, 32], "batch_size": 2, "model": SMALL, "recomputed": True},
    {"family": "rectified_flow", "size": [32, 32, 32], "batch_size": 4},
    {"family": "rectified_flow", "size": [64, 64], "batch_size": 16},
    {"family": "autoencoder_kl", "size": [64, 64], "batch_size": 8},
    {"family": "vqvae", "size": [64, 64], "batch_size": 16},
    {"family": "dcgan", "size": [64, 64], "batch_size": 16},
    {"family": "rectified_flow", "size": [32, 32], "batch_size": 8,
     "privacy": {"draws": 2, "images_at_once": 4}},
]  # fmt: skip
WORKSPACES = 30e6  # of kernels, which pass for libraries


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=lambda case: json.dumps(case).replace('"', ""))
def test_the_estimate_is_within_15_percent_on_a_cpu(case: dict[str, Any]) -> None:
    """Of the growth of a process that trains three steps, as `train` does."""
    done = subprocess.run(
        [sys.executable, str(HERE / "peak_of_training.py"), json.dumps(case)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken, estimated = map(int, done.stdout.splitlines()[-1].split()[:2])
    ratio = estimated / (taken - WORKSPACES)
    assert 0.85 < ratio < 1.15, f"{estimated / 1e6:.0f} of {taken / 1e6:.0f} MB: {ratio:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "published"), [((64, 64, 32), 5), ((64, 64, 64), 8), ((128, 128, 192), 58)]
)
def test_published_memory_of_maisi_is_reproduced_within_25_percent(
    size: tuple[int, ...], published: float
) -> None:
    """NV-Generate-CTMR's table of training its diffusion model among latents of 4 channels.

    256x256x128, 256x256x256 and 512x512x768 voxels have latents of these sizes. The network is
    ours with MAISI's widths, blocks and attention; about 1 GB is CUDA and its libraries.
    """
    model = registry.find("ddpm").model_validate(
        {"name": "ddpm", "channels": [64, 128, 256, 512], "num_head_channels": 32}
    )
    latents = spec(64, 3).model_copy(
        update={"size": size, "channels": 4, "intensity_range": ((0, 1),) * 4}
    )
    training = TrainingConfig(batch_size=1, ema=None)
    estimated = memory.estimate(model, latents, training, mixed=True, on_gpu=True).on_device
    assert (estimated / 1e9 + 1) / published == pytest.approx(1, abs=0.25)


def test_recomputed_norms_are_those_of_the_first_pass_under_cudas_autocast() -> None:
    """Checked by PyTorch, in the backward pass of a step too large to be computed for real."""
    model = registry.find("ddpm").model_validate({"name": "ddpm"})
    kept, recomputed = (
        memory.estimate(
            model, spec(64), TrainingConfig(), mixed=True, on_gpu=True, recomputed=recomputed
        ).step
        for recomputed in (False, True)
    )
    assert recomputed < 0.6 * kept


def test_norms_stay_in_float32_under_cudas_autocast() -> None:
    """So a step takes more than a CPU's autocast, and less than one in float32."""
    model = registry.find("ddpm").tiny()
    training = TrainingConfig(batch_size=16)
    half, cuda, full = (
        memory.estimate(model, spec(16), training, mixed=mixed, on_gpu=on_gpu).step
        for mixed, on_gpu in ((True, False), (True, True), (False, True))
    )
    assert half < cuda
    assert half < full


def test_a_training_that_does_not_fit_is_warned_of_with_values_that_do() -> None:
    wide = need(batch_size=16)
    needed = wide.bytes_needed()
    assert memory.warning(wide, needed, needed) == ""
    text = memory.warning(wide, needed, needed // 3)
    assert "These help most: " in text
    named = [part.split(" (")[0] for part in text.split("most: ")[1].split("; ")]
    assert len(named) == 3
    assert any(part.startswith("training.batch_size=4 training.accumulate=4") for part in named)
    less = need(batch_size=4, accumulate=4)
    assert less.bytes_needed() <= needed // 3
    alone = need(batch_size=1)
    text = memory.warning(alone, needed, 1)
    assert "training.batch_size" not in text
    assert "data.size=[8, 8]" in text


@pytest.mark.parametrize("family", registry.names())
def test_every_value_that_is_advised_is_one_that_trains(family: str) -> None:
    short = need(family, batch_size=6)
    for _, other in (*memory._smaller_batch(short, 0), *memory._cheaper_step(short),
                     *memory._smaller_model(short)):  # fmt: skip
        assert other.bytes_needed() < 1.01 * short.bytes_needed()
        assert other.model.faults(other.image) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "), True),
        (RuntimeError("[enforce fail a"), True),  # as long as a text may be that takes no memory
        (RuntimeError("[enforce fail at pybind.cpp:3] wrong"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_failed_allocation_looks_like(error: Exception, expected: bool) -> None:
    assert memory.is_shortage(error) is expected


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    assert 0 < environment.free_memory() < 1 << 50
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2000 kB\n")
    assert environment.free_memory(tmp_path) == 2000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("400000\n")
    (group / "memory.max").write_text("max\n")
    assert environment.free_memory(tmp_path) == 2000 * 1024
    (group / "memory.max").write_text("1000000\n")
    assert environment.free_memory(tmp_path) == 600000


LIMITED = """
import resource, sys
import lightning, monai, torchio  # what is loaded anyway is no part of the limit
from synthcube.tasks import train, infer
from synthcube.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""


def limited(megabytes: int, *words: object) -> subprocess.CompletedProcess[str]:
    """A command that may take so much more memory than its libraries."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes << 20), *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_memory_that_runs_out_is_explained_and_leaves_the_last_checkpoint(
    cli, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["train", "-c", tiny_config("ddpm"), "-d", phantoms, "-o", run,
             "--set", "model.channels=[256, 256]", "--set", "training.batch_size=8",
             "--set", "model.scheduler=null"]  # fmt: skip
    fresh = limited(250, *words)
    assert fresh.returncode == 2, fresh.stderr
    assert "it may run out of memory. These help most: " in fresh.stderr
    assert "error: Out of memory on this machine or container" in fresh.stderr
    assert "There is no checkpoint yet, and nothing half-written." in fresh.stderr
    assert fresh.stderr.count("  - ") == 3
    assert "training.batch_size=" in fresh.stderr
    assert "Traceback" not in fresh.stderr
    assert cli(*words, "--set", "training.max_epochs=1")[0] == 0
    last = run / "checkpoints" / "last.ckpt"
    before = sha256(last)
    again = limited(250, *words)
    assert again.returncode == 2, again.stderr
    assert re.search(rf"checkpoint,? {re.escape(str(last))}, (which )?is intact", again.stderr)
    assert sha256(last) == before
    code, _, err = cli(*words)
    assert code == 0, err
    assert "Continuing after epoch 1" in err


@pytest.mark.slow
def test_memory_that_runs_out_while_images_are_made(
    tiny_config, phantoms: Path, tmp_path: Path, cli
) -> None:
    config = tiny_config("rectified_flow")
    assert cli("train", "-c", config, "-d", phantoms, "-o", tmp_path / "run")[0] == 0
    ended = limited(
        60, "infer", "-m", tmp_path / "run", "-o", tmp_path / "images", "-n", "20000",
        "--batch_size", "20000",
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert "Out of memory while sampling 20000 image(s) at once" in ended.stderr
    assert "use --batch_size 10000." in ended.stderr
    assert not (tmp_path / "images" / "manifest.csv").exists()
