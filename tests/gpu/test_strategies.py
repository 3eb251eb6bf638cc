"""Every strategy on the GPUs that there are, against a plain training on one device."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube.models import registry

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ALONE = [name for name in registry.names() if not registry.find(name).tiny().optimizes_by_hand()]
ZERO_ON_A_CPU = Path(__file__).parents[1] / "training" / "zero_each_rank.py"
# Without noise, and without codes drawn at random: the same batches teach the same.
NO_NOISE = ("model.scheduler=null", "model.revive_below=0")


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["validation/loss"]) for row in csv.DictReader(file)
                if row["validation/loss"]]  # fmt: skip


def assert_finite(run: Path) -> None:
    weights = load_file(run / "artifact" / "weights.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("family", registry.names())
def test_ddp_on_every_gpu(
    family: str, tiny_config, train_apart, tmp_path: Path, accelerator: str
) -> None:
    number = 2 if accelerator == "cpu" else torch.cuda.device_count()
    if number < 2:
        pytest.skip("there is one GPU: ddp needs two")
    batch = f"training.batch_size={max(1, 8 // number) * number}"
    common = ["compute.strategy=ddp", batch, "model.scheduler=null", "compute.precision=auto"]
    devices = f"compute.num_devices={number}"
    ended = train_apart(tiny_config(family), "run", *common, devices, "training.max_epochs=1")
    assert ended.returncode == 0, ended.stderr
    ended = train_apart(tiny_config(family), "run", *common, devices)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("Continuing after epoch 1") == 1
    assert_finite(tmp_path / "run")


def test_ddp_learns_what_one_gpu_does(
    tiny_config, train_apart, tmp_path: Path, accelerator: str
) -> None:
    number = 2 if accelerator == "cpu" else torch.cuda.device_count()
    if number < 2:
        pytest.skip("there is one GPU: ddp needs two")
    for name, devices in (("one", 1), ("all", number)):
        ended = train_apart(
            tiny_config("vqvae"), name, *NO_NOISE, f"compute.num_devices={devices}",
            f"training.batch_size={max(1, 8 // number) * number}",
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "one"), rel=0.02)


SHARDED = """
from synthcube.training import fit
from synthcube.training.strategies import FullySharded
fit.strategy = lambda *args, **options: FullySharded()
"""


@pytest.mark.parametrize("family", ALONE)
def test_fsdp_on_one_device(
    family: str, tiny_config, train_apart, train_here: Callable[..., Path], tmp_path: Path
) -> None:
    """Really sharded, though into one piece; `compute.strategy: fsdp` alone would not do so."""
    common = ["compute.num_devices=1", "model.scheduler=null", "compute.precision=32"]
    plain = train_here(tiny_config(family), "plain", *common)
    ended = train_apart(tiny_config(family), "sharded", *common, before=SHARDED)
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "sharded") == pytest.approx(losses(plain), rel=0.02)
    assert_finite(tmp_path / "sharded")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_on_one_device(
    stage: int, tiny_config, train_apart, phantoms: Path, tmp_path: Path, accelerator: str
) -> None:
    if not importlib.util.find_spec("deepspeed"):
        pytest.skip("the extra deepspeed is not installed")
    if accelerator == "cpu" and not shutil.which("g++"):
        pytest.skip("DeepSpeed compiles C++ for a CPU, and there is no compiler")
    run = tmp_path / "run"
    common = ["compute.num_devices=1", "compute.strategy=deepspeed", "training.ema=null",
              f"compute.strategy_config={{stage: {stage}}}", "compute.precision=auto",
              *NO_NOISE]  # fmt: skip

    def train(*overrides: str) -> str:
        if accelerator == "gpu":
            ended = train_apart(tiny_config("vqvae"), "run", *common, *overrides)
        else:  # Lightning refuses a CPU; this script does not
            ended = subprocess.run(
                [sys.executable, str(ZERO_ON_A_CPU), str(tiny_config("vqvae")), str(phantoms),
                 str(run), *common, *overrides],
                env={"TORCH_EXTENSIONS_DIR": str(tmp_path / "built"), **os.environ,
                     "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                capture_output=True, text=True, timeout=600,
            )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return ended.stderr

    train("training.max_epochs=1")
    assert "Continuing after epoch 1" in train()
    assert_finite(run)
