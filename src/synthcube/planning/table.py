"""A finished plan, as a table for a terminal and as a YAML with a reason beside each key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from synthcube import __version__
from synthcube.config import RunConfig, inline
from synthcube.data.fingerprint import Fingerprint
from synthcube.planning.cost import Duration, StepTime
from synthcube.planning.draft import Choice, Machine

HEADING = "# Planned by synthcube"
_SECTIONS = ("model", "data", "training", "sampling", "evaluation", "compute")
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Cost:
    """What the planned training takes; None where no step was timed."""

    training_bytes: int
    reading_bytes: int
    """What the largest image takes before the training begins, in host memory."""
    sampling_bytes: int | None
    steps: int
    weights: int
    timed: StepTime | None = None
    duration: Duration | None = None
    image_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan that a specialist would consider."""

    command: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The config that was chosen, why, and what it costs."""

    fingerprint: Fingerprint
    machine: Machine
    choices: tuple[Choice, ...]
    settings: RunConfig
    values: dict[str, Any]
    """The chosen values, nested, those of the user included."""
    cost: Cost
    alternatives: tuple[Alternative, ...]
    warnings: tuple[str, ...]

    @property
    def by_key(self) -> dict[str, Choice]:
        return {choice.key: choice for choice in self.choices}


Row = tuple[str, str, str]


def rows(plan: Plan) -> dict[str, list[Row]]:
    """The rows of the table, by part: what it is, its value, and why or what of it."""
    return {
        "measured": list(_measured(plan.fingerprint)) + list(_of_machine(plan.machine)),
        "chosen": [
            (choice.key, inline(_plain(choice.value)), choice.reason) for choice in plan.choices
        ],
        "cost": list(_cost(plan)),
        "alternatives": [("", other.command, other.reason) for other in plan.alternatives],
    }


def _measured(measured: Fingerprint) -> Iterator[Row]:
    subjects = f"of {measured.num_subjects} subjects" if measured.num_subjects else ""
    yield "images", f"{measured.num_images:,}", subjects
    shape = _along(measured.shape.median)
    ends = f"{_along(measured.shape.lowest)} to {_along(measured.shape.highest)}"
    yield "shape", shape, "all of them" if measured.one_shape else f"median; {ends}"
    content = math.prod(measured.content.median) / math.prod(measured.shape.median)
    yield "content", _along(measured.content.median), f"{content:.0%} of the voxels, median"
    if measured.has_geometry:
        ends = f"{_along(measured.spacing_mm.lowest)} to {_along(measured.spacing_mm.highest)}"
        note = "all of them" if measured.one_spacing else f"median; {ends}"
        yield "spacing", f"{_along(measured.spacing_mm.median)} mm", note
    for number, part in enumerate(measured.channels):
        if part.kind == "mask":
            yield f"channel {number}", "mask", f"classes {', '.join(map(str, part.classes))}"
            continue
        low, middle, high = part.percentiles
        yield (
            f"channel {number}", part.kind,
            f"{part.lowest:.4g} to {part.highest:.4g}; foreground {part.foreground:.0%}, "
            f"mean {part.mean:.4g}, std {part.std:.4g}, percentiles {low:.4g} {middle:.4g} "
            f"{high:.4g}",
        )  # fmt: skip
    if measured.class_counts:
        counts = measured.class_counts
        yield "classes", str(len(counts)), f"of {min(counts):,} to {max(counts):,} images"
    for name, numbers in measured.numbers.items():
        yield f"column {name}", f"{numbers.low:g} to {numbers.high:g}", f"{numbers.known:,} known"
    if measured.splits:
        counted = (f"{name} {count:,}" for name, count in measured.splits.items())
        yield "split", "in the manifest", ", ".join(counted)
    yield "near-duplicates", f"{measured.near_duplicates:,}", ""


def _of_machine(machine: Machine) -> Iterator[Row]:
    kind = "GPU" if machine.is_gpu else f"CPU, {machine.cores} cores"
    where = "" if machine.is_here else ", not this machine"
    yield "machine", kind, f"{machine.memory / 1e9:.1f} GB, {machine.precision}{where}"


def _cost(plan: Plan) -> Iterator[Row]:
    cost, settings = plan.cost, plan.settings
    yield (
        "memory to train", f"{cost.training_bytes / 1e9:.2f} GB",
        f"beside 1 GB of libraries; {plan.machine.usable / 1e9:.1f} GB may be used",
    )  # fmt: skip
    if cost.reading_bytes > cost.training_bytes:
        yield "memory to read images", f"{cost.reading_bytes / 1e9:.2f} GB", "the largest of them"
    if cost.sampling_bytes is not None:
        yield "memory to sample", f"{cost.sampling_bytes / 1e9:.2f} GB", ""
    passes = settings.training.max_epochs
    yield "length", f"{cost.steps:,} steps", f"{passes:,} passes over the training images"
    yield "weights", f"{cost.weights / 4e6:.2f} M", ""
    if cost.duration and cost.timed:
        parts = cost.duration
        busy = cost.timed.process_step / cost.timed.step if cost.timed.step else 1
        note = f"{cost.timed.step:.3g} s a step, from {cost.timed.num_steps} steps"
        if not plan.machine.is_gpu and busy < 0.7:
            note += f"; the machine is busy ({busy:.0%} of a core was free)"
        yield "time to train", spoken(parts.total), note
        if parts.validation + parts.pictures > 0.01 * parts.total:
            yield (
                "", "", f"of it validation {spoken(parts.validation)}, pictures "
                f"{spoken(parts.pictures)}",
            )  # fmt: skip
    else:
        yield "time to train", "not timed", ""
    if cost.image_seconds is not None:
        yield "time an image", f"{cost.image_seconds:.2g} s", ""


def spoken(seconds: float) -> str:
    """A duration as in "2.5 hours"."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def yaml_text(plan: Plan) -> str:
    """The plan as a config: the chosen keys, and the reason beside each."""
    lines = [
        f"{HEADING} {__version__}: {plan.fingerprint.num_images} images, "
        f"{plan.machine.device.type}, {plan.machine.memory / 1e9:.1f} GB.",
        "# Keys that are not here have their defaults. Train with:",
        "# synthcube train -c THIS_FILE -d DATA -o RUN",
        "",
    ]
    reasons = {choice.key: choice.reason for choice in plan.choices}
    others = [name for name in plan.values if name not in _SECTIONS]
    for section in (*_SECTIONS, *others):
        value = plan.values.get(section)
        if isinstance(value, Mapping) and value:
            lines += [f"{section}:", *_keys(value, section, reasons), ""]
        elif section in plan.values and not isinstance(value, Mapping):
            lines += [f"{section}: {inline(_plain(value))}  # set by you", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _keys(values: Mapping[Any, Any], section: str, reasons: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        reason = reasons.get(f"{section}.{name}", "set by you")
        yield f"  {name}: {inline(_plain(value))}  # {reason}"


def _plain(value: Any) -> Any:
    """A value that JSON can hold: its keys are text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _along(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
