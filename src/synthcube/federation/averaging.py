"""The average of the updates of a round: the same bits in any order of arrival, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from synthcube.errors import FederationError, first_faults
from synthcube.federation import masking
from synthcube.federation.agreement import Agreement
from synthcube.federation.plan import FederationPlan
from synthcube.federation.privacy import spent_by_all, spent_faults
from synthcube.federation.update import Update, UpdateHeader, are_finite
from synthcube.schema import SpentPrivacy

FaultCode = Literal[
    "agreement", "images", "not_finite", "plan", "privacy", "round", "site", "weights"
]


class UpdateFault(NamedTuple):
    """A reason against an update: a code for logs, and a text for the site that sent it."""

    code: FaultCode
    text: str


def average_update(
    plan: FederationPlan, agreement: Agreement, number: int, updates: Mapping[str, Update],
    shapes: Mapping[str, Tensor], spent: Mapping[str, SpentPrivacy] | None = None,
) -> Update:  # fmt: skip
    """The average of a round as all sites get it; arguments and faults as in :func:`average`."""
    tensors = average(plan, agreement, number, updates, shapes, spent)
    told = {site: update.header.privacy for site, update in updates.items()}
    header = UpdateHeader(
        plan=plan.sha256, agreement=agreement.sha256, round=number,
        images=sum(agreement.images[label] for label in updates),
        constants=next(iter(updates.values())).header.constants,
        privacy=spent_by_all(spent or {}, told),
    )  # fmt: skip
    return Update(header, tensors)


def average(
    plan: FederationPlan, agreement: Agreement, number: int, updates: Mapping[str, Update],
    shapes: Mapping[str, Tensor], spent: Mapping[str, SpentPrivacy] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The weights of all sites, averaged by their images (FedAvg).

    The sites are summed in the order of their names, in float64, so that a repetition gives the
    same bits. A site counts with no more images than it has agreed on. Masked weights are added up.

    Args:
        number: of the round, from 1.
        updates: by the label of the site.
        shapes: tensors with the names, shapes and types of the model, such as those on the meta
            device.
        spent: of private sites, until the round before.

    Raises:
        FederationError: all reasons against this average. Nothing is left out silently.
    """
    ordered = dict(sorted(updates.items()))
    faults = [
        f"{site}: {fault.text}"
        for site, update in ordered.items()
        for fault in update_faults(plan, agreement, number, site, update, shapes, spent)
    ]
    if len({update.header.constants for update in ordered.values()}) > 1:
        faults.append("whole numbers among the buffers differ between the sites")
    if len(ordered) < plan.minimum_sites:
        faults.append(f"{len(ordered)} updates are too few, minimum_sites is {plan.minimum_sites}")
    if faults:
        raise FederationError(f"Round {number} is not averaged:", first_faults(faults))
    if plan.secure_aggregation:
        return masking.summed(ordered, shapes)
    weights = image_weights(agreement, ordered)
    return {
        name: _weighted({site: ordered[site].tensors[name] for site in ordered}, weights)
        for name in sorted(shapes)
    }


def image_weights(agreement: Agreement, updates: Mapping[str, Update]) -> dict[str, float]:
    """The share of each site in the average; they add up to 1."""
    counts = {
        site: min(update.header.images, agreement.images[site]) for site, update in updates.items()
    }
    total = sum(counts.values())
    return {site: count / total for site, count in counts.items()}


def _weighted(tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    terms = iter(tensors.items())
    site, first = next(terms)
    total = first.double() * weights[site]
    for site, tensor in terms:
        total += tensor.double() * weights[site]
    return total.to(first.dtype)


def update_faults(
    plan: FederationPlan, agreement: Agreement, number: int, site: str, update: Update,
    shapes: Mapping[str, Tensor], spent: Mapping[str, SpentPrivacy] | None = None,
) -> Iterator[UpdateFault]:  # fmt: skip
    """The reasons why the update of a site cannot be averaged; arguments as in :func:`average`."""
    header = update.header
    if site not in agreement.images:
        yield UpdateFault("site", "took no part in the agreement")
    if header.plan != plan.sha256:
        text = f"is of another plan ({header.plan[:12]}, not {plan.sha256[:12]})"
        yield UpdateFault("plan", text)
    if header.agreement != agreement.sha256:
        text = "is of another agreement: its classes or ranges may mean something else"
        yield UpdateFault("agreement", text)
    if header.round != number:
        yield UpdateFault("round", f"is of round {header.round}")
    if header.images < 1:
        yield UpdateFault("images", f"claims {header.images} images")
    if plan.secure_aggregation and header.images != agreement.images.get(site):
        text = f"claims {header.images} images, and its masked weights are for those agreed on"
        yield UpdateFault("images", text)
    before = (spent or {}).get(site)
    for fault in spent_faults(plan, agreement, number, site, header.privacy, before):
        yield UpdateFault("privacy", fault)
    yield from weight_faults(update.tensors, masking.shapes_sent(plan, shapes))


def weight_faults(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Tensor]
) -> Iterator[UpdateFault]:
    """The reasons why weights do not fit a model, or must not be used."""
    if names := sorted(tensors.keys() ^ shapes.keys()):
        text = f"has other weights: {', '.join(first_faults(names, 3))}"
        yield UpdateFault("weights", text)
    for name in sorted(tensors.keys() & shapes.keys()):
        tensor, expected = tensors[name], shapes[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            text = f"{name}: {_shown(tensor)}, and {_shown(expected)} is needed"
            yield UpdateFault("weights", text)
        elif not are_finite(tensor):
            yield UpdateFault("not_finite", f"{name}: holds numbers that are not finite")


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def largest_site(agreement: Agreement) -> str:
    """The site with the most images, whose whole-number buffers the final model takes."""
    return max(sorted(agreement.images), key=lambda site: agreement.images[site])
