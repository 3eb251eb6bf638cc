"""What an evaluation finds: numbers, each with what it is to be read against, or with a reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Measure:
    """A number, or why there is none."""

    value: float | None
    floor: float | None = None
    """The same number of real images against other real ones, at the same sample size."""
    low: float | None = None
    high: float | None = None
    """95% confidence interval."""
    count: int | None = None
    """Images, pairs or cases on each side that it was computed from."""
    reason: str | None = None
    """Why there is no value, or why it is to be read with care."""

    def plain(self) -> dict[str, float | int | str | None]:
        """For YAML: `value` always, the others where they are said; never NaN or infinite."""
        reason = self.reason
        if self.value is not None and not math.isfinite(self.value):
            reason = reason or f"the computation gave {self.value}"
        told: dict[str, float | int | str | None] = {"value": _rounded(self.value)}
        for name in ("floor", "low", "high"):
            number = getattr(self, name)
            if number is not None:
                told[name] = _rounded(number)
        told |= {} if self.count is None else {"count": int(self.count)}
        return told | ({"reason": reason} if reason else {})


def missing(reason: str) -> Measure:
    """No number, and why."""
    return Measure(None, reason=reason)


@dataclass(frozen=True, slots=True)
class Plot:
    """Numbers to be drawn: a histogram of each series, bars, or dots (x, y)."""

    title: str
    kind: Literal["histogram", "bars", "dots"]
    series: dict[str, list[float]]
    """histogram: the values; bars: one value for each of `categories`; dots: "x" and
    "y", or "NAME x" and "NAME y" for each of several clouds."""
    x_label: str = ""
    y_label: str = ""
    categories: tuple[str, ...] = ()
    lines: dict[str, float] = field(default_factory=dict)
    """Vertical lines by name, such as a threshold."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Images in rows: rows[i][j] is (H, W) or (H, W, 3) in [0, 1], first axis down."""

    title: str
    rows: list[list[npt.NDArray[np.float32]]]
    row_titles: tuple[str, ...] = ()
    captions: list[list[str]] = field(default_factory=list)
    """Below each image; empty for none."""


@dataclass(slots=True)
class Section:
    """One question, and what was found."""

    name: str  # its key in results.yaml
    measures: dict[str, Measure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences for a reader: what the numbers mean here, and what they do not. One that begins
    with "The floor" stands beside the numbers: where a floor is no value to come near."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values that are no measures: thresholds, settings, counts."""
    plots: list[Plot] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    cases: list[dict[str, float | int | str | None]] = field(default_factory=list)
    """One row for each case: kept at the site, never part of results.yaml."""

    def plain(self) -> dict[str, Any]:
        """For YAML: measures by name, then facts, then notes."""
        told: dict[str, Any] = {name: each.plain() for name, each in self.measures.items()}
        told |= {name: plain(value) for name, value in self.facts.items()}
        return told | ({"notes": list(self.notes)} if self.notes else {})


def plain(value: Any) -> Any:
    """`value` in types that `yaml.safe_load` gives back: numpy's become Python's, NaN null."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(each) for each in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return _rounded(float(value))
    return value if value is None else str(value)


def _rounded(number: float | None) -> float | None:
    if number is None or not math.isfinite(number):
        return None
    return float(f"{float(number):.{_DIGITS}g}")
