"""The end of a round: out of the updates of the sites comes what the next round begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from synthcube.federation.agreement import Agreement
from synthcube.federation.averaging import average_update
from synthcube.federation.plan import FederationPlan
from synthcube.federation.server_optimizer import stepped, with_moving_average
from synthcube.federation.update import Update

_HEADER_BYTES = 1 << 19  # of a file, at most: what 1000 private sites have spent is in it
_TENSOR_BYTES = 1 << 10  # of a safetensors file: of each tensor


@dataclass(frozen=True, slots=True)
class ExpectedModel:
    """What every update must have.

    Args:
        shapes: names, shapes and types of the weights, on the meta device.
        constants: hash of the whole numbers that are not sent.
        initial: weights before the first round, by the names in an update.
        parameters: names of what is trained, without buffers.
    """

    shapes: Mapping[str, Tensor]
    constants: str = ""
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()

    @property
    def update_bytes(self) -> int:
        """The largest size of an update's file, of masked numbers of 64 bits."""
        numbers = sum(8 * tensor.numel() for tensor in self.shapes.values())
        return numbers + _HEADER_BYTES + _TENSOR_BYTES * len(self.shapes)


def aggregated(
    plan: FederationPlan, agreement: Agreement, number: int, updates: Mapping[str, Update],
    model: ExpectedModel, folder: Path, before: Update | None,
) -> Update:  # fmt: skip
    """What a round comes to: the average of its updates, moved as the plan says.

    Args:
        number: of the round, from 1.
        updates: by the label of the site.
        folder: where the plan's optimizer and moving average keep their state.
        before: what the round before came to; None in the first.

    Raises:
        FederationError: all reasons against this average.
    """
    spent = before.header.privacy if before else {}
    weights = before.tensors if before else model.initial
    average = average_update(plan, agreement, number, updates, model.shapes, spent)
    average = stepped(plan, folder, weights, average, model.parameters)
    if plan.average == "sites":
        return average
    return with_moving_average(plan, folder, average, model.parameters)
