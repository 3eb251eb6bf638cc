"""Which parts of a model are converted, and with which inputs, is seen from how they are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from synthcube.sharing.conversion import Input, used_networks


class Part(nn.Module):
    """Returns what it is told to, of its first tensor."""

    def __init__(self, returns=lambda x: x) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.returns = returns

    def forward(self, x, *others, scale=None):
        return self.returns(self.layer(x))


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.single = part, nn.Linear(3, 3)
        self.outer = nn.ModuleDict({"inner": Part()})


def used(model: nn.Module, *calls) -> dict[str, tuple[Input, ...]]:
    def make() -> torch.Tensor:
        for call in calls:
            call(model)
        return torch.zeros(1)

    return {network.name: network.inputs for network in used_networks(model, make)}


def test_lengths_that_change_are_open_and_the_batch_always() -> None:
    inputs = used(
        Model(Part()),
        lambda model: model.part(torch.zeros(2, 4, 3), torch.zeros(2, 5)),
        lambda model: model.part(torch.zeros(2, 6, 3), torch.zeros(2, 5)),
    )
    assert inputs == {"part": (Input(shape=(None, None, 3)), Input(shape=(None, 5)))}


def test_plain_values_are_kept_with_their_place() -> None:
    inputs = used(Model(Part()), lambda model: model.part(torch.zeros(2, 3), 7, None, scale=0.5))
    assert inputs["part"] == (
        Input(shape=(None, 3)), Input(constant=7), Input(), Input(constant=0.5),
    )  # fmt: skip


def test_only_what_is_called_from_outside_counts_and_no_single_layer() -> None:
    model = Model(nn.Sequential(Part(), Part()))
    inputs = used(
        model, lambda model: model.part(torch.zeros(2, 3)),
        lambda model: model.single(torch.zeros(2, 3)),
        lambda model: model.outer["inner"](torch.zeros(2, 3)),
    )  # fmt: skip
    assert list(inputs) == ["part", "outer.inner"]


@pytest.mark.parametrize(
    "second",
    [
        lambda model: model.part(torch.zeros(2, 3), 8),
        lambda model: model.part(torch.zeros(2, 3), True),
        lambda model: model.part(torch.zeros(2, 3), torch.zeros(2)),
        lambda model: model.part(torch.zeros(2, 4, 3), 1),
        lambda model: model.part(torch.zeros(2, 3), scale=1),
    ],
    ids=["another value", "another type", "a tensor", "another rank", "another place"],
)
def test_what_is_called_in_several_ways_stays(second) -> None:
    assert used(Model(Part()), lambda model: model.part(torch.zeros(2, 3), 1), second) == {}


@pytest.mark.parametrize(
    ("returns", "is_used"),
    [
        (lambda x: (x, x), True),
        (lambda x: {"x": x}, False),
        (lambda x: [x], False),
        (lambda x: (x, None), False),
    ],
)
def test_what_returns_something_else_than_tensors_stays(returns, is_used) -> None:
    inputs = used(Model(Part(returns)), lambda model: model.part(torch.zeros(2, 3)))
    assert bool(inputs) is is_used


def test_what_has_hooks_inside_stays() -> None:
    model = Model(Part())
    model.part.layer.register_forward_hook(lambda module, inputs, output: output + 1)
    assert used(model, lambda model: model.part(torch.zeros(2, 3))) == {}


def test_what_is_given_no_tensor_or_something_odd_stays() -> None:
    model = Model(Part())
    model.part.layer = nn.Sequential()
    model.part.returns = lambda x: torch.zeros(1)
    assert used(model, lambda model: model.part(3)) == {}
    assert used(model, lambda model: model.part(torch.zeros(2, 3), object())) == {}


def test_the_model_is_as_before_whatever_happens() -> None:
    model = Model(Part())

    def failing(model) -> None:
        model.part(torch.zeros(2, 3))
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        used(model, failing)
    assert all("forward" not in vars(module) for module in model.modules())
