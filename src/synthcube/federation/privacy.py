"""Privacy at the sites of a federation: what each has spent, and whether that fits the plan.

Each site trains with differential privacy on its own subjects. What it sends is private already, so
that averaging spends nothing more: the promise of the federation is that of each of its sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from synthcube.config import RunConfig
from synthcube.data.batches import steps_per_epoch
from synthcube.federation.agreement import Agreement
from synthcube.federation.plan import FederationPlan
from synthcube.schema import PrivacyStatement, SpentPrivacy
from synthcube.training import accountant

_UNIT = "one subject at one site, with all its images there, added or removed"
_TOLERANCE = 0.01  # of epsilon, between versions of the accountant


def spent_faults(
    plan: FederationPlan, agreement: Agreement, number: int, site: str,
    told: Mapping[str, SpentPrivacy], before: SpentPrivacy | None = None,
) -> Iterator[str]:  # fmt: skip
    """The reasons why what a site says of its privacy does not agree with the plan.

    Epsilon is computed anew from the noise and the steps that the site tells. That these were made
    so, nobody else can know.

    Args:
        number: of the round, from 1.
        told: what the update says.
        before: of the last update of this site that was averaged.
    """
    planned = plan.privacy
    if planned is None:
        if told:
            yield "tells of privacy, and the plan has none"
        return
    spent, subjects = told.get(site), agreement.subjects.get(site)
    if spent is None or subjects is None or len(told) > 1:
        yield "does not tell what it has spent of its privacy, or tells it of other sites"
        return
    steps = steps_per_epoch(subjects, plan.batch_size)
    expected = {
        "delta": planned.delta,
        "clip_norm": planned.clip_norm,
        "subjects": subjects,
        "sample_rate": plan.batch_size / subjects,
    }
    faults = [
        f"{name} is {getattr(spent, name):g}, and {value:g} is planned"
        for name, value in expected.items()
        if getattr(spent, name) != value
    ]
    most = min(number * plan.local_epochs, plan.epochs) * steps
    if spent.steps > most:
        faults.append(f"{spent.steps} steps are more than {most}, those of {number} rounds")
    if before and (spent.steps <= before.steps or spent.sigma != before.sigma):
        faults.append(
            f"{spent.steps} steps with noise {spent.sigma:g} do not go on from {before.steps} with "
            f"{before.sigma:g}: the site has lost its budget, or starts over"
        )
    yield from faults
    if faults:
        return  # the accountant computes with numbers of the plan alone, which bound its time
    rate, delta = spent.sample_rate, spent.delta
    here = accountant.epsilon_spent(spent.sigma, rate, spent.steps, delta)
    if abs(spent.epsilon - here) > _TOLERANCE * here:
        yield f"epsilon is {spent.epsilon:.4g} by the site, {here:.4g} by its noise and steps"
    total = accountant.epsilon_spent(spent.sigma, rate, plan.epochs * steps, delta)
    if total > planned.epsilon * (1 + _TOLERANCE):
        yield f"its noise spends epsilon {total:.4g} in all, and {planned.epsilon:g} is planned"


def spent_by_all(
    before: Mapping[str, SpentPrivacy], updates: Mapping[str, Mapping[str, SpentPrivacy]]
) -> dict[str, SpentPrivacy]:
    """What every site has spent that ever sent an update, also where it has dropped out since.

    Args:
        updates: what the updates of a round say, by the label of the site.
    """
    newest = {site: told[site] for site, told in updates.items() if site in told}
    return dict(sorted({**before, **newest}.items()))


def statement(settings: RunConfig, spent: Mapping[str, SpentPrivacy]) -> PrivacyStatement | None:
    """What a federation of private sites promises; None if they were not.

    `spent` is by the label of the site.
    """
    chosen = settings.training.privacy
    if chosen is None:
        return None
    largest = max(spent.values(), key=lambda site: site.epsilon)
    return PrivacyStatement(
        **largest.model_dump(),
        unit=_UNIT,
        accountant=accountant.described(),
        draws=chosen.draws,
        start_sha256=settings.training.start_from_sha256,
        first_stage_sha256=getattr(settings.model, "first_stage_sha256", ""),
        sites=dict(spent),
    )
