"""Strategies of several processes: DDP, FSDP and DeepSpeed, and the values that they exchange."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from synthcube.compute import ComputeConfig
from synthcube.errors import ConfigError
from synthcube.models import registry
from synthcube.models.family import FamilyConfig
from synthcube.training import deepspeed
from synthcube.training.config import TrainingConfig

log = logging.getLogger("synthcube")

_SHARDING = ("fsdp", "deepspeed")


def gather_objects(value: Any, trainer: pl.Trainer) -> list[Any]:
    """The plain `value` of every process, by rank; every process must call this."""
    values: list[Any] = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def strategy(
    compute: ComputeConfig,
    training: TrainingConfig,
    num_devices: int,
    *,
    by_hand: bool,
    mixed: bool,
) -> Strategy | str:
    """Lightning's strategy for `num_devices` devices on each node.

    Args:
        by_hand: whether the family optimizes several networks, so that a backward pass may leave
            parameters without a gradient (a generator's pass those of its discriminator).
        mixed: whether the precision is bf16-mixed.
    """
    if by_hand and compute.strategy in _SHARDING:  # the family's config did not tell
        raise ConfigError(f"compute.strategy {compute.strategy} trains with one optimizer: use ddp")
    processes = num_devices * compute.num_nodes
    if compute.strategy == "deepspeed":
        if name := deepspeed.own_optimizer(compute):
            log.info(
                "DeepSpeed's file takes precedence: its optimizer %s and its scheduler, if any, "
                "are used instead of model.optimizer and model.scheduler.", name,
            )  # fmt: skip
        return deepspeed.ZeRO(mixed=mixed, **deepspeed.arguments(compute, training, processes))
    if processes == 1:
        if compute.strategy == "fsdp":
            log.info("compute.strategy is fsdp, but there is one process: nothing is sharded.")
        return "auto"
    if compute.strategy == "fsdp":
        return FullySharded(**compute.strategy_config)
    # Gradients are views of the communication buckets, which saves a copy.
    defaults = {"find_unused_parameters": by_hand, "gradient_as_bucket_view": True}
    return DDPStrategy(**{**defaults, **compute.strategy_config})


def is_sharded(strategy: Strategy) -> bool:
    """Whether each process has a part of the weights, so that all must take part in a call."""
    return isinstance(strategy, FullySharded) or (
        isinstance(strategy, deepspeed.ZeRO) and strategy.stage == 3
    )


def is_one_file(strategy: Strategy) -> bool:
    """Whether a checkpoint is a single file, without DeepSpeed's folder beside it."""
    return not isinstance(strategy, deepspeed.ZeRO)


def faults(model: FamilyConfig, training: TrainingConfig, compute: ComputeConfig) -> Iterator[str]:
    """Yield the reasons why the strategy cannot train the model, one sentence each."""
    if compute.strategy not in _SHARDING:
        return
    if model.optimizes_by_hand():
        names = registry.names()
        usable = [name for name in names if not registry.find(name).tiny().optimizes_by_hand()]
        yield (
            f"compute.strategy {compute.strategy} trains with one optimizer, and this {model.name} "
            "needs one for the generator and one for the discriminator: use ddp, or one "
            f"of {', '.join(usable)}"
        )
    if model.earlier_share():
        yield (
            f"compute.strategy {compute.strategy}: model.autoguidance_from keeps whole weights; "
            "use ddp"
        )
    if compute.strategy == "deepspeed":
        yield from deepspeed.faults(compute, training)
    elif compute.precision not in ("auto", "32", "32-true", "bf16", "bf16-mixed"):
        yield (
            f"compute.precision is {compute.precision}: fsdp shards float32 weights only, and "
            "does not scale losses for float16; use auto, bf16 or 32"
        )


def require_same(content: Mapping[str, Any], compute: ComputeConfig, processes: int) -> None:
    """Raise ConfigError if the strategy cannot resume from a checkpoint with that content."""
    if reason := deepspeed.misfit(content, compute, processes):
        raise ConfigError(
            f"{reason}: the shards of its optimizer would not match. Resume with the same "
            "strategy, or train into a new folder."
        )


# Methods of a family that are called from outside: each gathers the weights it needs.
_ENTRIES = ("training_step", "validation_step", "sample", "reconstruct")


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for torch's FSDP2, which shards any family from outside.

    Args:
        reshard_after_forward: free the weights of a block between its forward and backward pass;
            keeping them needs more memory and less communication.
        process_group_backend: "nccl", "gloo" or another; null: the default of the device.
    """

    def __init__(
        self, reshard_after_forward: bool = True, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        # Lightning's own expects the model to shard itself.
        assert self.model is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.shard(self.model)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    def shard(self, family: torch.nn.Module) -> None:
        """Shard the trained weights of `family` in place: block by block, then the rest."""
        frozen = {weight for weight in family.parameters() if not weight.requires_grad}
        settings: Any = {"mesh": self.device_mesh["data_parallel"], "ignored_params": frozen}
        for block in _blocks(family):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **settings)
        # Gathered weights are copies: the rest must be sharded when the average reads it.
        fully_shard(family, reshard_after_forward=True, **settings)
        for name in _ENTRIES:
            if hasattr(family, name):
                register_fsdp_forward_method(family, name)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        state: dict[str, Any] = gathered(self.model.state_dict())
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        inner = getattr(optimizer, "optimizer", optimizer)
        state: dict[str, Any] = gathered(inner.state_dict())
        return state

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> Any:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # unlike Lightning's, which restores it with the weights

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        self.model.load_state_dict(scattered(checkpoint["state_dict"], self.model), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            shards = {
                index: {name: _shard(value, weights[index]) for name, value in of_weight.items()}
                for index, of_weight in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})


def local(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This process's shards of the sharded tensors, and the others unchanged."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in tensors]


def gathered(state: Any) -> Any:
    """A nested state with whole tensors on the CPU instead of shards.

    Every process must call this; only the first gets the values.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def scattered(state: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """A state of whole tensors, each sharded as that of `model` is."""
    sharded = model.state_dict()
    return {name: _shard(value, sharded.get(name)) for name, value in state.items()}


def _shard(value: Any, like: Any) -> Any:
    """This process's shard of `value`, if `like` is sharded and has the same shape."""
    whole = isinstance(value, torch.Tensor) and isinstance(like, DTensor)
    if not whole or value.shape != like.shape:
        return value
    # Every process has read the file: no communication is needed.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the elements with trained weights of the outermost module lists."""
    for child in module.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)):
            for block in child.children():
                if any(weight.requires_grad for weight in block.parameters()):
                    yield block
        else:
            yield from _blocks(child)
