"""Scales and axes of the plots, in SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass

from synthcube.evaluation.report.markup import Markup, joined, tag

WIDTH, HEIGHT = 400, 250
TOP, RIGHT, BOTTOM = 10, 18, 40
_CHARACTER = 6.6  # width of a digit, in the units of the drawing


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` on the line from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, `low < high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [each * step for each in range(first, last + 1)]


def tick_labels(places: list[float]) -> list[str]:
    """As many decimals as tell neighbours apart."""
    if len(places) < 2 or max(map(abs, places)) >= 1e6:
        return [f"{each:g}" for each in places]
    decimals = max(0, -math.floor(math.log10(places[1] - places[0]) + 1e-9))
    if decimals > 5:
        return [f"{each:.3g}" for each in places]
    return [f"{each:.{decimals}f}" for each in places]


def widened(low: float, high: float) -> tuple[float, float]:
    """The range, or one around it where it has no width."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    half = 0.5 * abs(low) or 0.5
    return low - half, high + half


def across(scale: Scale, bottom: float, label: str) -> Markup:
    """The horizontal axis: line, ticks, numbers, and its name below."""
    places = ticks(scale.low, scale.high)
    parts = [tag("path", class_="axis", d=f"M{scale.start:.1f} {bottom:.1f}H{scale.stop:.1f}")]
    for place, text in zip(places, tick_labels(places), strict=True):
        x = scale(place)
        parts.append(tag("path", class_="axis", d=f"M{x:.1f} {bottom:.1f}v4"))
        parts.append(tag("text", text, x=x, y=bottom + 16, text_anchor="middle"))
    middle = (scale.start + scale.stop) / 2
    parts.append(tag("text", label, x=middle, y=bottom + 33, text_anchor="middle"))
    return joined(*parts)


def upwards(scale: Scale, left: float, right: float, label: str) -> Markup:
    """The vertical axis: pale lines across the plot, numbers, and its name turned."""
    places = ticks(scale.low, scale.high)
    parts = []
    for place, text in zip(places, tick_labels(places), strict=True):
        y = scale(place)
        parts.append(tag("path", class_="pale", d=f"M{left:.1f} {y:.1f}H{right:.1f}"))
        parts.append(tag("text", text, x=left - 6, y=y + 4, text_anchor="end"))
    middle = (scale.start + scale.stop) / 2
    turned = f"rotate(-90 12 {middle:.1f})"
    parts.append(tag("text", label, x=12, y=middle, text_anchor="middle", transform=turned))
    return joined(*parts)


def left_margin(low: float, high: float) -> float:
    """Room for the vertical axis' numbers and name."""
    longest = max(map(len, tick_labels(ticks(low, high))), default=1)
    return 28 + _CHARACTER * longest
