"""Which networks a model computes with: those that are called while it makes images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from synthcube.export.runtimes.formats import Input


@dataclass(frozen=True, slots=True)
class Network:
    """A part of a model that is called as a whole, with what it was called with."""

    name: str
    """Its path among the modules of the model, such as first_stage.family.network.decoder."""
    module: nn.Module
    inputs: tuple[Input, ...]
    values: tuple[Any, ...]
    """Of each input, in the last call."""
    tree: Any
    """How they stand among the arguments; see torch.utils._pytree."""


def used_networks(model: nn.Module, make: Callable[[], torch.Tensor]) -> list[Network]:
    """The parts of `model` that `make` calls from outside of any other part.

    Left out are single layers, which cost little, and what cannot be had as a function of its
    tensors: parts with hooks inside, or that are given other plain values each time.
    """
    calls: dict[str, list[_Call]] = {}
    with _watched(model, calls):
        make()
    found = []
    for name, each in calls.items():
        inputs = _inputs(each)
        if inputs is not None:
            last = each[-1]
            network = Network(name, model.get_submodule(name), inputs, last.values, last.tree)
            found.append(network)
    return found


@dataclass(frozen=True, slots=True)
class _Call:
    values: tuple[Any, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    tree: Any


@contextmanager
def _watched(model: nn.Module, calls: dict[str, list[_Call]]) -> Iterator[None]:
    """Every outermost call is put into `calls`, by the name of the part."""
    inside = False

    def watch(name: str, module: nn.Module) -> None:
        forward = module.forward

        def watching(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return forward(*args, **kwargs)
            if _stands_alone(module):
                values, tree = pytree.tree_flatten((args, kwargs))
                shapes = tuple(_shape(value) for value in values)
                seen = calls.setdefault(name, [])
                if seen:  # the tensors of one call are enough
                    seen[-1] = _Call((), seen[-1].shapes, seen[-1].tree)
                seen.append(_Call(tuple(values), shapes, tree))
            inside = True
            try:
                return forward(*args, **kwargs)
            finally:
                inside = False

        module.forward = watching

    parts = [(name, each) for name, each in model.named_modules() if name]
    for name, module in parts:
        watch(name, module)
    try:
        yield
    finally:
        for _, module in parts:
            del module.forward


def _stands_alone(module: nn.Module) -> bool:
    hooked = any(each._forward_hooks for each in module.modules())
    return bool(next(module.children(), None)) and not hooked


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _inputs(calls: Sequence[_Call]) -> tuple[Input, ...] | None:
    """What the calls have in common; None where that is not enough to call it again."""
    last = calls[-1]
    if any(each.tree != last.tree for each in calls):
        return None
    found = []
    for place, value in enumerate(last.values):
        shapes = [each.shapes[place] for each in calls]
        if any(shape is None or shapes[0] is None for shape in shapes):
            if not isinstance(value, (bool, int, float, str, type(None))) or set(shapes) != {None}:
                return None
            found.append(Input(constant=value))
        else:
            known = [shape for shape in shapes if shape is not None]
            if len({len(shape) for shape in known}) > 1:
                return None
            axes = zip(*known, strict=True)
            fixed = [lengths[0] if len({*lengths}) == 1 else None for lengths in axes]
            found.append(Input(shape=tuple([None, *fixed[1:]] if fixed else [])))
    return tuple(found) if any(each.shape is not None for each in found) else None
