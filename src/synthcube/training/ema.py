"""Moving average of the weights, which is validated, sampled and exported."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.nn.modules.batchnorm import _BatchNorm

from synthcube.training.strategies import FullySharded, gathered, local, scattered


class RampedEMA(WeightAveraging):
    """Exponential moving average of the weights with a decay that ramps up.

    At update n the decay is min(`decay`, (1 + n) / (10 + n)), as in TensorFlow and diffusers.
    The statistics of batch norms are averaged too, as those of the latest weights do not fit
    averaged weights. Other buffers are copied, and so are modules that a family names in
    `unaveraged`, before each use.

    Args:
        halved: whether the weights have 16 bits; the average is always float32.
    """

    def __init__(self, decay: float, *, halved: bool = False) -> None:
        super().__init__(use_buffers=False)
        self.max_decay = decay
        self.halved = halved

    @property
    def model(self) -> torch.nn.Module | None:
        """The model with the averaged weights, while training."""
        return self._average_model.module if self._average_model else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self.halved and self.model:
            self.model.float()
        if isinstance(trainer.strategy, FullySharded) and self.model:
            trainer.strategy.shard(self.model)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._copy_unaveraged(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["state_dict"] = gathered(checkpoint["state_dict"])

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        pieces = {
            name: scattered(checkpoint[name], pl_module)
            for name in ("state_dict", "current_model_state")
            if name in checkpoint
        }
        super().on_load_checkpoint(trainer, pl_module, checkpoint | pieces)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        # Unlike Lightning's, this does not synchronize with the device at every step.
        if trainer.global_step <= self._latest_update_step or self._average_model is None:
            return
        self._update(self._average_model.module, pl_module)
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._copy_unaveraged(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def restore(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the trained weights back when a validation is interrupted."""
        self.on_validation_epoch_end(trainer, module)

    @torch.no_grad()
    def _update(self, averaged: torch.nn.Module, family: Any) -> None:
        # The first update copies the weights.
        step = self._latest_update_step
        weight = 1 - min(self.max_decay, (1 + step) / (10 + step)) if step else 1.0
        skipped = {id(weight) for weight in _unaveraged(family)}
        pairs = [
            (one, other)
            for one, other in zip(averaged.parameters(), family.parameters(), strict=True)
            if id(other) not in skipped  # a codebook changes without a gradient
        ]
        ours, theirs = local([one for one, _ in pairs]), local([other for _, other in pairs])
        if self.halved:
            theirs = [other.to(one.dtype) for one, other in zip(ours, theirs, strict=True)]
        torch._foreach_lerp_(ours, theirs, weight)
        statistics = _statistics(averaged)
        if statistics:
            torch._foreach_lerp_(statistics, _statistics(family), weight)
        averaged_ids = {id(buffer) for buffer in statistics}
        copied = [
            (one, other)
            for one, other in zip(averaged.buffers(), family.buffers(), strict=True)
            if id(one) not in averaged_ids
        ]
        if copied:
            torch._foreach_copy_([one for one, _ in copied], [other for _, other in copied])

    @torch.no_grad()
    def _copy_unaveraged(self, family: Any) -> None:
        for one, other in zip(_unaveraged(self.model), _unaveraged(family), strict=True):
            one.copy_(other)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        if not self.halved or self.model is None:
            super()._swap_models(pl_module)
            return
        averaged = chain(self.model.parameters(), self.model.buffers())
        for one, other in zip(averaged, chain(pl_module.parameters(), pl_module.buffers()),
                              strict=True):  # fmt: skip
            # Swap storage, not values, which would round the average to 16 bits.
            one.data, other.data = other.data, one.data


class KeepEarlier(pl.Callback):
    """Keeps the averaged weights of an earlier moment of the training, for autoguidance.

    Args:
        share: of the training's steps, or of its time limit.
        ema: the average; None: the weights themselves are kept.
    """

    def __init__(self, share: float, ema: RampedEMA | None) -> None:
        self.share = share
        self._ema = ema
        self._has_kept = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._num_steps = trainer.estimated_stepping_batches

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        done = max(pl_module.time_share(), trainer.global_step / self._num_steps)
        if self._has_kept or done < self.share:
            return
        averaged: Any = (self._ema and self._ema.model) or pl_module
        for family in (averaged, pl_module):
            family.earlier.keep(averaged.network)
        self._has_kept = True

    def state_dict(self) -> dict[str, Any]:
        return {"has_kept": self._has_kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._has_kept = state_dict["has_kept"]


def _unaveraged(family: Any) -> list[torch.Tensor]:
    """Weights of the modules that the family excludes from averaging."""
    names = getattr(family, "unaveraged", ())
    modules = [module for name in names if (module := getattr(family, name)) is not None]
    return [weight for module in modules for weight in module.parameters()]


def _statistics(module: torch.nn.Module) -> list[torch.Tensor]:
    """Running mean and variance of every batch norm."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    return [value for value in statistics if value is not None]
