"""Prints the bytes by which a training grows this process at most, and those estimated.

python tests/training/peak_of_training.py FAMILY SIDE RANK BATCH_SIZE
"""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
from pathlib import Path

import torch

from synthcube.compute import ComputeConfig
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.phantom import write_phantoms
from synthcube.data.preprocessing import DataConfig
from synthcube.models import registry
from synthcube.training import TrainingConfig, TrainingRun, fit
from synthcube.training.memory import MemoryEstimate


def train(family: str, size: tuple[int, ...], batch_size: int, folder: Path) -> MemoryEstimate:
    num = 3 * batch_size
    written = write_phantoms(folder / "data", num=num, size=size)
    data = DataModule(
        read_manifest(written.parent), DataConfig(validation_fraction=0), batch_size=batch_size,
        seed=0, cache=folder / "cache",
    )  # fmt: skip
    training = TrainingConfig(max_epochs=1, batch_size=batch_size, sample_every_n_epochs=0)
    config = registry.find(family)(name=family)
    module = config.build(data.image)
    module.fit_statistics(data.every_image(), data.rows("train"))
    compute = ComputeConfig(accelerator="cpu")
    device = torch.device("cpu")
    fit(module, TrainingRun(data, training, compute, folder / "run", 0, "32-true", device))
    return MemoryEstimate(config, data.image, training, compute, "32-true", device)


def taken_from_here() -> int:
    """Bytes that this process has now; peaks are counted anew.

    What was freed goes back to the system first: a training would take it again unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS:")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    name, side, rank, number = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        # what Lightning and the kernels load is no part of a training's need
        train("dcgan", (16, 16), 2, Path(folder) / "warm-up")
        before = taken_from_here()
        need = train(name, (int(side),) * int(rank), int(number), Path(folder) / "real")
    taken = status("VmHWM:") - before
    print(taken, need.bytes_needed())
