"""A round at a site: the weights in its own checkpoint are replaced, and read again at the end.

So a round continues the site's run: the optimizer's state, the schedule, the order of images and
the random numbers of every step go on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthcube.errors import FederationError, first_faults
from synthcube.federation.update import Update, UpdateHeader, are_finite
from synthcube.models import artifact
from synthcube.storage import write_with
from synthcube.training import checkpoints
from synthcube.training.privacy import recorded_budget

# Of a checkpoint with a moving average: the latest weights, and the averaged ones.
_LATEST, _AVERAGED = "current_model_state", "state_dict"
_PREFIXES = {_LATEST: "latest.", _AVERAGED: "averaged."}
_OWN = "first_stage."
"""Weights that all sites have by their hash, and that nobody sends."""
_COUNTER = "num_batches_tracked"
"""Counts the batches of a site's own batch norms; it affects no result."""


def exchanged_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a model's state that is sent: what is trained or measured, no whole numbers."""
    return {
        name: tensor
        for name, tensor in state.items()
        if tensor.is_floating_point() and not name.startswith(_OWN)
    }


def blank_weights(family: torch.nn.Module, *, ema: bool) -> dict[str, Tensor]:
    """Names, shapes and types of what a site sends, as tensors on the meta device."""
    blank = partial(torch.empty_like, device="meta", dtype=torch.float32)
    sent = initial_weights(family.state_dict(), ema=ema)
    return {name: blank(tensor) for name, tensor in sent.items()}


def update_of(
    checkpoint: Path, *, plan: str, agreement: str, number: int, images: int,
    private_site: str | None = None,
) -> Update:  # fmt: skip
    """What a site sends at the end of a round, in float32, out of its checkpoint.

    Args:
        private_site: label of a site that trains privately, which tells what it has spent.

    Raises FederationError if a number is not finite, which nobody should get.
    """
    content = checkpoints.load(checkpoint)
    tensors = {
        f"{_PREFIXES[part]}{name}": tensor.float()
        for part in _parts(content)
        for name, tensor in exchanged_weights(content[part]).items()
    }
    if broken := [name for name, tensor in tensors.items() if not are_finite(tensor)]:
        raise FederationError("Not sent, as these weights are not finite:", first_faults(broken))
    header = UpdateHeader(
        plan=plan,
        agreement=agreement,
        round=number,
        images=images,
        constants=constants_digest(content[_AVERAGED]),
        privacy={private_site: recorded_budget(content, checkpoint).spent()}
        if private_site
        else {},
    )
    return Update(header, tensors)


def replace_weights(checkpoint: Path, average: Update) -> None:
    """Put averaged weights into a checkpoint in place of its own, in one step.

    Raises FederationError if names or shapes differ, or a number is not finite.
    """
    content = checkpoints.load(checkpoint)
    own = {
        f"{_PREFIXES[part]}{name}": (part, name, tensor)
        for part in _parts(content)
        for name, tensor in exchanged_weights(content[part]).items()
    }
    faults = [
        *(f"{name}: only here" for name in sorted(own.keys() - average.tensors.keys())),
        *(f"{name}: only in the average" for name in sorted(average.tensors.keys() - own.keys())),
    ]
    for name in sorted(own.keys() & average.tensors.keys()):
        tensor, expected = average.tensors[name], own[name][2]
        if tensor.shape != expected.shape:
            faults.append(f"{name}: {list(tensor.shape)}, and {list(expected.shape)} here")
        elif not are_finite(tensor):
            faults.append(f"{name}: holds numbers that are not finite")
    if faults:
        raise FederationError("The average does not fit this model:", first_faults(faults))
    for key, (part, name, tensor) in own.items():
        content[part][name] = average.tensors[key].to(tensor.dtype)
    write_with(checkpoint, partial(torch.save, content))


def initial_weights(state: Mapping[str, Tensor], *, ema: bool) -> dict[str, Tensor]:
    """What a site would send of a model that is not trained yet."""
    parts = (_LATEST, _AVERAGED) if ema else (_AVERAGED,)
    return {
        f"{_PREFIXES[part]}{name}": tensor.float()
        for part in parts
        for name, tensor in exchanged_weights(state).items()
    }


def latest_name(name: str, sent: Mapping[str, Tensor]) -> str:
    """The name in an update of a weight that a training goes on with."""
    latest = f"{_PREFIXES[_LATEST]}{name}"
    return latest if latest in sent else averaged_name(name)


def averaged_name(name: str) -> str:
    """The name in an update of a weight of the final model."""
    return f"{_PREFIXES[_AVERAGED]}{name}"


def latest_weights(average: Update) -> dict[str, Tensor]:
    """The weights that a training goes on with, without their moving average."""
    return _with_prefix(average, _LATEST) or _with_prefix(average, _AVERAGED)


def final_weights(own: Mapping[str, Tensor], average: Update) -> dict[str, Tensor]:
    """The state of the trained model: the averaged weights, and the rest of `own`.

    Args:
        own: state of a site's model, or of one that was built by the plan.

    Raises:
        FederationError: the whole numbers of `own` are not those of the sites.
    """
    if constants_digest(own) != average.header.constants:
        raise FederationError(
            "The model differs from that of the sites in whole numbers that are not averaged."
        )
    floats = {name: value.float() if value.is_floating_point() else value
              for name, value in own.items()}  # fmt: skip
    return {**floats, **_with_prefix(average, _AVERAGED)}


def _with_prefix(average: Update, part: str) -> dict[str, Tensor]:
    prefix = _PREFIXES[part]
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in average.tensors.items()
        if name.startswith(prefix)
    }


def constants_digest(state: Mapping[str, Tensor]) -> str:
    """A hash of the whole numbers that a model keeps beside its weights, without counters."""
    constants = {
        name: tensor
        for name, tensor in state.items()
        if not tensor.is_floating_point() and not name.endswith(_COUNTER)
    }
    return artifact.weights_digest(constants).removeprefix("tensors:")


def _parts(content: Mapping[str, Any]) -> list[str]:
    """The states in a checkpoint; one of a training without a moving average has one."""
    return [part for part in (_LATEST, _AVERAGED) if part in content]
