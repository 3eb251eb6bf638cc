"""The agreement before round 1: facts that each site tells, and what follows from all of them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from synthcube.data.conditions import LABEL, cell, parse_number
from synthcube.data.geometry import as_rows, centred_affine
from synthcube.data.manifest import Row, natural_key
from synthcube.errors import FederationError, first_faults
from synthcube.federation.plan import Digest, FederationPlan, SiteName, digest_of
from synthcube.schema import MAX_COUNT, ConditionSpec, Count, ImageSpec, List, Moments, Pair, Schema
from synthcube.training.accountant import size_faults

log = logging.getLogger("synthcube")

_WIDEST_GAP = 1e-3  # of a spacing in mm: rounding in a header, and no other voxel size


MaybeKey = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class SiteFacts(Schema):
    """What a site tells of its data: counts, names of classes and extremes, but no row."""

    plan: Digest = Field(description="Hash of the plan that the site has.")
    images: int = Field(ge=1, le=MAX_COUNT, description="Training images.")
    subjects: Count | None = Field(
        default=None, description="Training subjects, of a site that trains privately."
    )
    image: ImageSpec = Field(description="Its images, without conditions and class names.")
    classes: dict[str, List[str]] = Field(
        default={}, description="Classes of each column, and of Label."
    )
    numbers: dict[str, Pair] = Field(
        default={}, description="Extremes of each column of numbers without a declared range."
    )
    first_stage_sha256: str = Field(default="", description="Hash of the trained first stage.")
    moments: Moments | None = Field(
        default=None, description="Of the latents of the training images, where a model has some."
    )
    mask_key: MaybeKey = Field(default="", description="Public key, for secure aggregation.")


class Agreement(Schema):
    """What all sites train with: one description of images, and the images that each may claim."""

    plan: Digest = Field(description="Hash of the plan.")
    image: ImageSpec = Field(description="Images of the federation, with the agreed vocabulary.")
    images: dict[SiteName, Count] = Field(description="Training images of each site.")
    subjects: dict[SiteName, Count] = Field(
        default={}, description="Training subjects of each site, where they train privately."
    )
    first_stage_sha256: str = Field(default="", description="Hash of the trained first stage.")
    moments: Moments | None = Field(default=None, description="Of the latents of all sites.")
    mask_keys: dict[SiteName, Digest] = Field(
        default={}, description="Public key of each site, for secure aggregation."
    )

    @property
    def sha256(self) -> str:
        """The hash that every update carries."""
        return digest_of(self)


def site_facts(
    plan: FederationPlan, image: ImageSpec, rows: Sequence[Row], trained: Sequence[int],
    kinds: Mapping[str, str], *, declared: Mapping[str, Sequence[str]] | None = None,
    first_stage_sha256: str = "", moments: Moments | None = None, subjects: int | None = None,
    mask_key: str = "",
) -> SiteFacts:  # fmt: skip
    """The facts of a site's data.

    Args:
        image: its images, as its data module describes them.
        rows: of its manifest.
        trained: places of the training rows in `rows`.
        kinds: "class" or "number" of each column that the images follow.
        declared: classes of columns, in place of those in the data.
        subjects: training subjects of a site that trains privately: then nothing is told but
            these numbers and what is declared.
        mask_key: public key of the site, for secure aggregation.

    Raises:
        FederationError: a class or number that is not declared, or a cell that is no number.
    """
    is_private, faults = subjects is not None, []
    classes = {name: tuple(names) for name, names in (declared or {}).items()}
    numbers: dict[str, tuple[float, float]] = {}
    if not is_private and (named := {row.label: row.label_name for row in rows if row.label >= 0}):
        classes.setdefault(LABEL, tuple(named[label] for label in sorted(named)))
    for name, kind in kinds.items():
        texts = {text for row in rows if (text := cell(row, name))}
        if kind == "class":
            if is_private and name not in classes:
                faults.append(f"column {name}: the plan declares no classes of it")
            known = classes.setdefault(name, tuple(sorted(texts, key=natural_key)))
            if strange := len(texts.difference(known)):
                faults.append(f"column {name}: {strange} of its classes are not in data.classes")
            continue
        # As in a training alone, the range is that of the training rows.
        trained_texts = [text for place in trained if (text := cell(rows[place], name))]
        declared_range = plan.ranges.get(name)
        if fault := _number_fault(texts, trained_texts, declared_range, is_private=is_private):
            faults.append(f"column {name}: {fault}")
        elif trained_texts and not declared_range:
            values = [float(text) for text in trained_texts]
            numbers[name] = (min(values), max(values))
    if faults:
        raise FederationError("The data of this site do not fit the plan:", faults)
    plain = image.model_copy(update={"labels": (), "conditions": ()})
    return SiteFacts(
        plan=plan.sha256, images=len(trained), subjects=subjects, image=plain, classes=classes,
        numbers=numbers, first_stage_sha256=first_stage_sha256, moments=moments,
        mask_key=mask_key,
    )  # fmt: skip


def _number_fault(
    texts: Iterable[str], trained: Sequence[str], declared: Pair | None, *, is_private: bool
) -> str:
    """Why a column of numbers does not fit a plan; empty if it does."""
    if wrong := sum(parse_number(text) is None for text in texts):
        return f"{wrong} cells are no numbers"
    if declared is None:
        return "the plan declares no range of it" if is_private else ""
    low, high = declared
    if all(low <= float(text) <= high for text in trained):
        return ""
    return f"a number lies outside of {low:g} to {high:g}"


def agree(
    plan: FederationPlan, kinds: Mapping[str, str], facts: Mapping[str, SiteFacts]
) -> Agreement:
    """The agreement that follows from the facts of all sites.

    Args:
        kinds: "class" or "number" of each column that the images follow.
        facts: by the label of the site.

    Raises:
        FederationError: all reasons why the sites cannot train together.
    """
    facts = dict(sorted(facts.items()))
    faults = [*_strangers(plan, facts), *_differences(facts), *_unfit(plan, facts)]
    conditions = [*_conditions(plan, kinds, facts, faults)]
    if faults:
        raise FederationError("The sites cannot train together:", first_faults(faults))
    for name, kind in kinds.items():
        if kind == "class" and (lonely := _at_one_site(name, facts)):
            log.warning(
                "%s: %s: no other site has images of these classes. A site learns little of what "
                "distinguishes its class from those of others, and the average may mix them "
                "(docs/federation.md).", name, ", ".join(lonely),
            )  # fmt: skip
    return Agreement(
        plan=plan.sha256,
        image=_image(facts, conditions),
        images={name: site.images for name, site in facts.items()},
        subjects={name: site.subjects for name, site in facts.items() if site.subjects},
        first_stage_sha256=next(iter(facts.values())).first_stage_sha256,
        moments=pooled([site.moments for site in facts.values() if site.moments]),
        mask_keys={name: site.mask_key for name, site in facts.items() if site.mask_key},
    )


def _at_one_site(name: str, facts: Mapping[str, SiteFacts]) -> list[str]:
    """The classes of a column that a single one of several sites has."""
    holders = Counter(label for site in facts.values() for label in site.classes.get(name, ()))
    return sorted(label for label, count in holders.items() if count == 1 < len(facts))


def pooled(moments: Sequence[Moments]) -> Moments | None:
    """The moments of all values together; None if there are none.

    The mean of standard deviations would be too small where the means differ.
    """
    if len(moments) < 2:
        return moments[0] if moments else None  # to the bit
    count = sum(part.count for part in moments)
    mean = sum(part.count / count * part.mean for part in moments)
    squares = sum(
        (part.count - 1) * part.std**2 + part.count * (part.mean - mean) ** 2 for part in moments
    )
    return Moments(count=count, mean=mean, std=math.sqrt(squares / (count - 1)))


def check_agreement(agreement: Agreement, plan: FederationPlan, site: str, own: SiteFacts) -> None:
    """Raise FederationError at a site whose plan or data an agreement does not fit."""
    faults = [*_other_plan(agreement, plan, site, own), *_lacking(agreement, own)]
    if faults:
        raise FederationError("This site cannot train under this agreement:", faults)


def _other_plan(
    agreement: Agreement, plan: FederationPlan, site: str, own: SiteFacts
) -> Iterator[str]:
    """What an agreement has otherwise than this site, and must not."""
    if agreement.plan != plan.sha256:
        yield f"plan: the agreement is of {agreement.plan[:12]}, ours is {plan.sha256[:12]}"
    if agreement.images.get(site) != own.images:
        yield f"images: {agreement.images.get(site)} agreed on, {own.images} here"
    if agreement.subjects.get(site) != own.subjects:
        yield f"subjects: {agreement.subjects.get(site)} agreed on, {own.subjects} here"
    if agreement.mask_keys.get(site, "") != own.mask_key:
        yield "mask key: another one was agreed on than this site has now"
    if plan.secure_aggregation and len({*agreement.mask_keys.values()}) < len(agreement.images):
        yield "mask keys: each site needs one of its own"
    if agreement.first_stage_sha256 != own.first_stage_sha256:
        yield "first stage: its hash is another one here"
    for key, show in _EQUAL.items():
        if show(agreement.image) != show(own.image):
            yield f"{key}: {show(agreement.image)} agreed on, {show(own.image)} here"


def _lacking(agreement: Agreement, own: SiteFacts) -> Iterator[str]:
    """Classes and numbers of this site that an agreement has no place for."""
    specs = {spec.name: spec for spec in agreement.image.conditions}
    vocabularies = {name: spec.classes for name, spec in specs.items() if spec.kind == "class"}
    vocabularies.setdefault(LABEL, agreement.image.labels)
    for name, known in own.classes.items():
        if lacking := [text for text in known if text not in vocabularies.get(name, ())]:
            yield f"classes of {name}: {', '.join(first_faults(lacking, 5))} not agreed on"
    for name, (low, high) in own.numbers.items():
        if not (spec := specs.get(name)) or not spec.low <= low <= high <= spec.high:
            yield f"numbers of {name}: {low:g} to {high:g} here are not agreed on"


_EQUAL: dict[str, Callable[[ImageSpec], Any]] = {
    "size": lambda image: list(image.size),
    "channels": lambda image: image.channels,
    "source channels": lambda image: list(image.source_channels),
    "masks": lambda image: {channel: list(classes) for channel, classes in image.masks.items()},
}
"""What must be the same at all sites, by the name that a message gives it."""


def _strangers(plan: FederationPlan, facts: Mapping[str, SiteFacts]) -> Iterator[str]:
    """Sites that the plan does not name, or that have another plan; too few of them."""
    for name, site in facts.items():
        if name not in plan.sites:
            yield f"{name}: is not a site of this plan"
        if site.plan != plan.sha256:
            yield f"{name}: has another plan ({site.plan[:12]}, not {plan.sha256[:12]})"
        if bool(site.mask_key) != plan.secure_aggregation:
            yield f"{name}: its mask key does not fit the plan's secure_aggregation"
    if len(facts) < plan.minimum_sites:
        yield f"{len(facts)} sites are too few, minimum_sites is {plan.minimum_sites}"


def _differences(facts: Mapping[str, SiteFacts]) -> Iterator[str]:
    """What differs between the sites and must not, against the first of them."""
    if not facts:
        return
    first, expected = next(iter(facts.items()))
    for name, site in facts.items():
        for key, show in _EQUAL.items():
            if show(site.image) != show(expected.image):
                yield (
                    f"{key}: {show(site.image)} at {name}, {show(expected.image)} at {first}; "
                    "the plan's config must make them the same"
                )
        pairs = zip(site.image.spacing_mm, expected.image.spacing_mm, strict=True)
        if any(abs(here - there) > _WIDEST_GAP for here, there in pairs):
            yield (
                f"spacing: {_sides(site.image)} at {name}, {_sides(expected.image)} at "
                f"{first}; set data.spacing_mm"
            )
        if site.first_stage_sha256 != expected.first_stage_sha256:
            yield f"first stage: {name} has another one than {first}"
        if (site.moments is None) != (expected.moments is None):
            yield f"moments: only one of {first} and {name} tells those of its latents"


def _unfit(plan: FederationPlan, facts: Mapping[str, SiteFacts]) -> Iterator[str]:
    """Sites that cannot train privately as the plan says."""
    if plan.privacy is None:
        return
    for name, site in facts.items():
        if site.subjects is None:
            yield f"{name}: does not tell its subjects, which training.privacy needs"
        else:
            yield from (f"{name}: {fault}" for fault in size_faults(plan.batch_size, site.subjects))


def _sides(image: ImageSpec) -> str:
    return " x ".join(f"{side:g}" for side in image.spacing_mm) + " mm"


def _conditions(
    plan: FederationPlan, kinds: Mapping[str, str], facts: Mapping[str, SiteFacts],
    faults: list[str],
) -> Iterator[ConditionSpec]:  # fmt: skip
    """The agreed vocabulary and range of each column; `faults` gets the reasons against it."""
    for name, kind in kinds.items():
        if kind == "class":
            classes = _vocabulary([site.classes.get(name, ()) for site in facts.values()])
            spec = ConditionSpec(name=name, kind="class", classes=classes)
        else:
            told = [site.numbers[name] for site in facts.values() if name in site.numbers]
            low, high = plan.ranges.get(name) or (
                min((low for low, _ in told), default=0.0),
                max((high for _, high in told), default=0.0),
            )
            spec = ConditionSpec(name=name, kind="number", low=low, high=high)
        if spec.fault:
            faults.append(f"condition {name}: {spec.fault}")
        else:
            yield spec


def _vocabulary(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The classes of all sites: in the order of the sites if it is one, else sorted.

    A class has the same id at every site only if one list serves all of them.
    """
    if len({tuple(classes) for classes in lists}) == 1:
        return tuple(lists[0])
    return tuple(sorted({name for classes in lists for name in classes}, key=natural_key))


def _image(facts: Mapping[str, SiteFacts], conditions: Sequence[ConditionSpec]) -> ImageSpec:
    """Images of the federation: geometry, intensities weighted by images, format, vocabulary."""
    sites = list(facts.values())
    first, total = sites[0].image, sum(site.images for site in sites)

    def mean(channel: int, end: int) -> float:
        return sum(site.images / total * site.image.intensity_range[channel][end] for site in sites)

    ranges = first.intensity_range
    if any(site.image.intensity_range != ranges for site in sites):
        ranges = tuple((mean(channel, 0), mean(channel, 1)) for channel in range(first.channels))
    one_place = all(site.image.affine == first.affine for site in sites)
    affine = first.affine if one_place else as_rows(centred_affine(first.spacing_mm, first.size))
    is_picture = all(site.image.file_format == "png" for site in sites)
    return first.model_copy(
        update={
            "affine": affine,
            "intensity_range": ranges,
            "file_format": "png" if is_picture else "nii.gz",
            "integer": all(site.image.integer for site in sites),
            "labels": _vocabulary([site.classes.get(LABEL, ()) for site in sites]),
            "conditions": tuple(conditions),
        }
    )
