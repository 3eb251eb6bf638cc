"""Secure aggregation: the sum is that of the weights, and what a site sends tells nothing."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from synthcube.errors import FederationError
from synthcube.federation import masking
from synthcube.federation.agreement import Agreement, SiteFacts, agree, check_agreement
from synthcube.federation.averaging import average, update_faults
from synthcube.federation.masking import MaskKey, masked
from synthcube.federation.plan import FederationPlan
from synthcube.federation.update import Update, UpdateHeader
from synthcube.schema import ImageSpec

IMAGE = ImageSpec(
    size=(16, 16), channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
    affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
)  # fmt: skip
IMAGES = {"a": 30, "b": 10, "c": 5}
PLAN = FederationPlan(
    config={"seed": 0}, sites=("a", "b", "c"), rounds=3, minimum_sites=3, secure_aggregation=True
)
SHAPES = {"w": torch.empty(200, 300, device="meta"), "b": torch.empty(3, device="meta")}


class Study:
    """Three sites with keys, an agreement, and weights of one round."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.keys = {site: MaskKey(folder / f"{site}.key") for site in PLAN.sites}
        self.facts = {
            site: SiteFacts(plan=PLAN.sha256, images=IMAGES[site], image=IMAGE, mask_key=key.public)
            for site, key in self.keys.items()
        }
        self.agreement = agree(PLAN, {}, self.facts)

    def plain(self, site: str, number: int = 1, **weights: torch.Tensor) -> Update:
        header = UpdateHeader(
            plan=PLAN.sha256, agreement=self.agreement.sha256, round=number, images=IMAGES[site],
            constants="0" * 64,
        )  # fmt: skip
        random = torch.Generator().manual_seed(ord(site))
        drawn = {name: torch.randn(blank.shape, generator=random) for name, blank in SHAPES.items()}
        return Update(header, {**drawn, **weights})

    def masked(self, site: str, number: int = 1, **weights: torch.Tensor) -> Update:
        update = self.plain(site, number, **weights)
        return masked(update, site, self.agreement, self.keys[site])

    def average(self, updates: dict[str, Update]) -> dict[str, torch.Tensor]:
        return average(PLAN, self.agreement, 1, updates, SHAPES)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def test_the_average_is_that_of_the_weights_whatever_the_keys(study: Study, tmp_path: Path) -> None:
    result = study.average({site: study.masked(site) for site in "cab"})
    total = sum(IMAGES.values())
    for name, tensor in result.items():
        terms = [study.plain(s).tensors[name].double() * IMAGES[s] / total for s in PLAN.sites]
        exact = torch.stack(terms).sum(0)
        assert tensor.dtype == torch.float32
        # half a step of float32, and of the fixed point at each site
        assert (tensor.double() - exact).abs().max() < 2**-24 * exact.abs().max() + 3 * 2**-41
    others = Study(tmp_path / "others")
    again = others.average({site: others.masked(site) for site in PLAN.sites})
    assert all(torch.equal(again[name], tensor) for name, tensor in result.items())


def bits(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """(64, N) of the bits of whole numbers, the highest last."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    return torch.stack([(flat >> place) & 1 for place in range(64)]).double()


def test_what_a_site_sends_is_noise_even_if_its_weights_are_all_zero(study: Study) -> None:
    zeros = {name: torch.zeros(blank.shape) for name, blank in SHAPES.items()}
    sent = study.masked("b", **zeros)
    assert all(tensor.dtype == torch.int64 for tensor in sent.tensors.values())
    drawn = bits(sent.tensors.values())
    bound = 5 * 0.5 / drawn.shape[1] ** 0.5  # five deviations of a mean of fair coins
    assert (drawn.mean(1) - 0.5).abs().max() < bound
    assert (drawn[:, 1:] * drawn[:, :-1]).mean(1).sub(0.25).abs().max() < bound
    later = study.masked("b", 2, **zeros)
    assert (later.tensors["w"] == sent.tensors["w"]).float().mean() < 1e-3
    two = bits([sent.tensors["w"] + study.masked("a", **zeros).tensors["w"]])
    assert (two.mean(1) - 0.5).abs().max() < bound  # the mask with the third site is left


def test_without_one_site_there_is_no_average(study: Study) -> None:
    updates = {site: study.masked(site) for site in "ab"}
    with pytest.raises(FederationError, match="minimum_sites is 3"):
        study.average(updates)
    with pytest.raises(FederationError, match="The masks of the sites do not cancel"):
        masking.summed(updates, SHAPES)


def test_weights_that_are_not_masked_or_of_another_count_are_refused(study: Study) -> None:
    plain = update_faults(PLAN, study.agreement, 1, "a", study.plain("a"), SHAPES)
    assert [fault.text for fault in plain] == [
        "b: [3] of float32, and [3] of int64 is needed",
        "w: [200, 300] of float32, and [200, 300] of int64 is needed",
    ]
    sent = study.masked("a")
    fewer = Update(sent.header.model_copy(update={"images": 29}), sent.tensors)
    (fault,) = update_faults(PLAN, study.agreement, 1, "a", fewer, SHAPES)
    assert fault.text == "claims 29 images, and its masked weights are for those agreed on"


def test_a_liar_about_its_mask_is_noticed(study: Study) -> None:
    updates = {site: study.masked(site) for site in PLAN.sites}
    updates["b"] = study.masked("b", 2)
    wrong = Update(updates["b"].header.model_copy(update={"round": 1}), updates["b"].tensors)
    with pytest.raises(FederationError, match="masks of the sites do not cancel") as refused:
        study.average({**updates, "b": wrong})
    assert "w" in refused.value.faults


def test_weights_that_would_overflow_are_not_sent(study: Study) -> None:
    with pytest.raises(FederationError, match="takes weights below 4,194,304") as refused:
        study.masked("a", b=torch.tensor([0.0, -5e6, 1]))
    assert refused.value.faults == ("b",)


def test_a_key_is_kept_and_its_owner_alone_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "mask.key"
    first = MaskKey(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert MaskKey(path).public == first.public
    assert len({first.public, MaskKey(tmp_path / "other.key").public}) == 2
    path.write_text("no key")
    with pytest.raises(FederationError, match=r"mask\.key is damaged"):
        MaskKey(path)
    with pytest.raises(FederationError, match="The mask key of a site is no key"):
        next(first.mask_with("0" * 64, ""))  # X25519 refuses a point of low order


def test_an_agreement_with_another_key_is_refused(study: Study) -> None:
    check_agreement(study.agreement, PLAN, "a", study.facts["a"])
    keys = study.agreement.mask_keys
    for swapped, fault in (
        ({**keys, "a": "1" * 64}, "mask key: another one was agreed on than this site has now"),
        ({**keys, "b": keys["a"]}, "mask keys: each site needs one of its own"),
    ):
        agreement = study.agreement.model_copy(update={"mask_keys": swapped})
        with pytest.raises(FederationError) as refused:
            check_agreement(agreement, PLAN, "a", study.facts["a"])
        assert refused.value.faults == (fault,)


def test_a_site_without_a_key_or_with_a_needless_one_is_refused(study: Study) -> None:
    without = study.facts["a"].model_copy(update={"mask_key": ""})
    with pytest.raises(FederationError) as refused:
        agree(PLAN, {}, {**study.facts, "a": without})
    assert refused.value.faults == ("a: its mask key does not fit the plan's secure_aggregation",)
    open_plan = PLAN.model_copy(update={"secure_aggregation": False})
    facts = {
        site: told.model_copy(update={"plan": open_plan.sha256})
        for site, told in study.facts.items()
    }
    with pytest.raises(FederationError) as refused:
        agree(open_plan, {}, facts)
    assert len(refused.value.faults) == 3


def test_old_agreements_have_no_keys() -> None:
    agreement = Agreement(plan=PLAN.sha256, image=IMAGE, images=IMAGES)
    assert agreement.mask_keys == {}
