"""Norms against those of torch, in one process and in two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from synthcube.models.nets.norm import BatchNorm, build_norm

SCRIPT = Path(__file__).with_name("one_share.py")


@pytest.mark.parametrize("shape", [(5, 8, 4, 4), (5, 8, 3, 3, 3)])
def test_alone_they_are_those_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    rank = len(shape) - 2
    batch, instance = (
        {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](8),
        {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[rank](8),
    )
    for name, expected in (("batch", batch), ("instance", instance)):
        torch.testing.assert_close(build_norm(name, 8, affine=False)(x), expected(x))
    assert build_norm("group", 8).num_groups == 2
    assert build_norm("group", 256).num_groups == 32


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (4, 3, 2, 3, 2)])
def test_two_processes_normalise_as_if_their_batches_were_one(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Also of shares of different size: 3 and 2 images."""
    inputs = {"x": torch.randn(shape) * 3 + 100, "pull": torch.randn(shape)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    words = [[sys.executable, str(SCRIPT), str(rank), str(tmp_path)] for rank in (0, 1)]
    started = [subprocess.Popen(command) for command in words]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    shares = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    x = inputs["x"].clone().requires_grad_()
    norm = BatchNorm(shape[1])
    y = norm(x)
    (y * inputs["pull"]).sum().backward()
    for rank, share in enumerate(shares):
        torch.testing.assert_close(share["y"], y[rank::2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(share["grad"], x.grad[rank::2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(share["mean"], norm.running_mean)
        torch.testing.assert_close(share["var"], norm.running_var)
    for name in ("mean", "var"):
        assert torch.equal(shares[0][name], shares[1][name])
    summed = shares[0]["weight_grad"] + shares[1]["weight_grad"]
    torch.testing.assert_close(summed, norm.weight.grad, rtol=1e-4, atol=1e-4)
