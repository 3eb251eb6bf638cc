"""Networks of a model converted for another runtime, and computed with it.

The parts that are converted are found by watching the calls while images are made. A model that is
computed with a runtime is the same model: only the networks are called elsewhere.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.utils import _pytree as pytree

from synthcube import reading, storage
from synthcube.data.conditions import draw_missing_conditions, requested_values
from synthcube.errors import ArtifactError, ConfigError, FamilyError
from synthcube.models import inference
from synthcube.models.family import Family, Reconstructs, Samples
from synthcube.models.nets.calls import outermost_calls
from synthcube.schema import MAX_COUNT, MAX_VOXELS, List, Schema
from synthcube.sharing import runtimes
from synthcube.sharing.runtimes import Runtime, RuntimeName, Weights, record_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from synthcube.sharing.runtimes import Session

log = logging.getLogger("synthcube")

_PRECISION = "32-true"
_NUM_COMPARED = 2
_TOLERANCE = 1e-3


class Input(Schema):
    """One of the tensors or plain values that a network is called with, in their order."""

    shape: List[Annotated[int, Field(ge=0, le=MAX_VOXELS)] | None] | None = Field(
        default=None,
        description="Of a tensor; null along axes whose length may change, the batch first.",
    )
    constant: bool | Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)] | float | str | None = (
        Field(default=None, description="Value of an argument that is no tensor, always the same.")
    )


class ConversionRecord(Schema):
    """RUNTIME.json beside the networks."""

    runtime: RuntimeName
    version: str = Field(description="Of the runtime that the conversion was checked with.")
    weights: Weights = Field(description="How weights are stored; they are computed in float32.")
    largest_difference: float = Field(
        description="Of images from those of torch, of the whole range, through the whole sampler."
    )
    mean_difference: float = Field(description="Likewise, the mean over all voxels.")
    networks: dict[str, List[Input]] = Field(
        description="What each converted network is called with, by its path in the model."
    )


def check_request(runtime: RuntimeName, weights: Weights) -> None:
    """Raise a ConfigError if a runtime is unknown, not installed, or cannot store weights so."""
    target = runtimes.get(runtime)
    if weights not in target.weights:
        known = ", ".join(target.weights)
        raise ConfigError(f"--runtime_weights {weights}: {runtime} takes {known}.")
    target.version()


def convert(
    family: Family, folder: Path, runtime: RuntimeName, weights: Weights = "float32"
) -> ConversionRecord:
    """Write the networks of a model in the format of a runtime, and their record, to `folder`.

    The model computes with them from then on.

    Args:
        family: trained, on the CPU, in evaluation mode.
        weights: how they are stored: float32 gives the images of torch; float16 and int8 give
            smaller files and slightly other images.

    Raises:
        ConfigError: the runtime is not installed, or does not store weights so.
        FamilyError: a network cannot be converted, or would make other images.
    """
    check_request(runtime, weights)
    target = runtimes.get(runtime)
    expected: list[torch.Tensor] = []

    def make() -> torch.Tensor:
        expected.append(_images(family))
        return expected[-1]

    log.info("Making %d images with torch, to compare with.", _NUM_COMPARED)
    used = used_networks(family, make)
    if not used:
        raise FamilyError(f"{family.config.name} calls no network that could be converted.")
    for network in used:
        log.info("Converting %s for %s.", network.name, runtime)
        shapes = [argument.shape for argument in network.inputs if argument.shape is not None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of each other
            graph = _traced(network, target, weights)
            target.save(graph, shapes, folder, f"{runtime}.{network.name}", weights)
    record = ConversionRecord(
        runtime=runtime, version=target.version(), weights=weights, largest_difference=0.0,
        mean_difference=0.0, networks={network.name: network.inputs for network in used},
    )  # fmt: skip
    _replace_networks(family, folder, record)
    differences = (_images(family) - expected[0]).abs() / 2
    difference = float(differences.max())
    if weights == "float32" and not difference <= _TOLERANCE:
        raise FamilyError(
            f"{family.config.name} makes other images with {runtime} than with torch: they differ "
            f"by {difference:.2g} of the range, more than {_TOLERANCE:g}. Nothing is exported."
        )
    measured = {"largest_difference": difference, "mean_difference": float(differences.mean())}
    record = record.model_copy(update=measured)
    storage.write_text(folder / record_name(runtime), record.model_dump_json(indent=2) + "\n")
    return record


def converted(folder: Path, runtime: RuntimeName) -> ConversionRecord:
    """The record of a conversion in `folder`, a verified artifact; an ArtifactError without one."""
    path = folder / record_name(runtime)
    if not path.is_file():
        raise ArtifactError(
            f"{folder} was not converted for {runtime}: write a folder that is, with `synthcube "
            f"export -m {folder} -o FOLDER --runtime {runtime}`."
        )
    return reading.read_record(path, ConversionRecord, ArtifactError)


def substitute(model: nn.Module, folder: Path, runtime: RuntimeName) -> None:
    """Replace the networks of `model` by those converted for a runtime in `folder`.

    Raises:
        ArtifactError: `folder` was not converted for it, or not from this model.
        ConfigError: the runtime is not installed.
    """
    _replace_networks(model, folder, converted(folder, runtime))


def _replace_networks(model: nn.Module, folder: Path, record: ConversionRecord) -> None:
    """Replace the networks that a record lists; `folder` need not hold the record."""
    target = runtimes.get(record.runtime)
    target.version()
    for name, inputs in record.networks.items():
        try:
            network = model.get_submodule(name)
        except AttributeError as error:
            raise ArtifactError(f"{folder}: the model has no {name}; export it again.") from error
        network.forward = _called(name, target.session(folder, f"{record.runtime}.{name}"), inputs)


@dataclass(frozen=True, slots=True)
class Network:
    """A part of a model that is called as a whole, with what it was called with."""

    name: str
    """Its path among the modules of the model, such as first_stage.family.network.decoder."""
    module: nn.Module
    inputs: tuple[Input, ...]
    values: tuple[Any, ...]
    """Of each input in the last call."""
    tree: Any
    """Structure of the arguments; see torch.utils._pytree."""


def used_networks(model: nn.Module, make: Callable[[], torch.Tensor]) -> list[Network]:
    """The parts of `model` that `make` calls from outside of any other part.

    Left out are single layers, which cost little, and parts that are no function of their tensors:
    with hooks inside, with other plain values at each call, or with results that are no tensors.
    """
    calls: dict[str, list[_Call]] = {}

    def record(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any
    ) -> None:
        hooked = any(child._forward_hooks for child in module.modules())
        if next(module.children(), None) and not hooked:
            seen = calls.setdefault(name, [])
            seen[-1:] = [_without_tensors(call) for call in seen[-1:]]
            seen.append(_call(args, kwargs, returned))

    with outermost_calls(model, record):
        make()
    networks = []
    for name, seen in calls.items():
        if (inputs := _inputs(seen)) is not None:
            module, last = model.get_submodule(name), seen[-1]
            networks.append(Network(name, module, inputs, last.values, last.tree))
    return networks


@dataclass(frozen=True, slots=True)
class _Call:
    values: tuple[Any, ...]
    """Arguments; of all calls but the last without the tensors."""
    shapes: tuple[tuple[int, ...] | None, ...]
    """Of each tensor; None in place of a plain value."""
    tree: Any
    returns_tensors: bool


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> _Call:
    values, tree = pytree.tree_flatten((args, kwargs))
    parts = returned if isinstance(returned, tuple) else (returned,)
    returns_tensors = all(isinstance(part, torch.Tensor) for part in parts)
    return _Call(tuple(values), tuple(map(_shape, values)), tree, returns_tensors)


def _without_tensors(call: _Call) -> _Call:
    values = tuple(None if isinstance(value, torch.Tensor) else value for value in call.values)
    return replace(call, values=values)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _inputs(calls: Sequence[_Call]) -> tuple[Input, ...] | None:
    """What all calls have in common; None where that is not enough to call the network."""
    if any(call.tree != calls[0].tree or not call.returns_tensors for call in calls):
        return None
    arguments = [
        _input([call.values[index] for call in calls], [call.shapes[index] for call in calls])
        for index in range(len(calls[0].values))
    ]
    known = [argument for argument in arguments if argument is not None]
    has_tensors = any(argument.shape is not None for argument in known)
    return tuple(known) if has_tensors and len(known) == len(arguments) else None


def _input(values: Sequence[Any], shapes: Sequence[tuple[int, ...] | None]) -> Input | None:
    """An argument that is always a tensor, or always the same plain value; else None."""
    tensors = [shape for shape in shapes if shape is not None]
    if not tensors:
        is_plain = isinstance(values[0], (bool, int, float, str, type(None)))
        is_same = all(type(value) is type(values[0]) and value == values[0] for value in values)
        return Input(constant=values[0]) if is_plain and is_same else None
    if len(tensors) < len(shapes) or len({len(shape) for shape in tensors}) > 1:
        return None
    axes = zip(*tensors, strict=True)
    fixed = [lengths[0] if len({*lengths}) == 1 else None for lengths in axes]
    return Input(shape=tuple([None, *fixed[1:]] if fixed else []))


def _traced(network: Network, target: Runtime, weights: Weights) -> ExportedProgram:
    """The network as a function of its tensors, in the order of its inputs."""
    from torch.export import Dim, export

    tensors, axes = [], []
    for argument, value in zip(network.inputs, network.values, strict=True):
        if argument.shape is not None:
            # A batch of two at least: torch takes a length of 1 for one that never changes.
            is_single = value.ndim and value.shape[0] == 1
            tensors.append(value.repeat(2, *[1] * (value.ndim - 1)) if is_single else value.clone())
            changing = [axis for axis, length in enumerate(argument.shape) if length is None]
            axes.append(dict.fromkeys(changing, Dim.DYNAMIC))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides attention from the graph
    try:
        with torch.no_grad(), target.rewritten(network.module, weights):
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
    """A network as a function of its tensors; its other arguments are constants."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.inputs, self.tree = network.module, network.inputs, network.tree

    def forward(self, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        values = [
            argument.constant if argument.shape is None else next(rest) for argument in self.inputs
        ]
        args, kwargs = pytree.tree_unflatten(values, self.tree)
        return self.network(*args, **kwargs)


def _called(name: str, session: Session, inputs: Sequence[Input]) -> Callable[..., Any]:
    expected = [argument.constant for argument in inputs if argument.shape is None]
    are_tensors = [argument.shape is not None for argument in inputs]

    def forward(*args: Any, **kwargs: Any) -> Any:
        values = pytree.tree_leaves((args, kwargs))
        constants = [value for value in values if not isinstance(value, torch.Tensor)]
        if [isinstance(value, torch.Tensor) for value in values] != are_tensors or (
            constants != expected
        ):
            raise ArtifactError(
                f"{name} was converted for {expected} beside its tensors, and is given "
                f"{constants}: export the model again."
            )
        tensors = [value.detach() for value in values if isinstance(value, torch.Tensor)]
        outputs = session([tensor.contiguous().numpy() for tensor in tensors])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return forward


def _images(family: Any) -> torch.Tensor:
    """A few images, always the same, sampled and reconstructed where the model can."""
    device, image = torch.device("cpu"), family.image
    generator = torch.Generator().manual_seed(0)
    images = []
    if isinstance(family, Samples):
        seeds = inference.image_seeds(0, _NUM_COMPARED)
        nothing: list[dict[str, str]] = [{} for _ in seeds]
        values = draw_missing_conditions(
            requested_values(image.conditions, nothing), image.conditions, nothing, seeds
        )
        shape = (_NUM_COMPARED, len(image.source_channels), *image.size)
        source = torch.rand(shape, generator=generator) * 2 - 1 if image.source_channels else None
        images.append(inference.generate(family, seeds, values, _PRECISION, device, source))
    if isinstance(family, Reconstructs):
        noise = torch.rand((_NUM_COMPARED, image.channels, *image.size), generator=generator)
        images.append(inference.reconstruct(family, noise * 2 - 1, _PRECISION, device))
    return torch.cat(images)
