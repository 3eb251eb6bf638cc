"""A model whose networks are computed by another runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from synthcube import reading
from synthcube.errors import ArtifactError
from synthcube.export.config import Runtime
from synthcube.export.runtimes.formats import FORMATS, Converted, Input, record_name


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
