"""A network as a graph of tensor operations, for any batch: by torch.export."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from synthcube.errors import FamilyError
from synthcube.export.runtimes.layers import channels_last_layers
from synthcube.export.runtimes.networks import Network

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def program(network: Network, *, rewritten: bool = True) -> ExportedProgram:
    """The network as a function of its tensors, in the order of its inputs.

    Args:
        rewritten: with the layers of layers.py, which are faster; else as they are.

    Raises:
        FamilyError: it does what torch.export cannot follow.
    """
    from torch.export import Dim, export

    tensors, axes = [], []
    for given, value in zip(network.inputs, network.values, strict=True):
        if given.shape is not None:
            tensors.append(_example(value))
            changing = [axis for axis, length in enumerate(given.shape) if length is None]
            axes.append(dict.fromkeys(changing, Dim.DYNAMIC))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides attention from the graph
    try:
        layers = channels_last_layers(network.module) if rewritten else nullcontext()
        with torch.no_grad(), layers:
            return export(
                _OfTensors(network), tuple(tensors), dynamic_shapes=(tuple(axes),), strict=False
            )
    except Exception as error:
        raise FamilyError(
            f"{network.name} cannot be converted, because torch.export cannot follow what it does "
            "(one cause is a length taken as a number: use x.shape[0] in place of len(x)): "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _OfTensors(nn.Module):
    """A network whose plain values are filled in."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.inputs, self.tree = network.module, network.inputs, network.tree

    def forward(self, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        values = [each.constant if each.shape is None else next(rest) for each in self.inputs]
        args, kwargs = pytree.tree_unflatten(values, self.tree)
        return self.network(*args, **kwargs)


def _example(value: torch.Tensor) -> torch.Tensor:
    """As it was given, with a batch of two at least: torch takes 1 for a length that stays."""
    if value.ndim and value.shape[0] == 1:
        return value.repeat(2, *[1] * (value.ndim - 1))
    return value.clone()
