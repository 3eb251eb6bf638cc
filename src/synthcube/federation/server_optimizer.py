"""What the server makes of the average of a round: a step of an optimizer, a moving average.

FedAvgM and FedAdam: the average is a direction, in which an optimizer steps. With lr 1 and no
momentum, sgd is the plain average.

The state of both is kept in files of the last two rounds, so that a kill between its file and that
of the weights counts no round twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from synthcube.errors import FederationError
from synthcube.federation.plan import FederationPlan, ServerOptimizer
from synthcube.federation.rounds import averaged_name, latest_name
from synthcube.federation.update import Update, read_update, write_update

_FIRST, _SECOND = "first.", "second."
_OPTIMIZER, _MOVING = "optimizer", "moving average"
_STATISTICS = ("running_mean", "running_var")  # of batch norms


def stepped(
    plan: FederationPlan, folder: Path, before: Mapping[str, Tensor], average: Update,
    parameters: Collection[str],
) -> Update:  # fmt: skip
    """The weights that a round ends with: those before it, moved by the plan's optimizer.

    Buffers are averaged. A moving average of weights is moved as the weights are.

    Args:
        folder: where the state is kept.
        before: weights before the round, by the names in an update.
        parameters: names of what is trained.
    """
    if plan.server_optimizer is None:
        return average
    number = average.header.round
    state = _kept(folder, _OPTIMIZER, average) if number > 1 else {}
    tensors = dict(average.tensors)
    following: dict[str, Tensor] = {}
    for name in sorted(parameters):
        latest = latest_name(name, average.tensors)
        old, new = before[latest].double(), average.tensors[latest].double()
        step = _step(plan.server_optimizer, number, name, new - old, state, following)
        tensors[latest] = (old + step).to(average.tensors[latest].dtype)
        if (averaged := averaged_name(name)) != latest:
            moved = average.tensors[averaged].double() + (old + step - new)
            tensors[averaged] = moved.to(average.tensors[averaged].dtype)
    write_update(_path(folder, _OPTIMIZER, number), Update(average.header, following))
    return Update(average.header, tensors)


def _step(
    optimizer: ServerOptimizer, number: int, name: str, direction: Tensor,
    state: Mapping[str, Tensor], following: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """The step of one weight; its state goes into `following`."""
    first = state.get(f"{_FIRST}{name}", direction.new_zeros(direction.shape))
    if optimizer.name == "sgd":
        first = optimizer.momentum * first + direction
        following[f"{_FIRST}{name}"] = first
        return optimizer.lr * first
    second = state.get(f"{_SECOND}{name}", direction.new_zeros(direction.shape))
    one, two = optimizer.momentum, optimizer.second_momentum
    first = one * first + (1 - one) * direction
    second = two * second + (1 - two) * direction.square()
    following |= {f"{_FIRST}{name}": first, f"{_SECOND}{name}": second}
    scale = (second / (1 - two**number)).sqrt() + optimizer.epsilon
    return optimizer.lr * first / (1 - one**number) / scale


def with_moving_average(
    plan: FederationPlan, folder: Path, average: Update, parameters: Collection[str]
) -> Update:
    """The weights that a round ends with, and after the last round their moving average over all.

    The first round is copied. The statistics of batch norms are averaged too, other buffers are the
    latest.

    Args:
        folder: where the state is kept.
        parameters: names of what is trained.

    Raises:
        FederationError: the state of the round before is lost.
    """
    number = average.header.round
    moving = {name: tensor.double() for name, tensor in average.tensors.items()}
    if number > 1:
        before = _kept(folder, _MOVING, average)
        weight = 1 - min(plan.average_decay, number / (9 + number))
        trained = {averaged_name(name) for name in parameters}
        for name, tensor in moving.items():
            if name in trained or name.endswith(_STATISTICS):
                moving[name] = before[name].lerp(tensor, weight)
    write_update(_path(folder, _MOVING, number), Update(average.header, moving))
    if number < plan.rounds:
        return average
    return Update(average.header, {name: tensor.float() for name, tensor in moving.items()})


def _kept(folder: Path, stem: str, average: Update) -> Mapping[str, Tensor]:
    """The state of the round before that of an average."""
    before, agreement = average.header.round - 1, average.header.agreement
    kept = read_update(_path(folder, stem, before))
    if (kept.header.round, kept.header.agreement) != (before, agreement):
        raise FederationError(
            f"Round {before + 1} cannot be ended: the state of the plan's {stem} is not that of "
            f"round {before}. Start in another folder."
        )
    return kept.tensors


def _path(folder: Path, stem: str, number: int) -> Path:
    return folder / f"{stem.replace(' ', '-')}-{number % 2}.safetensors"
