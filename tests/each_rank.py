"""Trains as `synthcube train` does, and leaves the weights of every process: rank_N.safetensors.

python tests/each_rank.py CONFIG DATA RUN [KEY=VALUE ...]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from safetensors.torch import save_file

from synthcube import environment, plugins
from synthcube.errors import SynthCubeError
from synthcube.tasks.train import train


class Spying(pl.Trainer):
    """Lightning's trainer, whose model is saved once it is trained."""

    def fit(self, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        super().fit(model, *args, **kwargs)
        # Where the weights are cut into pieces, all processes put them together.
        state = {
            name: getattr(tensor, "full_tensor", tensor.contiguous)().clone()
            for name, tensor in model.state_dict().items()
        }
        self.strategy.barrier()  # who leaves early takes the connection of the others away
        save_file(state, Path(sys.argv[3]) / f"rank_{self.global_rank}.safetensors")


if __name__ == "__main__":
    environment.open_log()
    plugins.vouch([Path(__file__).parent])
    pl.Trainer = Spying
    config, data, run = map(Path, sys.argv[1:4])
    try:
        train(config, data, run, overrides=sys.argv[4:])
    except SynthCubeError as error:
        sys.exit(str(error))
