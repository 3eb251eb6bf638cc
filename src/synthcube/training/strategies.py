"""How several processes share a training: the strategy of a config, and what cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy

from synthcube import registry
from synthcube.compute import ComputeConfig
from synthcube.family import FamilyConfig
from synthcube.training.config import TrainingConfig
from synthcube.training.sharding import FullySharded

_CUTTING = ("fsdp", "deepspeed")


def strategy(
    compute: ComputeConfig, training: TrainingConfig, num_devices: int, *, by_hand: bool
) -> Strategy | str:
    """Lightning's strategy for that many devices on each node.

    Args:
        by_hand: whether the family optimizes several networks, so that a backward pass may leave
            some parameters without a gradient, as that of a generator does for its discriminator.
    """
    processes = num_devices * compute.num_nodes
    if processes == 1:
        return "auto"
    if compute.strategy == "fsdp":
        return FullySharded(**compute.strategy_config)
    return DDPStrategy(**{"find_unused_parameters": by_hand, **compute.strategy_config})


def is_cut(strategy: Strategy) -> bool:
    """Whether no process holds all weights, so that all must take part in every call."""
    return isinstance(strategy, FullySharded)


def faults(model: FamilyConfig, training: TrainingConfig, compute: ComputeConfig) -> Iterator[str]:
    """Why that strategy cannot train that model so, one sentence each."""
    if compute.strategy not in _CUTTING:
        return
    if model.optimizes_by_hand():
        yield (
            f"compute.strategy {compute.strategy} trains with one optimizer, and {model.name} so "
            "configured with one for the generator and one for the discriminator: use ddp, or one "
            f"of {', '.join(_with_one_optimizer())}"
        )


def _with_one_optimizer() -> list[str]:
    kinds: list[Any] = [registry.find(name) for name in registry.names()]
    return [kind.model_fields["name"].default for kind in kinds
            if not kind.tiny().optimizes_by_hand()]  # fmt: skip
