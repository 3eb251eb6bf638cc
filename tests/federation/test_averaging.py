"""The average of updates: what it is, in which order, and every update that is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from synthcube.errors import FederationError
from synthcube.federation.agreement import Agreement
from synthcube.federation.averaging import average, largest_site
from synthcube.federation.plan import FederationPlan
from synthcube.federation.update import (
    Update,
    UpdateHeader,
    read_average,
    read_update,
    write_update,
)
from synthcube.schema import ImageSpec

IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
)  # fmt: skip
PLAN = FederationPlan(config={"seed": 0}, sites=("a", "b", "c"), rounds=3)
AGREEMENT = Agreement(plan=PLAN.sha256, image=IMAGE, images={"a": 30, "b": 10, "c": 5})
SHAPES = {"w": torch.empty(2, 3, device="meta"), "b": torch.empty(3, device="meta")}


def update(value: float = 1.0, images: int = 10, **changes: object) -> Update:
    header = {
        "plan": PLAN.sha256, "agreement": AGREEMENT.sha256, "round": 1, "images": images,
        "constants": "0" * 64, **changes,
    }  # fmt: skip
    tensors = {name: torch.full(blank.shape, value) for name, blank in SHAPES.items()}
    return Update(UpdateHeader.model_validate(header), tensors)


def averaged(updates: Mapping[str, Update], number: int = 1) -> dict[str, Tensor]:
    return average(PLAN, AGREEMENT, number, updates, SHAPES)


def test_sites_count_by_their_images() -> None:
    result = averaged({"a": update(1.0, 30), "b": update(5.0, 10)})
    assert {name: tensor.unique().tolist() for name, tensor in result.items()} == {
        "w": [2.0], "b": [2.0],
    }  # fmt: skip


def test_no_site_counts_with_more_than_it_agreed_on() -> None:
    result = averaged({"a": update(1.0, 10**9), "b": update(5.0, 10)})
    assert result["b"].unique().tolist() == [2.0]


def test_the_order_of_arrival_changes_no_bit() -> None:
    updates = {}
    for seed, site in enumerate("abc"):
        random = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.randn(blank.shape, generator=random) * 10.0 ** (3 * seed)
            for name, blank in SHAPES.items()
        }
        updates[site] = Update(update(images=AGREEMENT.images[site]).header, tensors)
    one = averaged(updates)
    other = averaged(dict(reversed(updates.items())))
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_small_numbers_beside_large_ones_are_not_lost() -> None:
    """In float32 the sum 1e8 + 1 - 1e8 would be 0."""
    agreement = AGREEMENT.model_copy(update={"images": dict.fromkeys("abc", 10)})
    updates = {
        site: update(value, agreement=agreement.sha256)
        for site, value in {"a": 1e8, "b": 1.0, "c": -1e8}.items()
    }
    result = average(PLAN, agreement, 1, updates, SHAPES)
    assert result["b"].tolist() == pytest.approx([1 / 3] * 3, rel=1e-6)


def with_weights(**tensors: Tensor) -> Update:
    return Update(update().header, {**update().tensors, **tensors})


REFUSED = {
    "nan": (with_weights(b=torch.tensor([0.0, math.nan, 0.0])), "b: b: holds numbers that are not"),
    "infinity": (with_weights(b=torch.tensor([0.0, math.inf, 0.0])), "are not finite"),
    "name": (with_weights(other=torch.zeros(1)), "b: has other weights: other"),
    "shape": (with_weights(b=torch.zeros(4)), "b: [4] of float32, and [3] of float32 is needed"),
    "dtype": (with_weights(b=torch.zeros(3).half()), "b: [3] of float16, and [3] of float32 is"),
    "plan": (update(plan="1" * 64), "b: is of another plan (111111111111, not"),
    "agreement": (update(agreement="1" * 64), "b: is of another agreement: its classes"),
    "round": (update(round=2), "b: is of round 2"),
    "no images": (update(images=0), "b: claims 0 images"),
    "negative": (update(images=-5), "b: claims -5 images"),
    "constants": (update(constants="1" * 64), "whole numbers among the buffers differ"),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(wrong: Update, message: str) -> None:
    with pytest.raises(FederationError, match=re.escape(message)):
        averaged({"a": update(), "b": wrong})


def test_all_faults_come_at_once() -> None:
    with pytest.raises(FederationError) as refusal:
        averaged({"x": update(math.nan, round=7)})
    text = str(refusal.value)
    assert text.startswith("Round 1 is not averaged:")
    for fault in ("x: took no part", "x: is of round 7", "x: w: holds", "x: b: holds",
                  "1 updates are too few, minimum_sites is 2"):  # fmt: skip
        assert fault in text


def test_what_came_is_not_averaged_below_the_minimum() -> None:
    with pytest.raises(FederationError, match="1 updates are too few, minimum_sites is 2"):
        averaged({"a": update()})


def test_a_missing_weight_is_refused() -> None:
    lacking = Update(update().header, {"w": torch.ones(2, 3)})
    with pytest.raises(FederationError, match="b: has other weights: b"):
        averaged({"a": update(), "b": lacking})


def test_the_largest_site_is_the_same_every_time() -> None:
    assert largest_site(AGREEMENT) == "a"
    equal = AGREEMENT.model_copy(update={"images": {"c": 5, "b": 5}})
    assert largest_site(equal) == "b"


def test_an_update_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path, sent = tmp_path / "update.safetensors", update(0.1, images=7)
    write_update(path, sent)
    received = read_update(path)
    assert received.header == sent.header
    assert all(torch.equal(received.tensors[name], sent.tensors[name]) for name in SHAPES)
    read_average(path, PLAN.sha256, AGREEMENT.sha256, 1)
    with pytest.raises(FederationError, match="round 1, and 2 is needed"):
        read_average(path, PLAN.sha256, AGREEMENT.sha256, 2)


def test_a_file_that_is_no_update_is_refused_without_its_path(tmp_path: Path) -> None:
    path = tmp_path / "Erika Mustermann.safetensors"
    good = tmp_path / "good"
    write_update(good, update())
    for content in (b"", b"\x80\x04.", b"\xff" * 64, good.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(FederationError, match=r"^An update is refused") as refusal:
            read_update(path)
        assert "Erika" not in str(refusal.value)


def test_one_step_at_each_site_is_one_step_on_all_images() -> None:
    """SGD: the average of the steps is the step of the average gradient; not with equal weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randn(40, 3), torch.randn(40, 2)

    def step(rows: slice) -> dict[str, Tensor]:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    central = step(slice(0, 40))
    local = {"a": step(slice(0, 30)), "b": step(slice(30, 40))}
    updates = {
        site: Update(update(images=AGREEMENT.images[site]).header, tensors)
        for site, tensors in local.items()
    }
    federated = average(PLAN, AGREEMENT, 1, updates, start)
    for name, expected in central.items():
        torch.testing.assert_close(federated[name], expected, atol=1e-6, rtol=0)
    equal = torch.stack([tensors["0.weight"] for tensors in local.values()]).mean(dim=0)
    assert (equal - central["0.weight"]).abs().max() > 1e-4
