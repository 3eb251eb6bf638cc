"""FedAvgM and FedAdam against the optimizers of torch, whose gradient is the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from synthcube.errors import FederationError
from synthcube.federation.plan import FederationPlan
from synthcube.federation.server_optimizer import stepped
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


def test_a_lost_state_is_refused(tmp_path: Path) -> None:
    values = plan(CASES["FedAvgM"][0])
    before = {"latest.w": torch.zeros(3)}
    stepped(values, tmp_path, before, average(values, 1, torch.ones(3)), ["w"])
    fourth = average(values, 4, torch.ones(3))
    with pytest.raises(FederationError, match="is not that of round 3"):
        stepped(values, tmp_path, before, fourth, ["w"])
