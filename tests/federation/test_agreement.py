"""What sites agree on before the first round: a class means the same everywhere, or none trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from synthcube.data.conditions import condition_values
from synthcube.data.manifest import Row
from synthcube.errors import FederationError
from synthcube.federation.agreement import (
    Agreement,
    SiteFacts,
    agree,
    check_agreement,
    pooled,
    site_facts,
)
from synthcube.federation.plan import FederationPlan
from synthcube.schema import ImageSpec, Moments

KINDS = {"Scanner": "class", "Age": "number"}
PLAN = FederationPlan(config={"seed": 0}, sites=("a", "b"), rounds=1, ranges={"Age": (0, 100)})


def image(**changes: Any) -> ImageSpec:
    values = {
        "size": (16, 16), "channels": 1, "spacing_mm": (1.0, 1.0, 1.0), "file_format": "png",
        "affine": tuple(tuple(float(i == j) for j in range(4)) for i in range(4)),
        "intensity_range": ((0.0, 100.0),), **changes,
    }  # fmt: skip
    return ImageSpec.model_validate(values)


def row(number: int, scanner: str, age: str = "40") -> Row:
    path = Path(f"/{number}.png")
    return Row((path,), f"p{number}", conditions={"Scanner": scanner, "Age": age}, number=number)


def facts(scanners: str, plan: FederationPlan = PLAN, age: str = "40", **changes: Any) -> SiteFacts:
    rows = [row(number, name, age) for number, name in enumerate(scanners.split())]
    return site_facts(plan, image(**changes), rows, range(len(rows)), KINDS)


def both(**changes: Any) -> tuple[Agreement, dict[str, SiteFacts]]:
    told = {"a": facts("GE Siemens"), "b": facts("Philips Siemens", **changes)}
    return agree(PLAN, KINDS, told), told


def test_a_class_has_the_same_id_at_every_site() -> None:
    agreement, told = both()
    scanner, age = agreement.image.conditions
    assert scanner.classes == ("GE", "Philips", "Siemens")
    assert (age.low, age.high) == (0, 100)
    for site in told:
        check_agreement(agreement, PLAN, site, told[site])
    own = agreement.image.conditions
    assert condition_values(own, [row(1, "Siemens")])[0, 0] == 2
    assert condition_values(own, [row(1, "Siemens", "50")])[0, 1] == 0


def test_a_class_of_one_site_alone_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "synthcube")
    agree(PLAN, KINDS, {"a": facts("GE Siemens Philips"), "b": facts("GE Philips")})
    (record,) = caplog.records
    assert "Scanner: Siemens: no other site has images of these classes." in record.getMessage()
    caplog.clear()
    alike = PLAN.model_copy(update={"minimum_sites": 1})
    agree(alike, KINDS, {"a": facts("GE Siemens", alike)})
    agree(PLAN, KINDS, {"a": facts("GE Siemens"), "b": facts("Siemens GE")})
    assert not caplog.records


def test_a_wrong_vocabulary_is_refused_before_it_is_averaged() -> None:
    """The tables of both sites would have the same shape, and class 0 would be GE and Philips."""
    agreement, told = both()
    own = agree(PLAN.model_copy(update={"minimum_sites": 1}), KINDS, {
        "a": facts("GE Siemens", PLAN.model_copy(update={"minimum_sites": 1})),
    })  # fmt: skip
    assert len(own.image.conditions[0].classes) == 2
    with pytest.raises(FederationError) as refusal:
        check_agreement(own, PLAN, "b", told["b"])
    text = str(refusal.value)
    assert "classes of Scanner: Philips not agreed on" in text
    assert "plan: the agreement is of " in text
    assert "images: None agreed on, 2 here" in text
    assert own.sha256 != agreement.sha256  # so that no update of the one joins the other


def test_a_site_with_one_number_takes_part() -> None:
    """Alone it would be refused: there is nothing to learn from it."""
    undeclared = PLAN.model_copy(update={"ranges": {}})
    told = {"a": facts("GE", undeclared, "30"), "b": facts("GE", undeclared, "50")}
    assert told["a"].numbers == {"Age": (30, 30)}
    (_, age) = agree(undeclared, KINDS, told).image.conditions
    assert (age.low, age.high) == (30, 50)


def test_a_declared_range_keeps_the_extremes_at_the_site() -> None:
    assert facts("GE").numbers == {}
    with pytest.raises(FederationError, match="column Age: a number lies outside of 0 to 100"):
        facts("GE", age="101")
    with pytest.raises(FederationError, match="column Age: 1 cells are no numbers"):
        facts("GE", age="Erika")


def test_all_differences_come_at_once() -> None:
    other = PLAN.model_copy(update={"rounds": 9})
    told = {
        "a": facts("GE"),
        "b": facts("GE", size=(32, 16), channels=2, intensity_range=((0, 1), (0, 1)),
                   spacing_mm=(1.0, 1.0, 2.0)),
        "stranger": facts("GE", other),
    }  # fmt: skip
    with pytest.raises(FederationError) as refusal:
        agree(PLAN, KINDS, told)
    text = str(refusal.value)
    for fault in (
        "size: [32, 16] at b, [16, 16] at a",
        "channels: 2 at b, 1 at a",
        "spacing: 1 x 1 x 2 mm at b, 1 x 1 x 1 mm at a; set data.spacing_mm",
        "stranger: is not a site of this plan",
        f"stranger: has another plan ({other.sha256[:12]}, not {PLAN.sha256[:12]})",
    ):
        assert fault in text


def test_too_few_sites_do_not_agree() -> None:
    with pytest.raises(FederationError, match="1 sites are too few, minimum_sites is 2"):
        agree(PLAN, KINDS, {"a": facts("GE")})


def test_a_column_without_spread_is_refused_for_all() -> None:
    undeclared = PLAN.model_copy(update={"ranges": {}})
    told = {"a": facts("GE", undeclared), "b": facts("GE", undeclared)}
    with pytest.raises(FederationError, match="condition Age: low 40 must be below high 40"):
        agree(undeclared, KINDS, told)


def test_intensities_are_weighted_by_images() -> None:
    told = {"a": facts("GE GE GE"), "b": facts("GE", intensity_range=((0.0, 200.0),))}
    assert agree(PLAN, KINDS, told).image.intensity_range == ((0.0, 125.0),)


def test_another_first_stage_is_refused() -> None:
    told = {"a": facts("GE"), "b": facts("GE").model_copy(update={"first_stage_sha256": "f" * 64})}
    with pytest.raises(FederationError, match="first stage: b has another one than a"):
        agree(PLAN, KINDS, told)


def test_moments_are_those_of_all_values_together() -> None:
    values = torch.randn(50, dtype=torch.float64) * 3 + torch.arange(50) / 5
    parts = [values[:30], values[30:]]
    moments = [
        Moments(count=len(part), mean=part.mean().item(), std=part.std().item()) for part in parts
    ]
    together = pooled(moments)
    assert together
    assert together.count == 50
    assert together.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert together.std == pytest.approx(values.std().item(), rel=1e-12)
    assert pooled(moments[:1]) == moments[0]
    assert pooled([]) is None


def test_facts_hold_no_row() -> None:
    text = facts("GE Siemens").model_dump_json()
    assert "p0" not in text
    assert ".png" not in text
