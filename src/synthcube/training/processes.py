"""What the processes that train together tell each other."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch


def of_each(value: Any, trainer: pl.Trainer) -> list[Any]:
    """The plain `value` of every process, by rank; all of them must call it."""
    values: list[Any] = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values
