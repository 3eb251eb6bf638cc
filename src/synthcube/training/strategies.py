"""What the processes that train together tell each other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
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


def gather_objects(value: Any, trainer: pl.Trainer) -> list[Any]:
    """The plain `value` of every process, by rank; all of them must call it."""
    values: list[Any] = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


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
        if name := deepspeed.own_optimizer(compute):
            log.info(
                "DeepSpeed's file takes precedence: its optimizer %s, and its scheduler if it has "
                "one, are used; model.optimizer and model.scheduler are not.", name,
            )  # fmt: skip
        return deepspeed.ZeRO(mixed=mixed, **deepspeed.arguments(compute, training, processes))
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
        isinstance(strategy, deepspeed.ZeRO) and strategy.stage == 3
    )


def is_one_file(strategy: Strategy) -> bool:
    """Whether a checkpoint is a file alone, without a folder beside it."""
    return not isinstance(strategy, deepspeed.ZeRO)


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
        yield from deepspeed.faults(compute, training)
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
    deepspeed.require_usable(compute, training, device)


def require_same(content: Mapping[str, Any], compute: ComputeConfig, processes: int) -> None:
    """
    Raises:
        ConfigError: the checkpoint with that content cannot be continued with that strategy.
    """
    if found := deepspeed.misfit(content, compute, processes):
        raise ConfigError(
            f"{found}: the pieces of its optimizer would not fit. Continue as it began, or train "
            "into a new folder."
        )


def _with_one_optimizer() -> list[str]:
    kinds: list[Any] = [registry.find(name) for name in registry.names()]
    return [kind.model_fields["name"].default for kind in kinds
            if not kind.tiny().optimizes_by_hand()]  # fmt: skip


# What is called of a family from outside: each gathers the weights that it needs.
_ENTRIES = ("training_step", "validation_step", "sample", "reconstruct")


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for torch's second FSDP; it shards any family, which need not know.

    Args:
        reshard_after_forward: free the weights of a block between its forward and its backward
            pass; to keep them takes more memory and less communication.
        process_group_backend: "nccl", "gloo" or another; null: what suits the device.
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
        # Lightning's own leaves the sharding to the model, which here knows nothing of it.
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
        """Cut the trained weights of `family`, in place: block by block, then what is left."""
        frozen = {each for each in family.parameters() if not each.requires_grad}
        settings: Any = {"mesh": self.device_mesh["data_parallel"], "ignored_params": frozen}
        for block in _blocks(family):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **settings)
        # Gathered weights are copies: what is left must be in pieces when the average looks.
        fully_shard(family, reshard_after_forward=True, **settings)
        for name in _ENTRIES:
            if hasattr(family, name):
                register_fsdp_forward_method(family, name)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return gathered(self.model.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        inner = getattr(optimizer, "optimizer", optimizer)
        return gathered(inner.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> Any:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # Lightning's own has restored it with the weights

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        state = scattered(checkpoint["state_dict"], self.model)
        self.model.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [each for group in optimizer.param_groups for each in group["params"]]
            pieces = {
                index: {name: _piece(value, weights[index]) for name, value in of_weight.items()}
                for index, of_weight in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": pieces})


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """A nested state with whole tensors on the CPU in place of pieces; on the first process only.

    To be called by all processes; what the others return is without the values of pieces.
    """
    whole: dict[str, Any] = _gathered(state)
    return whole


def _gathered(state: Any) -> Any:
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(state, dict):
        return {name: _gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_gathered(value) for value in state]
    return state


def scattered(state: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """A model's state of whole tensors, each cut as that of `model` is."""
    like = model.state_dict()
    return {name: _piece(value, like.get(name)) for name, value in state.items()}


def _piece(value: Any, like: Any) -> Any:
    """This process's piece of `value`, cut as `like` is where it has its shape."""
    whole = isinstance(value, torch.Tensor) and isinstance(like, DTensor)
    if not whole or value.shape != like.shape:
        return value
    # Every process has read the file: nothing needs to be sent.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def _blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Outermost members of lists that have trained weights: these are called, not reached into."""
    for child in module.children():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)):
            members = child.children()
            yield from (each for each in members if any(w.requires_grad for w in each.parameters()))
        else:
            yield from _blocks(child)
