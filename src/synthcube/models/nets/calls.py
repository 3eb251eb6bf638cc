"""Calls that a model makes of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Record = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def outermost_calls(model: nn.Module, record: Record) -> Iterator[None]:
    """Inside, report every call of a part of `model` that is not made by another part.

    `record` is called after each such call with the name of the part, the part, its positional and
    keyword arguments, and what it returned.
    """
    inside = False

    def watch(name: str, module: nn.Module) -> None:
        forward = module.forward

        def watching(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            inside = True
            try:
                returned = forward(*args, **kwargs)
            finally:
                inside = False
            record(name, module, args, kwargs, returned)
            return returned

        module.forward = watching

    parts = [(name, module) for name, module in model.named_modules() if name]
    for name, module in parts:
        watch(name, module)
    try:
        yield
    finally:
        for _, module in parts:
            del module.forward
