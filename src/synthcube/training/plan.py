"""What decides a training, beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from synthcube.compute import ComputeConfig, devices_used
from synthcube.data.module import DataModule
from synthcube.training.config import TrainingConfig
from synthcube.training.preemption import Preemption


@dataclass(frozen=True, slots=True)
class Plan:
    """One training, or the rest of one.

    Args:
        run: folder that everything is written to.
        precision: Lightning's full name of it.
        checkpoint: to go on from, if any.
        accept_changes: optimizers of a continued run take the hyperparameters of the config.
        settings: the resolved config, for loggers that show it.
    """

    data: DataModule
    training: TrainingConfig
    compute: ComputeConfig
    run: Path
    seed: int
    precision: str
    device: torch.device
    checkpoint: Path | None = None
    preemption: Preemption = field(default_factory=lambda: Preemption(()))
    accept_changes: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_devices(self) -> int:
        """Devices of each node, with a process for each."""
        return devices_used(self.compute, self.device)

    @property
    def num_processes(self) -> int:
        return self.num_devices * self.compute.num_nodes

    @property
    def validates(self) -> bool:
        return bool(self.data.rows("validation"))

    @property
    def checkpoints(self) -> Path:
        """Their folder."""
        return self.run / "checkpoints"
