"""What a coordinator believes of the privacy that a site says it has spent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from synthcube.data.manifest import Row
from synthcube.errors import FederationError
from synthcube.federation.agreement import Agreement, SiteFacts, agree, site_facts
from synthcube.federation.plan import FederationPlan
from synthcube.federation.privacy import spent_by_all, spent_faults
from synthcube.schema import ImageSpec, SpentPrivacy
from synthcube.training.accountant import epsilon_spent, sigma_for

PRIVACY = {"epsilon": 3.0, "delta": 1e-3, "clip_norm": 0.5}
PLAN = FederationPlan(
    config={"training": {"batch_size": 4, "privacy": PRIVACY}}, sites=("a", "b"), rounds=5
)
IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
)  # fmt: skip
AGREEMENT = Agreement(
    plan=PLAN.sha256, image=IMAGE, images={"a": 30, "b": 10}, subjects={"a": 20, "b": 10}
)
SIGMA = sigma_for(3.0, 0.2, 25, 1e-3)  # five steps of four subjects an epoch


def spent(steps: int = 10, sigma: float = SIGMA, **changes: Any) -> SpentPrivacy:
    values = {
        "epsilon": epsilon_spent(sigma, 0.2, steps, 1e-3), "delta": 1e-3, "sample_rate": 0.2,
        "subjects": 20, "steps": steps, "sigma": sigma, "clip_norm": 0.5, **changes,
    }  # fmt: skip
    return SpentPrivacy.model_validate(values)


def faults(told: SpentPrivacy | None, before: SpentPrivacy | None = None) -> str:
    words = {"a": told} if told else {}
    return "\n".join(spent_faults(PLAN, AGREEMENT, 2, "a", words, before))


def test_what_agrees_with_the_plan_is_believed() -> None:
    assert faults(spent(), spent(5)) == ""
    assert faults(spent(5)) == ""  # it missed the first round


REFUSED = {
    "nothing": (None, "does not tell what it has spent"),
    "delta": (spent(delta=1e-2), "delta is 0.01, and 0.001 is planned"),
    "clip norm": (spent(clip_norm=1.0), "clip_norm is 1, and 0.5 is planned"),
    "subjects": (spent(subjects=40), "subjects is 40, and 20 is planned"),
    "sampling": (spent(sample_rate=0.1), "sample_rate is 0.1, and 0.2 is planned"),
    "steps": (spent(11), "11 steps are more than 10, those of 2 rounds"),
    "epsilon": (spent(epsilon=0.5), r"epsilon is 0.5 by the site, .* by its noise and steps"),
    "noise": (spent(sigma=SIGMA / 2), r"its noise spends epsilon .* in all, and 3 is planned"),
}


@pytest.mark.parametrize(("told", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_agree_is_refused(told: SpentPrivacy | None, message: str) -> None:
    assert re.search(message, faults(told))


@pytest.mark.parametrize("told", [spent(5), spent(8), spent(10, 2 * SIGMA)])
def test_a_budget_that_does_not_go_on_is_refused(told: SpentPrivacy) -> None:
    assert re.search(r"steps .* do not go on from 8 .* or starts over", faults(told, spent(8)))


def test_all_faults_come_at_once() -> None:
    assert len(faults(spent(delta=1e-2, clip_norm=1.0, subjects=40)).splitlines()) == 3


def test_privacy_that_nobody_planned_is_refused() -> None:
    plain = PLAN.model_copy(update={"config": {"training": {"batch_size": 4}}})
    (fault,) = spent_faults(plain, AGREEMENT, 1, "a", {"a": spent()})
    assert fault == "tells of privacy, and the plan has none"


def test_a_site_that_dropped_out_stays_in_the_statement() -> None:
    first = spent_by_all({}, {"b": {"b": spent(5)}, "a": {"a": spent(5)}})
    later = spent_by_all(first, {"a": {"a": spent(10)}})
    assert {site: told.steps for site, told in later.items()} == {"a": 10, "b": 5}


def test_a_private_site_tells_no_more_than_the_plan_declares() -> None:
    kinds = {"Scanner": "class", "Age": "number"}
    with pytest.raises(FederationError) as refusal:
        site_facts(PLAN, IMAGE, (), (), kinds, subjects=20)
    assert "column Scanner: the plan declares no classes of it" in str(refusal.value)
    assert "column Age: the plan declares no range of it" in str(refusal.value)


def test_classes_of_a_private_site_are_those_of_the_plan() -> None:
    row = Row((Path("/1.png"),), "p1", label=0, label_name="Rare", conditions={"Scanner": "GE"})

    def told(kinds: dict[str, str], declared: dict[str, list[str]], subjects: int | None) -> Any:
        return site_facts(
            PLAN, IMAGE, (row,), (0,), kinds, declared=declared, subjects=subjects
        ).classes

    assert told({}, {}, None) == {"Label": ("Rare",)}
    assert told({}, {}, 20) == {}  # what no condition follows is not told
    declared = {"Scanner": ["Philips", "GE"]}
    assert told({"Scanner": "class"}, declared, 20) == {"Scanner": ("Philips", "GE")}
    with pytest.raises(FederationError, match="column Scanner: 1 of its classes are not in data"):
        told({"Scanner": "class"}, {"Scanner": ["Philips"]}, 20)


def test_sites_with_too_few_subjects_do_not_agree() -> None:
    facts = {
        name: SiteFacts(plan=PLAN.sha256, images=30, image=IMAGE, subjects=subjects)
        for name, subjects in {"a": 3, "b": None}.items()
    }
    with pytest.raises(FederationError) as refusal:
        agree(PLAN, {}, facts)
    assert "a: training.batch_size 4 is more than the 3 training subjects" in str(refusal.value)
    assert "b: does not tell its subjects" in str(refusal.value)
