"""Faster and smaller steps: torch.compile, activation checkpointing, precision, determinism."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
from synthcube.schema import Batch


def copy_of(family: Family) -> Any:
    """To be tried on: a loss may move what a family keeps, as codebooks or running statistics."""
    return copy.deepcopy(family).eval()


def trained_terms(trial: Family, batch: Batch) -> list[str]:
    """Names of the scalars that a training step at that batch logs."""
    if not (isinstance(trial, AdversarialFamily) and trial.discriminator is not None):
        with torch.no_grad():
            return list(trial.loss(batch))
    # With gradients: some terms are made of them.
    terms, made = trial.generator_loss(trial.prepared(batch))
    judged = trial.discriminator_loss(batch, made.detach())
    names = list(terms)
    if trial.trains_discriminator():
        names += [f"discriminator_{name}" for name in judged]
    return names


def called_networks(family: Family, batch: Batch) -> list[str]:
    """Names of the modules that a training step calls itself, not through another of them."""
    trial = copy_of(family)
    found: dict[str, None] = {}
    depth = 0

    def enter(name: str) -> None:
        nonlocal depth
        if depth == 0:
            found[name] = None
        depth += 1

    def leave() -> None:
        nonlocal depth
        depth -= 1

    for name, module in trial.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *_, name=name: enter(name))
            module.register_forward_hook(lambda *_: leave(), always_call=True)
    trained_terms(trial, batch)
    return list(found)


_NEEDS = (
    "A CPU needs a C++ compiler (g++) and the headers of Python for it, a GPU Triton and a C "
    "compiler. Install these, or leave compute.compile out: the outcome is the same."
)


def compile_networks(family: Family, batch: Batch, compute: ComputeConfig) -> list[str]:
    """Compile, at their first call, the networks that a training step calls; returns their names.

    In place, so that copies (the moving average) are plain. First stages stay plain: they run once.

    Args:
        batch: on the family's device.

    Raises:
        ConfigError: nothing can be compiled on this machine, or not this family.
    """
    config = compute.compile
    if config is None:
        return []
    if family.differentiates_twice:
        raise ConfigError(
            f"compute.compile does not work with this {family.config.name}, whose loss holds "
            "gradients (penalties), which torch.compile cannot differentiate: leave it out, or "
            "set the weights of the penalties to 0."
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
    """Compile one line, in seconds, rather than find out after the data is read.

    Raises:
        ConfigError: that fails on this machine.
    """
    try:
        if config.backend == "inductor" and device.type == "cpu":
            _find_compiler()  # a line compiled in the past would not ask for one
        line = torch.compile(lambda x: x.sin() + 1, backend=config.backend)
        line(torch.zeros(4, device=device))
    except Exception as error:  # compilers fail in many ways
        raise ConfigError(
            f"compute.compile: torch.compile does not work on this machine ({_first(error)}). "
            + _NEEDS
        ) from error


@contextmanager
def compile_errors(compute: ComputeConfig) -> Iterator[None]:
    """Says what to do where a network cannot be compiled.

    Raises:
        ConfigError: in place of the error of torch.compile.
    """
    if compute.compile is None:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise ConfigError(
            f"compute.compile: this network cannot be compiled ({_first(error)}): leave it out."
        ) from error


def _find_compiler() -> None:
    from torch._inductor import cpp_builder

    cpp_builder.get_cpp_compiler()


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


WRAPPED = "_checkpoint_wrapped_module."


def recompute_blocks(family: Family) -> int:
    """Wrap every block of the networks of `family`; returns how many.

    Blocks are the modules that a network has in a row (elements of a ModuleList or Sequential),
    with two weighted layers at least and no such row inside; and all others of these classes.
    Modules that keep something beside weights are left out: it would be moved twice in a step.

    Raises:
        ConfigError: there is no block.
    """
    kinds = tuple({type(each) for each in _rows(family) if _is_block(each)})
    wrapped = 0
    for parent in list(_trained_modules(family)):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds) and not any(True for _ in child.buffers()):
                setattr(parent, name, checkpoint_wrapper(child))
                wrapped += 1
    if not wrapped:
        raise ConfigError(
            f"compute.activation_checkpointing is true, but {family.config.name} has no blocks "
            "whose inside could be computed again: leave it out, and lower training.batch_size "
            "with training.accumulate to save memory."
        )
    return wrapped


def plain_name(name: str) -> str:
    """The name of a weight as it is without wrappers around blocks."""
    return name.replace(WRAPPED, "")


def _trained_modules(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and all inside, but for first stages, which have no backward pass."""
    if isinstance(module, FirstStage):
        return
    yield module
    for child in module.children():
        yield from _trained_modules(child)


def _rows(family: Family) -> Iterator[nn.Module]:
    for module in _trained_modules(family):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            yield from module.children()


def _is_block(module: nn.Module) -> bool:
    inner = list(module.modules())[1:]
    weighted = [each for each in inner if any(w.ndim > 1 for w in each.parameters(recurse=False))]
    has_row = any(isinstance(each, (nn.ModuleList, nn.ModuleDict)) for each in inner)
    return len(weighted) > 1 and not has_row and type(module).forward is not nn.Module.forward


_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
_HALVES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class HalfWeights(Precision):
    """Trained weights, gradients and optimizer states in 16 bits; autocast computes with them."""

    def __init__(self, precision: Literal["16-true", "bf16-true"], device: str) -> None:
        self.precision = precision
        self.dtype = _HALVES[precision]
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        for each in module.modules():
            own = _trained(each)
            if not own or isinstance(each, _NORMS):
                continue
            for weight in own:
                weight.data = weight.data.to(self.dtype)
            _hook(each, _outside_autocast)
        return module

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with torch.autocast(self.device, self.dtype):
            yield


class DoubleWeights(Precision):
    """Trained weights, gradients and optimizer states in float64; each layer computes in it."""

    precision: Literal["64-true"] = "64-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        for each in module.modules():
            own = _trained(each)
            if not own and not isinstance(each, _BatchNorm):
                continue
            for weight in own:
                weight.data = weight.data.double()
            for name, buffer in each.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    each.register_buffer(
                        name, buffer.double(), name not in each._non_persistent_buffers_set
                    )
            _hook(each, _as_double)
        return module


def is_halved(name: str) -> bool:
    """Whether weights have 16 bits in that precision."""
    return name in _HALVES


def weights_precision(name: str, device: str) -> Precision | None:
    """The plugin of that precision; None where Lightning has it.

    Args:
        name: Lightning's full name, such as "bf16-true".
        device: type of the device, such as "cuda".
    """
    if name == "64-true":
        return DoubleWeights()
    if name == "16-true":
        return HalfWeights("16-true", device)
    if name == "bf16-true":
        return HalfWeights("bf16-true", device)
    return None


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """The module's own, without those of modules in it."""
    return [each for each in module.parameters(recurse=False) if each.requires_grad]


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
def determinism(wanted: bool) -> Iterator[None]:
    """Puts back what Lightning's `deterministic` sets for the whole process.

    Raises:
        ConfigError: an operation has no deterministic algorithm.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not (wanted and found):
            raise
        raise ConfigError(
            f"compute.deterministic is true, but {found[1]} has no deterministic algorithm on "
            "this device. Leave compute.deterministic out, take another model, or train on a CPU, "
            "where a training repeats itself without it."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
