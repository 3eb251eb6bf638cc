"""torch.compile for the networks of any family; names of weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from synthcube.compute import CompileConfig, ComputeConfig
from synthcube.errors import ConfigError
from synthcube.models.family import Family
from synthcube.schema import Batch
from synthcube.training.dry_pass import called_networks

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
def explained(compute: ComputeConfig) -> Iterator[None]:
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
