"""FedAvgM and FedAdam: the average of a round is a direction, in which an optimizer steps.

With lr 1 and no momentum, sgd is the plain average.
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


def stepped(
    plan: FederationPlan, folder: Path, before: Mapping[str, Tensor], average: Update,
    parameters: Collection[str],
) -> Update:  # fmt: skip
    """The weights that a round ends with: those before it, moved by the plan's optimizer.

    Buffers are averaged. A moving average of weights is moved as the weights are. The state of the
    optimizer is kept in files of the last two rounds, so that a kill between its file and that of
    the weights does not step twice.

    Args:
        folder: where the state is kept.
        before: weights before the round, by the names in an update.
        parameters: names of what is trained.
    """
    if plan.server_optimizer is None:
        return average
    number = average.header.round
    state: Mapping[str, Tensor] = {}
    if number > 1:
        kept = read_update(_path(folder, number - 1))
        if (kept.header.round, kept.header.agreement) != (number - 1, average.header.agreement):
            raise FederationError(
                f"Round {number} cannot be ended: the state of the plan's optimizer is not that of "
                f"round {number - 1}. Start in another folder."
            )
        state = kept.tensors
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
    write_update(_path(folder, number), Update(average.header, following))
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


def _path(folder: Path, number: int) -> Path:
    return folder / f"optimizer-{number % 2}.safetensors"
