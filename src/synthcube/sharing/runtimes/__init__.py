"""Runtimes that compute a model's networks in place of torch: one file of this folder for each.

A new one is a new file here, with its :class:`Runtime` as RUNTIME, and its extra in pyproject.toml.
The config, the command line, the self-check and the downloads take their names from these files.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from synthcube import environment
from synthcube.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    Session = Callable[[Sequence[npt.NDArray[Any]]], list[torch.Tensor]]
    Shapes = Sequence[Sequence[int | None]]
    RuntimeName = str
    RuntimeOrTorch = str

Weights = Literal["float32", "float16", "int8"]
"""How converted weights are stored."""

# Listed without importing them: `synthcube --help` imports no torch.
NAMES: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
CHOICES: tuple[str, ...] = ("torch", *NAMES)
if not TYPE_CHECKING:
    RuntimeName = Literal[NAMES]
    RuntimeOrTorch = Literal[CHOICES]


class Runtime(ABC):
    """What SynthCube needs to know of a runtime."""

    device: ClassVar[str]
    """Device that its networks compute on, as compute.accelerator calls it."""
    weights: ClassVar[tuple[Weights, ...]]
    """Formats in which it can store them."""
    suffixes: ClassVar[tuple[str, ...]]
    """Of the files that :meth:`save` writes."""

    @abstractmethod
    def version(self) -> str:
        """Version of the installed runtime; a ConfigError where it is not installed."""

    def rewritten(self, network: nn.Module, weights: Weights) -> AbstractContextManager[None]:
        """Layers of `network` in a form that the runtime computes faster, while it is traced."""
        return nullcontext()

    @abstractmethod
    def save(
        self, program: ExportedProgram, shapes: Shapes, folder: Path, stem: str, weights: Weights
    ) -> None:
        """Write a network to `folder`, as files called `stem` with the runtime's suffixes.

        Args:
            shapes: of its tensors, None along axes whose length may change.
            weights: one of :attr:`weights`.
        """

    @abstractmethod
    def session(self, folder: Path, stem: str) -> Session:
        """A saved network, as a function from its tensors to those it returns."""


def get(name: str) -> Runtime:
    """The runtime of that name; a ConfigError where there is none."""
    if name not in NAMES:
        raise ConfigError(f"--runtime {name}: it must be {' or '.join(NAMES)}.")
    runtime: Runtime = import_module(f"{__name__}.{name}").RUNTIME
    return runtime


def imported(package: str, fault: str) -> Any:
    """A package of an extra, with its telemetry switched off; `fault` where it is not there.

    Raises:
        ConfigError: `fault`.
    """
    environment.keep_conversions_local()
    try:
        return import_module(package)
    except ImportError as error:
        raise ConfigError(fault) from error


def is_installed(name: str) -> bool:
    """Whether networks can be computed with the runtime here."""
    try:
        get(name).version()
    except ConfigError:
        return False
    return True


def record_name(name: str) -> str:
    """Name of the file that records a conversion for the runtime."""
    return f"{name}.json"


def is_part(file: str, *names: str) -> bool:
    """Whether a file of an exported folder belongs to a conversion for one of the runtimes."""
    return any(
        file == record_name(name)
        or (file.startswith(f"{name}.") and file.endswith(get(name).suffixes))
        for name in names or NAMES
    )
