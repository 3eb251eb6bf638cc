"""Prints the bytes by which a training grows this process at most, and those estimated.

python tests/training/peak_of_training.py '{"family": "ddpm", "size": [64, 64], "batch_size": 16}'

Further keys: channels of the images, model (settings of the family), precision (Lightning's full
name), recomputed (activation checkpointing), privacy and accelerator; on a GPU it is its memory
that counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from synthcube.compute import ComputeConfig
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.phantom import write_phantoms
from synthcube.data.preprocessing import DataConfig
from synthcube.models import registry
from synthcube.training import TrainingConfig, TrainingRun, fit
from synthcube.training.accountant import Budget
from synthcube.training.memory import MemoryEstimate

NUM_STEPS = 3


def train(case: dict[str, Any], folder: Path) -> MemoryEstimate:
    batch_size, channels = case["batch_size"], case.get("channels", 1)
    written = write_phantoms(
        folder / "data", num=NUM_STEPS * batch_size, size=case["size"], channels=channels
    )
    data = DataModule(
        read_manifest(written.parent), DataConfig(validation_fraction=0), batch_size=batch_size,
        seed=0, cache=folder / "cache", private="privacy" in case,
    )  # fmt: skip
    training = TrainingConfig(
        max_epochs=1, batch_size=batch_size, sample_every_n_epochs=0, privacy=case.get("privacy")
    )
    budget = None
    if training.privacy:
        subjects = len(data.training_subjects)
        budget = Budget(subjects, batch_size, 1e-3, training.privacy.clip_norm, sigma=1.0)
    kind = registry.find(case["family"])
    config = kind.model_validate({"name": case["family"], **case.get("model", {})})
    module = config.build(data.image)
    module.fit_statistics(data.every_image(), data.rows("train"))
    accelerator = case.get("accelerator", "cpu")
    compute = ComputeConfig(
        accelerator=accelerator, num_devices=1,
        activation_checkpointing=case.get("recomputed", False),
    )  # fmt: skip
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    module.to(device)
    precision = case.get("precision", "32-true")
    run = TrainingRun(data, training, compute, folder / "run", 0, precision, device, budget=budget)
    fit(module, run)
    return MemoryEstimate(config, data.image, training, compute, precision, device)


def taken_from_here() -> int:
    """Bytes that this process has now; peaks are counted anew.

    What was freed goes back to the system first: a training would take it again unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS:")


def taken_from_gpu() -> int:
    """Bytes that this process has on the GPU now; peaks are counted anew."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        # what Lightning and the kernels load is no part of a training's need
        warm_up = {"family": "dcgan", "size": (16, 16), "batch_size": 2}
        warm_up |= {key: case[key] for key in ("precision", "accelerator") if key in case}
        train(warm_up, Path(folder) / "warm-up")
        on_gpu = case.get("accelerator") == "gpu"
        before = taken_from_gpu() if on_gpu else taken_from_here()
        need = train(case, Path(folder) / "real")
    taken = (torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM:")) - before
    print(taken, need.bytes_needed(), need.estimate())
