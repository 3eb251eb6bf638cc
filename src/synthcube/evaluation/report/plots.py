"""Plots as SVG inside the page: its text is text, its colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from synthcube.evaluation.report import axes
from synthcube.evaluation.report.axes import Scale
from synthcube.evaluation.report.markup import Markup, joined, tag
from synthcube.evaluation.report.words import number
from synthcube.evaluation.results import Plot

Floats = npt.NDArray[np.float64]

MAX_DOTS = 2000
_BINS = (8, 40)
_BAR, _GAP, _NAME = 13, 10, 17  # heights in a chart of bars
_LONGEST_NAME = 56  # characters
_MARKS = ("m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "m-3-3h6v6h-6z", "m-3.5 3h7l-3.5-6z")  # o, square, ^


def figure(plot: Plot) -> Markup:
    """The drawing with its title and a legend that says how many numbers each series has.

    A histogram shows the share of each series that falls into a bin, in percent, so that series
    of different lengths can be compared. Bars lie on their side, their value beside them. Numbers
    that are not finite are not drawn; the legend says how many.

    Raises:
        ValueError: series and categories, or x and y, differ in length.
    """
    draw = {"histogram": _histogram, "bars": _bars, "dots": _dots}[plot.kind]
    series = _clouds(plot) if plot.kind == "dots" else _numbers(plot)
    drawing = draw(plot, series)
    if drawing is None:
        drawing = tag("p", "No numbers to draw.")
    title = tag("figcaption", plot.title)
    return tag("figure", title, drawing, _legend(plot, series), class_="plot")


def histogram(series: dict[str, Floats], lines: Sequence[float] = ()) -> tuple[Floats, Floats]:
    """Bins that all series share, over all numbers and `lines`.

    Returns:
        edges (B + 1,) and counts (len(series), B), of finite numbers.
    """
    finite = [each[np.isfinite(each)] for each in series.values()]
    everything = np.concatenate(finite)
    fewest = min(len(each) for each in finite if len(each))
    bins = int(np.clip(round(2 * math.sqrt(fewest)), *_BINS))
    low, high = axes.widened(*_span([*everything, *lines]))
    edges = np.linspace(low, high, bins + 1)
    counts = np.stack([np.histogram(each, edges)[0] for each in finite])
    return edges, counts.astype(np.float64)


def _span(values: Sequence[float]) -> tuple[float, float]:
    return float(min(values)), float(max(values))


def _histogram(plot: Plot, series: dict[str, Floats]) -> Markup | None:
    if not any(np.isfinite(each).any() for each in series.values()):
        return None
    edges, counts = histogram(series, [each for each in plot.lines.values() if math.isfinite(each)])
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    top = float(shares.max()) * 1.05
    left, bottom = axes.left_margin(0, top), axes.HEIGHT - axes.BOTTOM
    right = axes.WIDTH - axes.RIGHT
    x, y = Scale(edges[0], edges[-1], left, right), Scale(0, top, bottom, axes.TOP)
    parts = [axes.upwards(y, left, right, "share of each (%)")]
    for place, heights in enumerate(shares):
        path = f"M{left:.1f} {bottom:.1f}" + "".join(
            f"V{y(height):.2f}H{x(stop):.2f}"
            for height, stop in zip(heights, edges[1:], strict=True)
        )
        parts.append(tag("path", class_=f"area s{place % 6}", d=f"{path}V{bottom:.1f}"))
    parts += [_lines(plot, x, axes.TOP, bottom), axes.across(x, bottom, plot.x_label)]
    return _svg(plot, series, axes.HEIGHT, parts)


def _bars(plot: Plot, series: dict[str, Floats]) -> Markup | None:
    for name, values in series.items():
        if len(values) != len(plot.categories):
            raise ValueError(
                f"{plot.title}: {len(values)} bars of {name}, {len(plot.categories)} categories"
            )
    everything = np.concatenate([np.zeros(1), *series.values()])
    if not plot.categories or not np.isfinite(everything[1:]).any():
        return None
    told = [*everything[np.isfinite(everything)], *filter(math.isfinite, plot.lines.values())]
    low, high = axes.widened(*_span(told))
    x = Scale(low, high, axes.RIGHT, axes.WIDTH - 64)  # the value stands to the right of its bar
    parts, top = [], float(axes.TOP)
    for place, category in enumerate(plot.categories):
        parts.append(_name(category, top))
        top += _NAME
        for which, values in enumerate(series.values()):
            parts.append(_bar(x, float(values[place]), top, which))
            top += _BAR
        top += _GAP
    parts += [_lines(plot, x, axes.TOP, top), axes.across(x, top, plot.y_label or plot.x_label)]
    return _svg(plot, series, round(top + axes.BOTTOM), parts)


def _name(category: str, top: float) -> Markup:
    text = category if len(category) <= _LONGEST_NAME else category[: _LONGEST_NAME - 1] + "…"
    return tag("text", text, tag("title", category), x=axes.RIGHT, y=top + 12)


def _bar(x: Scale, value: float, top: float, which: int) -> Markup:
    if not math.isfinite(value):
        return tag("text", "no number", class_="small", x=x(0) + 4, y=top + 10)
    start, stop = sorted((x(0), x(value)))
    place = {"x": start, "y": top, "width": stop - start, "height": float(_BAR - 2)}
    text = tag("text", number(value), class_="small", x=stop + 4, y=top + 10)
    return joined(tag("rect", class_=f"bar s{which % 6}", **place), text)


def _dots(plot: Plot, series: dict[str, Floats]) -> Markup | None:
    drawn = {name: each[np.isfinite(each).all(axis=1)] for name, each in series.items()}
    everything = np.concatenate(list(drawn.values())) if drawn else np.zeros((0, 2))
    if not len(everything):
        return None
    lines = [each for each in plot.lines.values() if math.isfinite(each)]
    (low, high) = _roomy([*everything[:, 0], *lines])
    (under, over) = _roomy(everything[:, 1].tolist())
    left, bottom = axes.left_margin(under, over), axes.HEIGHT - axes.BOTTOM
    right = axes.WIDTH - axes.RIGHT
    x, y = Scale(low, high, left, right), Scale(under, over, bottom, axes.TOP)
    x_label, y_label = plot.x_label or "x", plot.y_label or "y"
    parts = [axes.upwards(y, left, right, y_label)]
    for which, dots in enumerate(drawn.values()):
        mark = _MARKS[which % len(_MARKS)]
        path = "".join(f"M{x(each):.1f} {y(other):.1f}{mark}" for each, other in _thinned(dots))
        parts.append(tag("path", class_=f"dot s{which % 6}", d=path))
    parts += [_lines(plot, x, axes.TOP, bottom), axes.across(x, bottom, x_label)]
    return _svg(plot, series, axes.HEIGHT, parts)


def _roomy(values: Sequence[float]) -> tuple[float, float]:
    low, high = axes.widened(*_span(values))
    room = 0.04 * (high - low)
    return low - room, high + room


def _thinned(dots: Floats) -> Floats:
    """At most MAX_DOTS of them, evenly through their order."""
    if len(dots) <= MAX_DOTS:
        return dots
    kept: Floats = dots[np.linspace(0, len(dots) - 1, MAX_DOTS).astype(int)]
    return kept


def _lines(plot: Plot, x: Scale, top: float, bottom: float) -> Markup:
    paths = [
        tag("path", class_=f"line l{which % 3}", d=f"M{x(value):.2f} {top:.1f}V{bottom:.1f}")
        for which, value in enumerate(plot.lines.values())
        if math.isfinite(value)
    ]
    return joined(*paths)


def _numbers(plot: Plot) -> dict[str, Floats]:
    return {name: np.array(each, np.float64) for name, each in plot.series.items()}


def _clouds(plot: Plot) -> dict[str, Floats]:
    """(N, 2) by name, of the series "x" and "y", or "NAME x" and "NAME y" for several."""
    found: dict[str, Floats] = {}
    for name, values in plot.series.items():
        if name == "x" or name.endswith(" x"):
            other = plot.series.get(f"{name[:-1]}y", [])
            if len(values) != len(other):
                raise ValueError(f"{plot.title}: {len(values)} of {name}, {len(other)} of its y")
            found[name[:-2] or "all"] = np.array([values, other], np.float64).T
    if 2 * len(found) != len(plot.series):
        raise ValueError(f"{plot.title}: dots are x and y, or 'NAME x' and 'NAME y' for each")
    return found


def _svg(plot: Plot, series: dict[str, Floats], height: int, parts: list[Markup]) -> Markup:
    box = f"0 0 {axes.WIDTH} {height}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=_described(plot, series))


def _described(plot: Plot, series: dict[str, Floats]) -> str:
    told = []
    for name, values in series.items():
        if plot.kind == "bars":
            pairs = zip(plot.categories, values, strict=True)
            told.append(f"{name}: " + ", ".join(f"{what} {number(each)}" for what, each in pairs))
        elif plot.kind == "dots":
            told.append(f"{name}: {len(values)} dots")
        elif len(finite := values[np.isfinite(values)]):
            low, middle, high = (number(each) for each in np.quantile(finite, (0, 0.5, 1)))
            told.append(f"{name}: {len(finite)} values from {low} to {high}, median {middle}")
    told += [f"{name}: line at {number(value)}" for name, value in plot.lines.items()]
    return f"{plot.kind.capitalize()}, {plot.title}. {'; '.join(told)}."


def _legend(plot: Plot, series: dict[str, Floats]) -> Markup:
    items = []
    for which, (name, values) in enumerate(series.items()):
        items.append(tag("li", _swatch(plot.kind, which), _counted(plot, name, values)))
    for which, (name, value) in enumerate(plot.lines.items()):
        swatch = tag("path", class_=f"line l{which % 3}", d="M11 0V14")
        items.append(tag("li", _small(swatch), f"{name}: {number(value)}"))
    return tag("ul", *items, class_="legend") if items else Markup()


def _counted(plot: Plot, name: str, values: Floats) -> str:
    if plot.kind == "bars":
        return name
    finite = np.isfinite(values) if values.ndim == 1 else np.isfinite(values).all(axis=1)
    text = f"{name} ({int(finite.sum()):,}"
    if plot.kind == "dots" and finite.sum() > MAX_DOTS:
        text += f", of which {MAX_DOTS:,} are drawn"
    return text + (f"; {int((~finite).sum()):,} are not numbers)" if not finite.all() else ")")


def _swatch(kind: str, which: int) -> Markup:
    if kind == "dots":
        path = f"M11 7{_MARKS[which % len(_MARKS)]}"
        return _small(tag("path", class_=f"dot s{which % 6}", d=path))
    shape = "area" if kind == "histogram" else "bar"
    return _small(tag("path", class_=f"{shape} s{which % 6}", d="M1 2h20v10h-20z"))


def _small(shape: Markup) -> Markup:
    return tag("svg", shape, viewBox="0 0 22 14", width="22", height="14", aria_hidden="true")
