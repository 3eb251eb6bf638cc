"""How several processes share a training: the strategy of a config, and what cannot work."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from synthcube import registry
from synthcube.compute import ComputeConfig
from synthcube.errors import ConfigError
from synthcube.models.family import FamilyConfig
from synthcube.training import deepspeed_config, zero
from synthcube.training.config import TrainingConfig
from synthcube.training.sharding import FullySharded

log = logging.getLogger("synthcube")

_CUTTING = ("fsdp", "deepspeed")


def strategy(
    compute: ComputeConfig,
    training: TrainingConfig,
    num_devices: int,
    *,
    by_hand: bool,
    mixed: bool,
) -> Strategy | str:
    """Lightning's strategy for that many devices on each node.

    Args:
        by_hand: whether the family optimizes several networks, so that a backward pass may leave
            some parameters without a gradient, as that of a generator does for its discriminator.
        mixed: whether the precision is bf16-mixed.

    Raises:
        ConfigError: the family cannot be trained so.
    """
    if by_hand and compute.strategy in _CUTTING:  # of a family whose config does not say so
        raise ConfigError(f"compute.strategy {compute.strategy} trains with one optimizer: use ddp")
    processes = num_devices * compute.num_nodes
    if compute.strategy == "deepspeed":
        if name := deepspeed_config.own_optimizer(compute):
            log.info(
                "DeepSpeed's file takes precedence: its optimizer %s, and its scheduler if it has "
                "one, are used; model.optimizer and model.scheduler are not.", name,
            )  # fmt: skip
        return zero.ZeRO(mixed=mixed, **deepspeed_config.arguments(compute, training, processes))
    if processes == 1:
        if compute.strategy == "fsdp":
            log.info("compute.strategy is fsdp, and there is one process: nothing is cut.")
        return "auto"
    if compute.strategy == "fsdp":
        return FullySharded(**compute.strategy_config)
    # Gradients live where they are sent from: no copy of them, in memory or in time.
    usual = {"find_unused_parameters": by_hand, "gradient_as_bucket_view": True}
    return DDPStrategy(**{**usual, **compute.strategy_config})


def is_cut(strategy: Strategy) -> bool:
    """Whether no process holds all weights, so that all must take part in every call."""
    return isinstance(strategy, FullySharded) or (
        isinstance(strategy, zero.ZeRO) and strategy.stage == 3
    )


def is_one_file(strategy: Strategy) -> bool:
    """Whether a checkpoint is a file alone, without a folder beside it."""
    return not isinstance(strategy, zero.ZeRO)


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
    if compute.strategy == "deepspeed":
        yield from deepspeed_config.faults(compute, training)
    elif compute.precision not in ("auto", "32", "32-true", "bf16", "bf16-mixed"):
        yield (
            f"compute.precision is {compute.precision}: fsdp cuts weights in float32 only, and "
            "does not scale losses for float16; use auto, bf16 or 32"
        )


def require_usable(compute: ComputeConfig, training: TrainingConfig, device: torch.device) -> None:
    """
    Raises:
        ConfigError: the strategy cannot be used on this machine.
    """
    deepspeed_config.require_usable(compute, training, device)


def require_same(content: Mapping[str, Any], compute: ComputeConfig, processes: int) -> None:
    """
    Raises:
        ConfigError: the checkpoint with that content cannot be continued with that strategy.
    """
    if found := zero.misfit(content, compute, processes):
        raise ConfigError(
            f"{found}: the pieces of its optimizer would not fit. Continue as it began, or train "
            "into a new folder."
        )


def _with_one_optimizer() -> list[str]:
    kinds: list[Any] = [registry.find(name) for name in registry.names()]
    return [kind.model_fields["name"].default for kind in kinds
            if not kind.tiny().optimizes_by_hand()]  # fmt: skip
