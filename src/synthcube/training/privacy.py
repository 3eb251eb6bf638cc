"""Differentially private steps: the gradient of each subject is clipped, and noise is added.

DP-SGD: Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016), with the subject as the
unit. Several draws of noise for an image, averaged before its gradient is clipped: Dockhorn et al.,
"Differentially Private Diffusion Models" (TMLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map, tree_map_only

from synthcube.data.batches import uniform
from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.schema import Batch
from synthcube.training.accountant import Budget
from synthcube.training.config import PrivacyConfig

_RECORD = "privacy"  # key of a checkpoint
_SHOWN = 300  # characters of an error of torch


class PrivateSteps(SingleDeviceStrategy):
    """Lightning's strategy for one device, whose steps have private gradients.

    A step has the optimizer, schedule, moving average and checkpoints of any other. Its loss is a
    stand-in whose gradient is the private one: it has no meaning, and is not to be logged.

    Args:
        budget: what the training may spend; its steps are counted on.
    """

    def __init__(self, device: torch.device, privacy: PrivacyConfig, budget: Budget) -> None:
        super().__init__(device=device)
        self.privacy = privacy
        self.budget = budget

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        family, batch = self.lightning_module, args[0]
        assert isinstance(family, Family)
        privacy = self.privacy
        with self.precision_plugin.train_step_context():
            total = clipped_sum(
                family, batch, clip_norm=privacy.clip_norm, draws=privacy.draws,
                images_at_once=privacy.images_at_once,
            )  # fmt: skip
        noise_std = self.budget.sigma * privacy.clip_norm
        weights = trained(family)
        # Counted before its result exists: a step can be counted for nothing, but never forgotten.
        self.budget = replace(self.budget, steps=self.budget.steps + 1)
        with torch.autocast(self.root_device.type, enabled=False):
            # By the expected number of subjects: the number that was drawn is private.
            return torch.stack([
                (weights[name] * ((total[name] + noise_like(total[name], noise_std))
                                  / self.budget.batch_size)).sum()
                for name in weights
            ]).sum()  # fmt: skip


class BudgetRecord(Callback):
    """Keeps the budget of a private training in its checkpoints."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        steps: Any = trainer.strategy
        checkpoint[_RECORD] = steps.budget.record()


def recorded_budget(content: Mapping[str, Any], path: object) -> Budget:
    """The budget in the content of a checkpoint. Raises ConfigError where there is none."""
    record = content.get(_RECORD)
    if not isinstance(record, Mapping):
        raise ConfigError(
            f"{path} says nothing of privacy: its steps were not private, or are not counted. "
            "Train into a new folder."
        )
    return Budget.of_record(record)


def trained(family: torch.nn.Module) -> dict[str, Tensor]:
    """The weights that are trained, by name."""
    return {name: weight for name, weight in family.named_parameters() if weight.requires_grad}


def clipped_sum(
    family: Family, batch: Batch, *, clip_norm: float, draws: int, images_at_once: int
) -> dict[str, Tensor]:
    """The sum of the gradients of all subjects of a batch, each of `clip_norm` at most.

    The batch has one image of each subject. Its loss is the mean over `draws` copies of it, for
    each of which the family draws its own noise. That noise comes from torch's generator, which
    is seeded from the config: nothing rests on its secrecy, because every possible gradient of one
    subject is clipped, whatever was drawn.
    """
    weights = {name: weight.detach() for name, weight in trained(family).items()}
    total = {
        name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()
    }
    for part in _parts(batch, images_at_once):
        gradients = _gradients(family, weights, part, draws)
        squares = [gradient.float().flatten(1).square().sum(1) for gradient in gradients.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        # A norm that is not finite, of one subject alone, must not reach the weights.
        scales = torch.where(norms.isfinite(), (clip_norm / norms).clamp(max=1), 0)
        for name, gradient in gradients.items():
            finite = torch.nan_to_num(gradient.float(), 0, 0, 0)
            total[name] += torch.tensordot(scales, finite, dims=1)
    return total


def noise_like(tensor: Tensor, std: float) -> Tensor:
    """Normal noise from random numbers of the operating system, on the device of `tensor`.

    The generator of torch on a CPU has 32 bits of seed, which can be tried out.
    """
    pairs = math.ceil(tensor.numel() / 2)
    first, second = uniform(2 * pairs).reshape(2, pairs)
    # Box and Muller (1958); 1 - u is never 0.
    radius, angle = np.sqrt(-2 * np.log(1 - first)), 2 * math.pi * second
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: tensor.numel()]
    return (torch.from_numpy(normal) * std).to(tensor.device, tensor.dtype).reshape(tensor.shape)


def require_differentiable(family: Family, example: Batch, privacy: PrivacyConfig) -> None:
    """Raise ConfigError unless the gradient of each image of a batch can be computed alone."""
    with torch.random.fork_rng():
        try:
            clipped_sum(
                family, example, clip_norm=privacy.clip_norm, draws=privacy.draws,
                images_at_once=privacy.images_at_once,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:_SHOWN]
            raise ConfigError(
                f"model.name {family.config.name}: its loss cannot be differentiated for each "
                f"subject alone, as training.privacy needs: {reason}"
            ) from error


class _Loss(torch.nn.Module):
    """The loss of a family as a function of its weights."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, batch: Batch) -> Tensor:
        return self.family.loss(batch)["loss"].float()


def _gradients(
    family: Family, weights: Mapping[str, Tensor], batch: Batch, draws: int
) -> dict[str, Tensor]:
    """The gradient of each image's loss, (images, *shape of the weight), by weight."""
    module = _Loss(family)
    module.train(family.training)
    tensors = {name: value for name, value in batch.items() if name != "augmented"}

    def repeated(tensor: Tensor) -> Tensor:
        return tensor[None].expand(draws, *tensor.shape)

    def loss(values: Mapping[str, Tensor], image: dict[str, Any]) -> Tensor:
        one = {**tree_map(repeated, image), "augmented": batch["augmented"]}
        named = {f"family.{name}": value for name, value in values.items()}
        result: Tensor = functional_call(module, named, (one,))
        return result

    gradients_of = vmap(grad(loss), in_dims=(None, 0), randomness="different")
    # Of torch's kernels of attention, only this one computes many gradients at once.
    with sdpa_kernel(SDPBackend.MATH):
        gradients: dict[str, Tensor] = gradients_of(dict(weights), tensors)
    return gradients


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The images of a batch, so many at a time; nothing of an empty one."""
    for start in range(0, len(batch["index"]), size):
        yield tree_map_only(Tensor, itemgetter(slice(start, start + size)), batch)
