"""FedAvgM and FedAdam against the optimizers of torch, whose gradient is the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from synthcube.errors import FederationError
from synthcube.federation.plan import FederationPlan
from synthcube.federation.server_optimizer import stepped, with_moving_average
from synthcube.federation.update import Update, UpdateHeader

CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "FedAvgM": (
        {"name": "sgd", "lr": 0.7, "momentum": 0.9},
        lambda weights: torch.optim.SGD(weights, lr=0.7, momentum=0.9),
    ),
    "FedAdam": (
        {"name": "adam", "lr": 0.05, "momentum": 0.9, "second_momentum": 0.99, "epsilon": 1e-3},
        lambda weights: torch.optim.Adam(weights, lr=0.05, betas=(0.9, 0.99), eps=1e-3),
    ),
}


def plan(optimizer: dict[str, Any] | None) -> FederationPlan:
    return FederationPlan.model_validate(
        {"config": {}, "sites": ["a", "b"], "rounds": 5, "server_optimizer": optimizer}
    )


def average(values: FederationPlan, number: int, latest: torch.Tensor) -> Update:
    header = {"plan": values.sha256, "agreement": "1" * 64, "round": number, "images": 5,
              "constants": "0" * 64}  # fmt: skip
    tensors = {
        "latest.w": latest, "averaged.w": latest + 1, "latest.mean": latest * 2,
        "averaged.mean": latest * 3,
    }  # fmt: skip
    return Update(UpdateHeader.model_validate(header), tensors)


@pytest.mark.parametrize(("optimizer", "reference"), CASES.values(), ids=CASES)
def test_steps_are_those_of_torch(
    optimizer: dict[str, Any], reference: Any, tmp_path: Path
) -> None:
    values = plan(optimizer)
    weight = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    steps = reference([weight])
    before = {"latest.w": weight.detach().float()}
    for number in range(1, 6):
        came = average(values, number, torch.randn(7))
        for _ in range(2):  # as after a kill before the average was written
            result = stepped(values, tmp_path, before, came, ["w"])
        weight.grad = weight.detach() - came.tensors["latest.w"].double()
        steps.step()
        torch.testing.assert_close(result.tensors["latest.w"].double(), weight.detach(),
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
        moved = result.tensors["latest.w"] - came.tensors["latest.w"]
        torch.testing.assert_close(
            result.tensors["averaged.w"], came.tensors["averaged.w"] + moved, atol=1e-5, rtol=1e-5
        )
        assert torch.equal(result.tensors["latest.mean"], came.tensors["latest.mean"])
        before = dict(result.tensors)


def test_without_an_optimizer_it_is_the_average(tmp_path: Path) -> None:
    came = average(plan(None), 1, torch.randn(3))
    assert stepped(plan(None), tmp_path, {}, came, ["w"]) is came
    assert not list(tmp_path.iterdir())


def test_without_moving_average_the_final_weights_are_stepped(tmp_path: Path) -> None:
    values = plan({"name": "sgd", "lr": 0.5, "momentum": 0.0})
    came = average(values, 1, torch.ones(3))
    only = Update(came.header, {"averaged.w": torch.ones(3)})
    result = stepped(values, tmp_path, {"averaged.w": torch.zeros(3)}, only, ["w"])
    assert result.tensors["averaged.w"].tolist() == [0.5] * 3


def rounds_of(values: FederationPlan, folder: Path, repeated: int = 1) -> list[Update]:
    """What three rounds end with, whose weights are 1, 5 and 2."""
    ended = []
    for number, value in enumerate((1.0, 5.0, 2.0), start=1):
        came = average(values, number, torch.empty(0))
        names = ("averaged.w", "averaged.norm.running_mean", "averaged.mean")
        came = Update(came.header, {name: torch.full((2,), value) for name in names})
        for _ in range(repeated):  # as after a kill before the average was written
            result = with_moving_average(values, folder, came, ["w"])
        ended.append(result)
    return ended


@pytest.mark.parametrize(("decay", "last"), [(0.9, 0.25), (0.1, 0.1), (0.0, 0.0)])
def test_the_moving_average_of_the_server(decay: float, last: float, tmp_path: Path) -> None:
    """Its decay is 2/11 in the second round and 3/12 in the third, or less if the plan says so."""
    values = plan(None).model_copy(
        update={"rounds": 3, "average": "server", "average_decay": decay}
    )
    one, two, three = rounds_of(values, tmp_path)
    assert one.tensors["averaged.w"].tolist() == [1.0] * 2  # the sites go on with the latest
    assert two.tensors["averaged.w"].tolist() == [5.0] * 2
    second = min(decay, 2 / 11)
    expected = last * (second * 1 + (1 - second) * 5) + (1 - last) * 2
    for name in ("averaged.w", "averaged.norm.running_mean"):
        torch.testing.assert_close(three.tensors[name], torch.full((2,), expected))
    assert three.tensors["averaged.mean"].tolist() == [2.0] * 2  # a buffer
    again = rounds_of(values, tmp_path, repeated=2)[-1]
    assert torch.equal(again.tensors["averaged.w"], three.tensors["averaged.w"])


def test_a_lost_moving_average_is_refused(tmp_path: Path) -> None:
    values = plan(None).model_copy(update={"average": "server"})
    rounds_of(values, tmp_path)
    fifth = average(values, 5, torch.ones(3))
    with pytest.raises(FederationError, match="state of the plan's moving average is not that"):
        with_moving_average(values, tmp_path, fifth, ["w"])


def test_a_lost_state_is_refused(tmp_path: Path) -> None:
    values = plan(CASES["FedAvgM"][0])
    before = {"latest.w": torch.zeros(3)}
    stepped(values, tmp_path, before, average(values, 1, torch.ones(3)), ["w"])
    fourth = average(values, 4, torch.ones(3))
    with pytest.raises(FederationError, match="is not that of round 3"):
        stepped(values, tmp_path, before, fourth, ["w"])
