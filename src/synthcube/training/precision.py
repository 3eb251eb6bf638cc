"""Weights in another precision than float32, for families that are written for float32.

Lightning's own plugins convert all of a module. Here only what is trained is converted: statistics,
codebooks, frozen first stages and norms stay as they are, and so does the moving average, which
would not move in bfloat16: its steps of a thousandth are below the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

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
