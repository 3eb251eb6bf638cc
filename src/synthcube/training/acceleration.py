"""Faster and smaller steps: torch.compile, activation checkpointing, precision, determinism."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

from synthcube.compute import CompileConfig, ComputeConfig
from synthcube.errors import ConfigError
from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.family import Family
from synthcube.models.first_stage import FirstStage
from synthcube.models.nets.calls import outermost_calls
from synthcube.schema import Batch


def trained_terms(trial: Family, batch: Batch) -> list[str]:
    """Names of the scalars that a training step with `batch` logs.

    Args:
        trial: a copy of the family in evaluation mode: codebooks and statistics may change in it.
    """
    if not (isinstance(trial, AdversarialFamily) and trial.discriminator is not None):
        with torch.no_grad():
            return list(trial.loss(batch))
    # With gradients: some terms, such as gradient penalties, need them.
    terms, images = trial.generator_loss(trial.prepared(batch))
    discriminator_terms = trial.discriminator_loss(batch, images.detach())
    names = list(terms)
    if trial.trains_discriminator():
        names += [f"discriminator_{name}" for name in discriminator_terms]
    return names


def called_networks(family: Family, batch: Batch) -> list[str]:
    """Names of the modules that a training step calls directly, not through another module."""
    trial = copy.deepcopy(family).eval()
    names: dict[str, None] = {}
    with outermost_calls(trial, lambda name, *_: names.setdefault(name)):
        trained_terms(trial, batch)
    return list(names)


_NEEDS = (
    "It needs a C++ compiler (g++) and Python's headers on a CPU, Triton and a C compiler on a "
    "GPU. Install these, or remove compute.compile: the results are the same."
)


def compile_networks(family: Family, batch: Batch, compute: ComputeConfig) -> list[str]:
    """Let torch.compile the networks that a training step calls; return their names.

    They are compiled in place at their first call, so copies (the moving average) are not
    compiled. Neither are first stages, which run once.

    Args:
        batch: on the family's device.
    """
    config = compute.compile
    if config is None:
        return []
    if family.differentiates_twice:
        raise ConfigError(
            f"compute.compile does not work with this {family.config.name}, whose loss "
            "contains gradients (penalties), which torch.compile cannot differentiate: remove it, "
            "or set the weights of the penalties to 0."
        )
    require_compiler(config, family.device)
    compiled = []
    for name in called_networks(family, batch):
        network = family.get_submodule(name)
        trained = any(weight.requires_grad for weight in network.parameters())
        if trained and any(True for _ in network.children()):
            network.compile(
                mode=None if config.mode == "default" else config.mode,
                dynamic=config.dynamic,
                backend=config.backend,
            )
            compiled.append(name)
    return compiled


def require_compiler(config: CompileConfig, device: torch.device) -> None:
    """Check within seconds that torch.compile works, before the data is read."""
    try:
        if config.backend == "inductor" and device.type == "cpu":
            from torch._inductor import cpp_builder

            cpp_builder.get_cpp_compiler()  # the function below may come from torch's cache
        line = torch.compile(lambda x: x.sin() + 1, backend=config.backend)
        line(torch.zeros(4, device=device))
    except Exception as error:  # compilers fail in many ways
        raise ConfigError(
            f"compute.compile: torch.compile does not work on this machine "
            f"({type(error).__name__}: {first_line(error)}). {_NEEDS}"
        ) from error


@contextmanager
def compile_errors(compute: ComputeConfig) -> Iterator[None]:
    """Replace torch.compile's errors by a ConfigError that says what to do."""
    if compute.compile is None:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise ConfigError(
            f"compute.compile: this network cannot be compiled "
            f"({type(error).__name__}: {first_line(error)}): remove it."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class without a text; 200 characters at most."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__


WRAPPED = "_checkpoint_wrapped_module."


def recompute_blocks(
    family: Family, context: Callable[[], AbstractContextManager[object]] | None = None
) -> int:
    """Turn on activation checkpointing in every block of `family`; return the number of blocks.

    Blocks are elements of a ModuleList, ModuleDict or Sequential with at least two weighted layers
    and no inner list, and all other modules of the same classes. Modules with buffers are skipped:
    a second forward pass would update them twice in a step.

    Args:
        context: makes the context of each recomputed pass, for modes that the backward pass leaves.
    """
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    elements = [element for module in _trained_modules(family) if isinstance(module, lists)
                for element in module.children()]  # fmt: skip
    block_types = tuple({type(module) for module in elements if _is_block(module)})
    wrapped = 0
    more: dict[str, Any] = {"context_fn": lambda: (nullcontext(), context())} if context else {}
    for parent in list(_trained_modules(family)):
        for name, child in list(parent.named_children()):
            if isinstance(child, block_types) and not any(True for _ in child.buffers()):
                setattr(parent, name, checkpoint_wrapper(child, **more))
                wrapped += 1
    if not wrapped:
        raise ConfigError(
            f"compute.activation_checkpointing is true, but {family.config.name} has no blocks "
            "that it could recompute: remove it, and lower training.batch_size and raise "
            "training.accumulate to save memory."
        )
    return wrapped


def plain_name(name: str) -> str:
    """The name of a weight without the wrappers that `recompute_blocks` adds."""
    return name.replace(WRAPPED, "")


def _trained_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield `module` and all modules in it, except first stages, which are not trained."""
    if isinstance(module, FirstStage):
        return
    yield module
    for child in module.children():
        yield from _trained_modules(child)


def _is_block(module: nn.Module) -> bool:
    inner = list(module.modules())[1:]
    num_weighted = sum(any(w.ndim > 1 for w in part.parameters(recurse=False)) for part in inner)
    has_list = any(isinstance(part, (nn.ModuleList, nn.ModuleDict)) for part in inner)
    return num_weighted > 1 and not has_list and type(module).forward is not nn.Module.forward


_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
HALF_PRECISIONS = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfWeights(Precision):
    """Keeps trained weights, gradients and optimizer states in 16 bits; computes with autocast."""

    def __init__(self, precision: Literal["16-true", "bf16-true"], device: str) -> None:
        self.precision = precision
        self.dtype = HALF_PRECISIONS[precision]
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            weights = _trained(part)
            if not weights or isinstance(part, _NORMS):
                continue
            for weight in weights:
                weight.data = weight.data.to(self.dtype)
            _hook(part, _outside_autocast)
        return module

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with torch.autocast(self.device, self.dtype):
            yield


class DoubleWeights(Precision):
    """Keeps trained weights, gradients and optimizer states in float64, and computes in float64."""

    precision: Literal["64-true"] = "64-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            weights = _trained(part)
            if not weights and not isinstance(part, _BatchNorm):
                continue
            for weight in weights:
                weight.data = weight.data.double()
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    persistent = name not in part._non_persistent_buffers_set
                    part.register_buffer(name, buffer.double(), persistent)
            _hook(part, _as_double)
        return module


def weights_precision(name: str, device: str) -> Precision | None:
    """Our plugin for a precision; None where Lightning's own is right.

    Args:
        name: Lightning's full name, such as "bf16-true".
        device: type of the device, such as "cuda".
    """
    if name == "64-true":
        return DoubleWeights()
    if name == "16-true":
        return HalfWeights("16-true", device)
    return HalfWeights("bf16-true", device) if name == "bf16-true" else None


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """Trained parameters of the module itself, without those of its children."""
    return [weight for weight in module.parameters(recurse=False) if weight.requires_grad]


def _hook(module: nn.Module, hook: Any) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _as_double(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast(args, kwargs, torch.float64)


def _outside_autocast(module: nn.Module, args: Any, kwargs: Any) -> Any:
    weight = _trained(module)
    if not weight or torch.is_autocast_enabled(weight[0].device.type):
        return args, kwargs
    return _cast(args, kwargs, weight[0].dtype)


def _cast(args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


@contextmanager
def determinism(deterministic: bool) -> Iterator[None]:
    """Restore at the end what Lightning's `deterministic` sets for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    except RuntimeError as error:
        operation = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not (deterministic and operation):
            raise
        raise ConfigError(
            f"compute.deterministic is true, but {operation[1]} has no deterministic algorithm "
            "on this device. Remove compute.deterministic, use another model, or train on a CPU, "
            "where results are reproducible without it."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
