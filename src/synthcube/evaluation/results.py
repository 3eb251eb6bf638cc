"""Results of an evaluation: numbers, each with a baseline or with the reason why it is missing."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from synthcube.data.pictures import middle_planes, plane_sizes, resized
from synthcube.evaluation.arrays import Array

Cell = float | int | str | None

_DIGITS = 6
BASELINE_NOTE = "The real baseline"


@dataclass(frozen=True, slots=True)
class Measure:
    """A number, or the reason why there is none."""

    value: float | None
    real_baseline: float | None = None
    """The same measure between real images and other real images, at the same sample size."""
    low: float | None = None
    high: float | None = None  # 95% confidence interval
    count: int | None = None  # images, pairs or cases on each side
    reason: str | None = None  # why there is no value, or why it should be read with care

    def plain(self) -> dict[str, Cell]:
        """For YAML: `value` always, the others where they are set; never NaN or infinite."""
        reason = self.reason
        if self.value is not None and not math.isfinite(self.value):
            reason = reason or f"the computation gave {self.value}"
        fields: dict[str, Cell] = {"value": _rounded(self.value)}
        for name in ("real_baseline", "low", "high"):
            number = getattr(self, name)
            if number is not None:
                fields[name] = _rounded(number)
        fields |= {} if self.count is None else {"count": int(self.count)}
        return fields | ({"reason": reason} if reason else {})


def missing(reason: str) -> Measure:
    """A measure without a value."""
    return Measure(None, reason=reason)


@dataclass(frozen=True, slots=True)
class Plot:
    """Numbers to draw: a histogram of each series, or bars."""

    title: str
    kind: Literal["histogram", "bars"]
    series: dict[str, list[float]]
    """histogram: the values; bars: one value for each of `categories`."""
    x_label: str = ""
    y_label: str = ""
    categories: tuple[str, ...] = ()
    lines: dict[str, float] = field(default_factory=dict)
    """Vertical lines by name, such as a threshold."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Images in rows: rows[i][j] is (H, W) or (H, W, 3) in [0, 1], first axis down."""

    title: str
    rows: list[list[Array]]
    row_titles: tuple[str, ...] = ()
    captions: list[list[str]] = field(default_factory=list)  # below each image; empty for none


def upright(
    image: Array, bounds: Sequence[tuple[float, float]], *, raster: bool,
    spacing_mm: Sequence[float] = (), masks: Collection[int] = (),
) -> Array:  # fmt: skip
    """(H, W), or (H, W, 3) of a 2D image of three channels and masks; the first axis runs down.

    A volume becomes its middle axial, coronal and sagittal slice, left to right, in millimetres
    and of one height, with the patient's right on the left; channels that are not colours stand
    side by side.

    Args:
        image: (C, X, Y) or (C, X, Y, Z).
        bounds: intensities shown as 0 and 1, for each channel; the rest is clipped.
        raster: a picture, whose second axis runs down; in others it runs up, as in RAS.
        spacing_mm: voxel size along each axis; 1 mm where there is none.
        masks: channels that are no colours.
    """
    low, high = (np.array([pair[end] for pair in bounds], np.float32) for end in (0, 1))
    shape = (-1, *[1] * (image.ndim - 1))
    width = np.maximum(high - low, np.finfo(np.float32).tiny)
    unit = ((image - low.reshape(shape)) / width.reshape(shape)).clip(0, 1)
    if image.ndim == 4:
        sizes = plane_sizes(unit.shape[1:], [*spacing_mm, 1.0, 1.0, 1.0][:3])
        cuts = [zip(middle_planes(channel), sizes, strict=True) for channel in unit]
        return _side_by_side([resized(plane, size) for pairs in cuts for plane, size in pairs])
    turned = unit.transpose(0, 2, 1) if raster else unit.transpose(0, 2, 1)[:, ::-1]
    colours = [channel for channel in range(len(turned)) if channel not in masks]
    if len(colours) != 3:
        return _side_by_side(list(turned))
    grey = [np.stack([turned[mask]] * 3) for mask in masks]
    return np.moveaxis(np.concatenate([turned[colours], *grey], axis=2), 0, -1)


def _side_by_side(planes: list[Array]) -> Array:
    height = max(plane.shape[0] for plane in planes)
    padded = [np.pad(plane, ((0, height - plane.shape[0]), (0, 0))) for plane in planes]
    return np.ascontiguousarray(np.concatenate(padded, axis=1), np.float32)


@dataclass(slots=True)
class Section:
    """The answer to one question about the images."""

    name: str  # its key in results.yaml
    measures: dict[str, Measure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences for a reader: what the numbers mean here and what they do not mean. One that begins
    with BASELINE_NOTE says what the baseline of this section is, and stands beside its numbers."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values that are not measures: thresholds, settings, counts."""
    plots: list[Plot] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    cases: list[dict[str, Cell]] = field(default_factory=list)
    """One row for each case: kept at the site, never part of results.yaml."""

    def plain(self) -> dict[str, Any]:
        """For YAML: measures by name, then facts, then notes."""
        fields: dict[str, Any] = {name: measure.plain() for name, measure in self.measures.items()}
        fields |= {name: plain(value) for name, value in self.facts.items()}
        return fields | ({"notes": list(self.notes)} if self.notes else {})

    @property
    def baseline_note(self) -> str:
        """The section's own sentence on its baseline, or an empty string."""
        return next((note for note in self.notes if note.startswith(BASELINE_NOTE)), "")


def plain(value: Any) -> Any:
    """`value` in types that `yaml.safe_load` gives back: numpy's become Python's, NaN null."""
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(entry) for entry in value]
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
