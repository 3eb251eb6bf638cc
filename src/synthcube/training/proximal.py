"""FedProx: a training that is held near the weights that it began with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Proximal:
    """The term mu / 2 * |w - w0|^2 of a loss.

    Args:
        mu: its weight.
        weights: w0, by the names of the family's state; None: those at the start of the run.
    """

    mu: float
    weights: Mapping[str, Tensor] | None = None


class ProximalTerm(Callback):
    """Adds the gradient of the term before each step, so that the losses shown stay those of data.

    Args:
        weights: w0 of every parameter that is trained.
    """

    def __init__(self, mu: float, weights: Mapping[str, Tensor]) -> None:
        self.mu, self.weights = mu, weights

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        stepped: set[int] = {id(weight) for group in optimizer.param_groups
                             for weight in group["params"]}  # fmt: skip
        for name, weight in pl_module.named_parameters():
            if id(weight) in stepped and weight.grad is not None:
                start: Any = self.weights[name].to(weight.device, weight.dtype)
                weight.grad.add_(weight - start, alpha=self.mu)
