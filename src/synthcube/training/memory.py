"""The memory that a training will need, estimated before it starts."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.family import Family, FamilyConfig
from synthcube.optimization import OptimizerConfig
from synthcube.schema import Batch, Condition, ImageSpec
from synthcube.training.config import TrainingConfig
from synthcube.training.recomputation import recompute_blocks

# Weights x voxels below which a step is taken for real: that is quicker than to trace it.
_CHEAP = 3e8


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that one process of a training needs, beside those of its libraries."""

    weights: int
    """Parameters and buffers, the frozen ones too."""
    optimizer: int
    """States of every optimizer."""
    average: int
    """Moving average of the weights."""
    step: int
    """Most that a step adds: activations and gradients, or what its optimizer needs."""
    loading: int
    """Batches that data workers keep ready, always in the memory of the host."""

    @property
    def on_device(self) -> int:
        """Everything but the data workers' batches."""
        return self.weights + self.optimizer + self.average + self.step


def estimate(
    config: FamilyConfig,
    image: ImageSpec,
    training: TrainingConfig,
    *,
    mixed: bool,
    recomputed: bool = False,
    processes: int = 1,
    num_workers: int = 0,
) -> MemoryEstimate:
    """What a training of that model takes, from the peak of one step's forward and backward pass.

    The step is traced on tensors without data (torch's FakeTensorMode), so that it costs neither
    memory nor time however large the images; a tiny one, or one that cannot be traced, is taken
    for real. What libraries allocate inside an operation, as cuDNN's workspaces, is not seen.

    Args:
        mixed: whether it computes in half precision.
        recomputed: whether the inside of blocks is computed again backwards.
        processes: those that share a batch.
    """
    family = config.build(image).train()
    if recomputed:
        recompute_blocks(family)
    trained = [weight for weight in family.parameters() if weight.requires_grad]
    states = [*family.parameters(), *family.buffers()]
    share = math.ceil(training.batch_size / processes)
    gradients = _bytes(trained)
    # While a forward pass runs, none are left but those that are added up or sent.
    kept = gradients * (training.accumulate > 1) + gradients * (processes > 1)
    steps = (_step_peak(family, image, share, mixed=mixed) + kept, 2 * gradients)
    image_bytes = 4 * math.prod(image.size) * (image.channels + len(image.source_channels))
    return MemoryEstimate(
        weights=_bytes(states),
        optimizer=_optimizer_bytes(family),
        average=_bytes(states) if training.ema else 0,
        step=max(steps),
        loading=2 * num_workers * share * image_bytes,
    )


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._seen:
            return
        size = storage.nbytes()
        self._seen[id(storage)] = weakref.finalize(storage, self._free, id(storage), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.live -= size


def _step_peak(family: Family, image: ImageSpec, batch_size: int, *, mixed: bool) -> int:
    from torch._subclasses import FakeTensorMode

    weights = sum(each.numel() for each in family.parameters())
    if weights * math.prod(image.size) * batch_size < _CHEAP:
        return _measured(family, image, batch_size, mixed=mixed)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _measured(family, image, batch_size, mixed=mixed)
    except Exception:  # a user's own family may look at values, which a tensor without data lacks
        family.zero_grad()
        return batch_size * _measured(family, image, 1, mixed=mixed)


def _measured(family: Family, image: ImageSpec, batch_size: int, *, mixed: bool) -> int:
    """Peak of the forward and backward pass of every network that is trained."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    live = _Live()
    with torch.random.fork_rng(devices=[]), live, autocast:
        batch = _blank(image, batch_size)
        if not isinstance(family, AdversarialFamily) or family.discriminator is None:
            _differentiate(family.loss(batch), family.parameters())
            return live.peak
        judging = {id(weight) for weight in family.discriminator.parameters()}
        making = [weight for weight in family.parameters() if id(weight) not in judging]
        terms, made = family.generator_loss(batch)
        _differentiate(terms, making)
        made = made.detach()
        del terms
        judged = family.discriminator_loss(batch, made)
        _differentiate(judged, family.discriminator.parameters())
    return live.peak


def _differentiate(terms: dict[str, torch.Tensor], weights: Iterable[torch.Tensor]) -> None:
    trained = [weight for weight in weights if weight.requires_grad]
    torch.autograd.grad(terms["loss"], trained, allow_unused=True)


def _blank(image: ImageSpec, number: int) -> Batch:
    return Batch(
        image=torch.zeros(number, image.channels, *image.size),
        label=torch.zeros(number, dtype=torch.int64),
        index=torch.zeros(number, dtype=torch.int64),
        augmented=False,
        condition=Condition(
            values=torch.zeros(number, len(image.conditions)),
            source=torch.zeros(number, len(image.source_channels), *image.size),
        ),
    )


def _optimizer_bytes(family: Family) -> int:
    trained = [weight for weight in family.parameters() if weight.requires_grad]
    if not isinstance(family, AdversarialFamily) or family.discriminator is None:
        return int(_bytes(trained) * _states(family.config.optimizer))
    judging = {id(weight) for weight in family.discriminator.parameters()}
    made_by, judged_by = family.optimizer_configs()
    return int(
        _bytes(each for each in trained if id(each) not in judging) * _states(made_by)
        + _bytes(each for each in trained if id(each) in judging) * _states(judged_by)
    )


def _states(optimizer: OptimizerConfig) -> float:
    """Bytes that an optimizer keeps for each byte of weights, from a step with a small matrix."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    built = optimizer.build([weight])
    built.step()
    kept = [each for each in tree_leaves(dict(built.state)) if isinstance(each, torch.Tensor)]
    return _bytes(each for each in kept if each.numel() > 1) / _bytes([weight])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)
