"""Layers that OpenVINO would compute slowly, written in another way while they are converted.

Its convolutions want channels last. A group norm as it converts it, and a time embedding that is
added after a reshape, want channels first: between them every image is copied around, which takes
more time than the convolutions. Written with means over space and convolutions of kernel size 1,
the same numbers stay where they are: the default rectified_flow takes 0.34 CPU-s a call instead
of 0.53.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from synthcube import reading, storage
from synthcube.data.conditions import draw_missing_conditions, requested_values
from synthcube.errors import ArtifactError, ConfigError, FamilyError
from synthcube.models import inference
from synthcube.models.family import Family, Reconstructs, Samples
from synthcube.sharing.config import Runtime, Weights
from synthcube.sharing.runtimes import FORMATS, Converted, Input, record_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@contextmanager
def channels_last_layers(module: nn.Module) -> Iterator[None]:
    """Every such layer inside of `module` is written so, for as long as this lasts."""
    changed: list[Any] = []
    for each in module.modules():
        layer: Any = each
        if isinstance(each, nn.GroupNorm):
            layer.forward = _normalizing(each)
            changed.append(layer)
        elif isinstance(each, DiffusionUNetResnetBlock):
            layer = each.time_emb_proj
            layer.forward = _projecting(each.time_emb_proj)
            changed.append(layer)
    try:
        yield
    finally:
        for each in changed:
            del each.forward


def _normalizing(norm: nn.GroupNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    channels, size = norm.num_channels, norm.num_channels // norm.num_groups
    same_group = torch.block_diag(*[torch.full((size, size), 1 / size)] * norm.num_groups)

    def over_groups(each: torch.Tensor) -> torch.Tensor:
        """The mean of the channels of a group, (B, C, 1, ...), in place of each of them."""
        if size == 1:
            return each
        ones = (1,) * (each.ndim - 2)
        return _convolution(each)(each, same_group.view(channels, channels, *ones))

    def forward(x: torch.Tensor) -> torch.Tensor:
        axes, ones = tuple(range(2, x.ndim)), (1,) * (x.ndim - 2)
        centred = x - over_groups(x.mean(axes, keepdim=True))
        variance = over_groups(centred.square().mean(axes, keepdim=True))
        y = centred * torch.rsqrt(variance + norm.eps)
        if norm.affine:
            y = y * norm.weight.view(1, -1, *ones) + norm.bias.view(1, -1, *ones)
        return y

    return forward


def _projecting(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = linear.weight[:, :, None, None]
        return functional.conv2d(x[:, :, None, None], weight, linear.bias).flatten(1)

    return forward


def _convolution(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    found: Callable[..., torch.Tensor] = {4: functional.conv2d, 5: functional.conv3d}[x.ndim]
    return found


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


log = logging.getLogger("synthcube")

_PRECISION = "32-true"
_CHECKED = 2
_TOLERANCE = 1e-3


def check_request(runtime: Runtime, weights: Weights) -> None:
    """
    Raises:
        ConfigError: the runtime is not known or not installed, or does not store weights so.
    """
    if runtime not in FORMATS:
        raise ConfigError(f"--runtime {runtime}: it must be {' or '.join(FORMATS)}.")
    form = FORMATS[runtime]
    if weights not in form.WEIGHTS:
        raise ConfigError(
            f"--runtime_weights {weights}: {runtime} takes {', '.join(form.WEIGHTS)}."
        )
    form.version()


def convert(
    family: Family, folder: Path, runtime: Runtime, weights: Weights = "float32"
) -> Converted:
    """Write the networks that a model makes images with, and their record, to `folder`.

    The model is then computed with them, and stays so.

    Args:
        family: trained, on the CPU, in evaluation mode.
        weights: how they are stored: float32 gives the images of torch; float16 and int8 give
            smaller files and slightly other images.

    Raises:
        ConfigError: the runtime is not installed, or does not store weights so.
        FamilyError: a network cannot be converted, or would make other images.
    """
    check_request(runtime, weights)
    form = FORMATS[runtime]
    expected: list[torch.Tensor] = []

    def make() -> torch.Tensor:
        expected.append(_images(family))
        return expected[-1]

    log.info("Making %d images with torch, to compare with.", _CHECKED)
    used = used_networks(family, make)
    if not used:
        raise FamilyError(f"{family.config.name} calls no network that could be converted.")
    for network in used:
        log.info("Converting %s for %s.", network.name, runtime)
        shapes = [each.shape for each in network.inputs if each.shape is not None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries about each other
            # OpenVINO 2026.4 takes convolutions of kernel size 1 with weights in 8 bits for
            # something else.
            graph = program(network, rewritten=weights != "int8")
            form.save(graph, shapes, folder, f"{runtime}.{network.name}", weights)
    record = Converted(
        runtime=runtime, version=form.version(), weights=weights, largest_difference=0.0,
        mean_difference=0.0, networks={each.name: each.inputs for each in used},
    )  # fmt: skip
    compute_with(family, folder, record)
    differences = (_images(family) - expected[0]).abs() / 2
    difference = float(differences.max())
    if weights == "float32" and not difference <= _TOLERANCE:
        raise FamilyError(
            f"{family.config.name} makes other images with {runtime} than with torch: they differ "
            f"by {difference:.2g} of the range, more than {_TOLERANCE:g}. Nothing is exported."
        )
    found = {"largest_difference": difference, "mean_difference": float(differences.mean())}
    record = record.model_copy(update=found)
    storage.write_text(folder / record_name(runtime), record.model_dump_json(indent=2) + "\n")
    return record


def _images(family: Any) -> torch.Tensor:
    """A few images, by all that the model can do; always the same."""
    device = torch.device("cpu")
    image = family.image
    generator = torch.Generator().manual_seed(0)
    made = []
    if isinstance(family, Samples):
        seeds = inference.image_seeds(0, _CHECKED)
        wishes: list[dict[str, str]] = [{} for _ in seeds]
        asked = requested_values(image.conditions, wishes)
        values = draw_missing_conditions(asked, image.conditions, wishes, seeds)
        shape = (_CHECKED, len(image.source_channels), *image.size)
        source = torch.rand(shape, generator=generator) * 2 - 1 if image.source_channels else None
        made.append(inference.generate(family, seeds, values, _PRECISION, device, source))
    if isinstance(family, Reconstructs):
        given = torch.rand((_CHECKED, image.channels, *image.size), generator=generator) * 2 - 1
        made.append(inference.reconstruct(family, given, _PRECISION, device))
    return torch.cat(made)


def converted(folder: Path, runtime: Runtime) -> Converted:
    """What the record of a conversion says.

    Args:
        folder: of an artifact, which was verified.

    Raises:
        ArtifactError: it was not converted for that runtime.
    """
    path = folder / record_name(runtime)
    if not path.is_file():
        raise ArtifactError(
            f"{folder} was not converted for {runtime}: write a folder that is, with `synthcube "
            f"export -m {folder} -o FOLDER --runtime {runtime}`."
        )
    values = reading.read_object(path, ArtifactError)
    return reading.validated(values, Converted, path, ArtifactError)


def substitute(model: nn.Module, folder: Path, runtime: Runtime) -> None:
    """Let the networks of `model` be computed by a runtime, on the CPU, from now on.

    Raises:
        ArtifactError: `folder` was not converted for it, or not from this model.
        ConfigError: the runtime is not installed.
    """
    compute_with(model, folder, converted(folder, runtime))


def compute_with(model: nn.Module, folder: Path, record: Converted) -> None:
    """Likewise, with the networks that a record tells of; `folder` need not hold the record.

    Raises:
        ArtifactError, ConfigError: see :func:`substitute`.
    """
    form = FORMATS[record.runtime]
    form.version()
    for name, inputs in record.networks.items():
        try:
            network = model.get_submodule(name)
        except AttributeError as error:
            raise ArtifactError(f"{folder}: the model has no {name}; export it again.") from error
        session = form.Session(folder, f"{record.runtime}.{name}")
        network.forward = _called(name, session, inputs)


def _called(
    name: str, session: Callable[..., list[torch.Tensor]], inputs: Sequence[Input]
) -> Callable[..., Any]:
    expected = [each.constant for each in inputs if each.shape is None]
    places = [each.shape is not None for each in inputs]

    def forward(*args: Any, **kwargs: Any) -> Any:
        values = pytree.tree_leaves((args, kwargs))
        constants = [value for value in values if not isinstance(value, torch.Tensor)]
        if [isinstance(value, torch.Tensor) for value in values] != places or (
            constants != expected
        ):
            raise ArtifactError(
                f"{name} was converted for {expected} beside its tensors, and is given "
                f"{constants}: export the model again."
            )
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        made = session([each.detach().contiguous().numpy() for each in tensors])
        return made[0] if len(made) == 1 else tuple(made)

    return forward
