"""Strategies that cut the weights into pieces, in two real processes, against ddp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synthcube import registry

SCRIPT = Path(__file__).with_name("each_rank.py")
LIMIT_S = 240
ALONE = [name for name in registry.names() if not registry.find(name).tiny().optimizes_by_hand()]


def together(config: Path, data: Path, run: Path, *overrides: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, (config, data, run)), "compute.num_devices=2",
         *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "weights.safetensors")


@pytest.mark.parametrize("family", ALONE)
def test_fsdp_ends_with_the_weights_of_ddp(
    family: str, tiny_config, phantoms: Path, tmp_path: Path
) -> None:
    config = tiny_config(family)
    for strategy in ("ddp", "fsdp"):
        together(config, phantoms, tmp_path / strategy, f"compute.strategy={strategy}")
    whole, cut = weights(tmp_path / "ddp"), weights(tmp_path / "fsdp")
    assert whole.keys() == cut.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert sorted(path.name for path in (tmp_path / "fsdp" / "samples").iterdir()) == [
        "epoch_0001.png", "epoch_0002.png",
    ]  # fmt: skip
