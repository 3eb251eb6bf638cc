"""One process of two that share a batch: python one_share.py RANK FOLDER; see test_norm.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from synthcube.models.nets.norm import BatchNorm

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
store = torch.distributed.FileStore(str(folder / "store"), 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
inputs = load_file(folder / "inputs.safetensors")
x = inputs["x"][rank::2].clone().requires_grad_()
norm = BatchNorm(x.shape[1])
y = norm(x)
(y * inputs["pull"][rank::2]).sum().backward()
results = {"y": y.detach(), "grad": x.grad, "weight_grad": norm.weight.grad,
        "mean": norm.running_mean, "var": norm.running_var}  # fmt: skip
save_file(
    {name: value.contiguous() for name, value in results.items()}, folder / f"{rank}.safetensors"
)
torch.distributed.barrier()  # the store goes with the first process that ends
torch.distributed.destroy_process_group()
