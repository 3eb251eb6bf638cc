"""Plots as SVG inside the page: their text is text, their colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from synthcube.escapes import printable
from synthcube.evaluation.arrays import Floats
from synthcube.evaluation.report.text import number
from synthcube.evaluation.results import Plot

WIDTH, HEIGHT = 400, 250
TOP, RIGHT, BOTTOM = 10, 18, 40
_CHARACTER = 6.6  # width of a digit, in the units of the drawing
_BINS = (8, 40)
_BAR, _GAP, _NAME = 13, 10, 17  # heights in a bar chart
_LONGEST_NAME = 56  # characters


def figure(plot: Plot) -> Markup:
    """The drawing with its title and a legend that says how many numbers each series has.

    A histogram shows the share of each series that falls into a bin, in percent, so that series
    of different lengths can be compared. Bars lie on their side, their value beside them. Numbers
    that are not finite are not drawn; the legend says how many.
    """
    series = {name: np.array(values, np.float64) for name, values in plot.series.items()}
    drawing = (_histogram if plot.kind == "histogram" else _bars)(plot, series)
    if drawing is None:
        drawing = _element("p", "No numbers to draw.")
    title = _element("figcaption", plot.title)
    return _element("figure", title, drawing, _legend(plot, series), class_="plot")


def _element(name: str, /, *children: str, **attributes: str | float) -> Markup:
    """An element. Children that are not :class:`Markup` are escaped; so are all attributes.

    Args:
        attributes: `class_` is class, `aria_label` aria-label.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _attribute(value))
        for key, value in attributes.items()
    )
    inside = Markup("").join(_text(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, inside)


def _attribute(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")  # hundredths of a pixel
    return _text(str(value))


def _text(text: str) -> Markup:
    return text if isinstance(text, Markup) else escape(printable(text))


def histogram(series: dict[str, Floats], lines: Sequence[float] = ()) -> tuple[Floats, Floats]:
    """Bins that all series share, over all numbers and `lines`.

    Returns:
        edges (B + 1,) and counts (len(series), B), of finite numbers.
    """
    finite = [values[np.isfinite(values)] for values in series.values()]
    all_values = [*np.concatenate(finite), *lines]
    fewest = min(len(values) for values in finite if len(values))
    bins = int(np.clip(round(2 * math.sqrt(fewest)), *_BINS))
    edges = np.linspace(*_range(all_values), bins + 1)
    counts = np.stack([np.histogram(values, edges)[0] for values in finite])
    return edges, counts.astype(np.float64)


def _histogram(plot: Plot, series: dict[str, Floats]) -> Markup | None:
    if not any(np.isfinite(values).any() for values in series.values()):
        return None
    edges, counts = histogram(series, [*filter(math.isfinite, plot.lines.values())])
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    top = float(shares.max()) * 1.05
    longest = max(map(len, _tick_labels(_ticks(0, top))), default=1)
    left, bottom, right = 28 + _CHARACTER * longest, HEIGHT - BOTTOM, WIDTH - RIGHT
    x, y = Scale(edges[0], edges[-1], left, right), Scale(0, top, bottom, TOP)
    parts = [_vertical_axis(y, left, right, "share of each (%)")]
    for index, heights in enumerate(shares):
        path = f"M{left:.1f} {bottom:.1f}" + "".join(
            f"V{y(height):.2f}H{x(stop):.2f}"
            for height, stop in zip(heights, edges[1:], strict=True)
        )
        parts.append(_element("path", class_=f"area s{index % 6}", d=f"{path}V{bottom:.1f}"))
    parts += [*_lines(plot, x, bottom), _horizontal_axis(x, bottom, plot.x_label)]
    return _svg(plot, series, HEIGHT, parts)


def _bars(plot: Plot, series: dict[str, Floats]) -> Markup | None:
    for name, values in series.items():
        if len(values) != len(plot.categories):
            raise ValueError(
                f"{plot.title}: {len(values)} bars of {name}, {len(plot.categories)} categories"
            )
    all_values = np.concatenate([np.zeros(1), *series.values()])
    if not plot.categories or not np.isfinite(all_values[1:]).any():
        return None
    shown = [*all_values[np.isfinite(all_values)], *filter(math.isfinite, plot.lines.values())]
    x = Scale(*_range(shown), RIGHT, WIDTH - 64)  # the value stands to the right of its bar
    parts, top = [], float(TOP)
    for place, category in enumerate(plot.categories):
        short = category[: _LONGEST_NAME - 1] + "…" if len(category) > _LONGEST_NAME else category
        parts.append(_element("text", short, _element("title", category), x=RIGHT, y=top + 12))
        top += _NAME
        for index, values in enumerate(series.values()):
            parts += _bar(x, float(values[place]), top, index)
            top += _BAR
        top += _GAP
    parts += [*_lines(plot, x, top), _horizontal_axis(x, top, plot.y_label or plot.x_label)]
    return _svg(plot, series, round(top + BOTTOM), parts)


def _bar(x: Scale, value: float, top: float, index: int) -> list[Markup]:
    if not math.isfinite(value):
        return [_element("text", "no number", class_="small", x=x(0) + 4, y=top + 10)]
    start, stop = sorted((x(0), x(value)))
    place = {"x": start, "y": top, "width": stop - start, "height": float(_BAR - 2)}
    return [
        _element("rect", class_=f"bar s{index % 6}", **place),
        _element("text", number(value), class_="small", x=stop + 4, y=top + 10),
    ]


def _lines(plot: Plot, x: Scale, bottom: float) -> list[Markup]:
    return [
        _element("path", class_=f"line l{index % 3}", d=f"M{x(value):.2f} {TOP:.1f}V{bottom:.1f}")
        for index, value in enumerate(plot.lines.values())
        if math.isfinite(value)
    ]


def _svg(plot: Plot, series: dict[str, Floats], height: int, parts: list[Markup]) -> Markup:
    texts = []
    for name, values in series.items():
        if plot.kind == "bars":
            bars = zip(plot.categories, values, strict=True)
            texts.append(f"{name}: " + ", ".join(f"{bar} {number(value)}" for bar, value in bars))
        elif len(finite := values[np.isfinite(values)]):
            low, middle, high = (number(value) for value in np.quantile(finite, (0, 0.5, 1)))
            texts.append(f"{name}: {len(finite)} values from {low} to {high}, median {middle}")
    texts += [f"{name}: line at {number(value)}" for name, value in plot.lines.items()]
    description = f"{plot.kind.capitalize()}, {plot.title}. {'; '.join(texts)}."
    box = f"0 0 {WIDTH} {height}"
    return _element("svg", *parts, viewBox=box, role="img", aria_label=description)


def _legend(plot: Plot, series: dict[str, Floats]) -> Markup:
    shape = "area" if plot.kind == "histogram" else "bar"
    items = []
    for index, (name, values) in enumerate(series.items()):
        swatch = _element("path", class_=f"{shape} s{index % 6}", d="M1 2h20v10h-20z")
        text = name
        if plot.kind == "histogram":
            finite = np.isfinite(values)
            others = "" if finite.all() else f"; {int((~finite).sum()):,} are not numbers"
            text = f"{name} ({int(finite.sum()):,}{others})"
        items.append(_element("li", _swatch(swatch), text))
    for index, (name, value) in enumerate(plot.lines.items()):
        swatch = _element("path", class_=f"line l{index % 3}", d="M11 0V14")
        items.append(_element("li", _swatch(swatch), f"{name}: {number(value)}"))
    return _element("ul", *items, class_="legend") if items else Markup("")


def _swatch(shape: Markup) -> Markup:
    size = {"viewBox": "0 0 22 14", "width": "22", "height": "14"}
    return _element("svg", shape, **size, aria_hidden="true")


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


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and highest value, or a range around them where they are equal."""
    low, high = float(min(values)), float(max(values))
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    half = 0.5 * abs(low) or 0.5
    return low - half, high + half


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _tick_labels(ticks: list[float]) -> list[str]:
    """As many decimals as tell neighbours apart."""
    if len(ticks) < 2 or max(map(abs, ticks)) >= 1e6:
        return [f"{tick:g}" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    if decimals > 5:
        return [f"{tick:.3g}" for tick in ticks]
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _horizontal_axis(scale: Scale, bottom: float, label: str) -> Markup:
    """Line, ticks and numbers, and the label below."""
    ticks = _ticks(scale.low, scale.high)
    line = f"M{scale.start:.1f} {bottom:.1f}H{scale.stop:.1f}"
    parts = [_element("path", class_="axis", d=line)]
    for tick, text in zip(ticks, _tick_labels(ticks), strict=True):
        x = scale(tick)
        parts.append(_element("path", class_="axis", d=f"M{x:.1f} {bottom:.1f}v4"))
        parts.append(_element("text", text, x=x, y=bottom + 16, text_anchor="middle"))
    middle = (scale.start + scale.stop) / 2
    parts.append(_element("text", label, x=middle, y=bottom + 33, text_anchor="middle"))
    return Markup("").join(parts)


def _vertical_axis(scale: Scale, left: float, right: float, label: str) -> Markup:
    """Pale lines across the plot and numbers, and the label turned."""
    ticks = _ticks(scale.low, scale.high)
    parts = []
    for tick, text in zip(ticks, _tick_labels(ticks), strict=True):
        y = scale(tick)
        parts.append(_element("path", class_="pale", d=f"M{left:.1f} {y:.1f}H{right:.1f}"))
        parts.append(_element("text", text, x=left - 6, y=y + 4, text_anchor="end"))
    middle = (scale.start + scale.stop) / 2
    turned = f"rotate(-90 12 {middle:.1f})"
    parts.append(_element("text", label, x=12, y=middle, text_anchor="middle", transform=turned))
    return Markup("").join(parts)
