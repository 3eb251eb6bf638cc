"""Which networks a model computes with: those that are called while it makes images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    tensors: parts with hooks inside, that are given other plain values each time, or that return
    something else than tensors.
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
    """As they were given; of all calls but the last without the tensors."""
    shapes: tuple[tuple[int, ...] | None, ...]
    """Of each tensor; None in place of a plain value."""
    tree: Any
    returns_tensors: bool


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
            inside = True
            try:
                returned = forward(*args, **kwargs)
            finally:
                inside = False
            if _stands_alone(module):
                seen = calls.setdefault(name, [])
                seen[-1:] = [_without_tensors(call) for call in seen[-1:]]
                seen.append(_call(args, kwargs, returned))
            return returned

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


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> _Call:
    values, tree = pytree.tree_flatten((args, kwargs))
    parts = returned if isinstance(returned, tuple) else (returned,)
    returns_tensors = all(isinstance(part, torch.Tensor) for part in parts)
    return _Call(tuple(values), tuple(map(_shape, values)), tree, returns_tensors)


def _without_tensors(call: _Call) -> _Call:
    values = tuple(None if isinstance(each, torch.Tensor) else each for each in call.values)
    return replace(call, values=values)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _inputs(calls: Sequence[_Call]) -> tuple[Input, ...] | None:
    """What the calls have in common; None where that is not enough to call it again."""
    if any(each.tree != calls[0].tree or not each.returns_tensors for each in calls):
        return None
    found = [
        _input([each.values[place] for each in calls], [each.shapes[place] for each in calls])
        for place in range(len(calls[0].values))
    ]
    known = [each for each in found if each is not None]
    is_whole = len(known) == len(found) and any(each.shape is not None for each in known)
    return tuple(known) if is_whole else None


def _input(values: Sequence[Any], shapes: Sequence[tuple[int, ...] | None]) -> Input | None:
    """One place of the calls: always a tensor, or always the same plain value; else None."""
    tensors = [shape for shape in shapes if shape is not None]
    if not tensors:
        is_plain = isinstance(values[0], (bool, int, float, str, type(None)))
        is_same = all(type(each) is type(values[0]) and each == values[0] for each in values)
        return Input(constant=values[0]) if is_plain and is_same else None
    if len(tensors) < len(shapes) or len({len(shape) for shape in tensors}) > 1:
        return None
    axes = zip(*tensors, strict=True)
    fixed = [lengths[0] if len({*lengths}) == 1 else None for lengths in axes]
    return Input(shape=tuple([None, *fixed[1:]] if fixed else []))
