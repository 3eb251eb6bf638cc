"""Trains with DeepSpeed's CPU accelerator, which Lightning does not offer: see each_rank.py.

DeepSpeed's own script then puts the pieces of the last checkpoint together: deepspeed.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import deepspeed as lightning_deepspeed
from safetensors.torch import save_file

from synthcube import environment
from synthcube.tasks.train import train
from synthcube.training import checkpoints
from synthcube.training import deepspeed as deepspeed_config

if __name__ == "__main__":
    environment.open_log()
    lightning_deepspeed.CUDAAccelerator = CPUAccelerator
    lightning_deepspeed._validate_device_index_selection = lambda *_: None
    initialize = deepspeed.initialize
    deepspeed.initialize = lambda args, **rest: initialize(**rest)  # a CPU has no number
    deepspeed_config.require_usable = lambda *_: None
    config, data, run = map(Path, sys.argv[1:4])
    if train(config, data, run, overrides=sys.argv[4:]):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        folder = run / "checkpoints" / "last.zero"
        tag = checkpoints.load(folder.with_suffix(".ckpt"))["zero"]["tag"]
        assert [path.name for path in folder.iterdir()] == [tag]
        whole = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
        save_file({n: tensor.contiguous().clone() for n, tensor in whole.items()},
                  run / "deepspeed.safetensors")  # fmt: skip
