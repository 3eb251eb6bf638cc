"""The curve of a training: its losses by epoch, drawn as a picture."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import PIL.Image
import PIL.ImageDraw
from lightning.pytorch.callbacks import Callback

from synthcube.data.pictures import font, save_picture
from synthcube.training.metrics import MetricsTable

FILE = "curve.png"
SIZE = (720, 420)
COLOURS = {"train": (31, 119, 180), "validation": (214, 96, 12)}
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 700, 34, 368  # of the plot, in pixels
_INK, _PALE, _PAPER = (40, 40, 40), (222, 222, 222), (255, 255, 255)
_MOST_DOTS = 80
_EVERY_S = 30.0
_LOGARITHMIC = 10.0  # where the highest loss is so many times the lowest

Points = Sequence[tuple[int, float]]
"""Epochs, from 1, and losses."""


class LossCurve(Callback):
    """Draws the losses in metrics.csv every half minute."""

    def __init__(self, table: MetricsTable) -> None:
        self.table = table
        self._last = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and time.monotonic() - self._last > _EVERY_S:
            draw_losses(self.table)
            self._last = time.monotonic()


def draw_losses(table: MetricsTable) -> None:
    """Draw the losses in metrics.csv to curve.png beside it, where there are any."""
    losses = read_losses(table.rows())
    if any(losses.values()):
        save_picture(table.path.with_name(FILE), drawn(losses))


def read_losses(rows: Sequence[Mapping[str, str]]) -> dict[str, Points]:
    """The finite losses of each epoch in rows of metrics.csv, of train and of validation."""
    losses: dict[str, Points] = {}
    for name in COLOURS:
        texts = [(row["epoch"], row.get(f"{name}/loss")) for row in rows]
        values = [(int(epoch) + 1, float(text)) for epoch, text in texts if epoch and text]
        losses[name] = [(epoch, loss) for epoch, loss in values if math.isfinite(loss)]
    return losses


@dataclass(frozen=True, slots=True)
class Axes:
    """Where epochs and losses are in the picture."""

    epochs: tuple[int, int]
    low: float
    high: float
    logarithmic: bool

    def x(self, epoch: float) -> int:
        """The column of pixels of an epoch."""
        first, last = self.epochs
        share = (epoch - first) / (last - first) if last > first else 0.5
        return round(_LEFT + share * (_RIGHT - _LEFT))

    def y(self, loss: float) -> int:
        """The row of pixels of a loss."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, loss = math.log(low), math.log(high), math.log(loss)
        return round(_BOTTOM - (loss - low) / (high - low) * (_BOTTOM - _TOP))


def axes(losses: Mapping[str, Points]) -> Axes:
    """The axes that all of these points fit on."""
    epochs = [epoch for points in losses.values() for epoch, _ in points]
    values = [loss for points in losses.values() for _, loss in points]
    low, high = min(values), max(values)
    span = (min(epochs), max(epochs))
    if low > 0 and high / low >= _LOGARITHMIC:
        return Axes(span, low / 1.1, high * 1.1, logarithmic=True)
    room = (high - low) / 20 or abs(high) / 20 or 1.0
    return Axes(span, low - room, high + room, logarithmic=False)


def drawn(losses: Mapping[str, Points]) -> PIL.Image.Image:
    """The losses of train and validation by epoch; at least one has points."""
    picture = PIL.Image.new("RGB", SIZE, _PAPER)
    draw = PIL.ImageDraw.Draw(picture)
    scale = axes(losses)
    _draw_axes(picture, draw, scale)
    left = _LEFT
    for name, points in losses.items():
        if not points:
            continue
        colour, places = COLOURS[name], [(scale.x(epoch), scale.y(loss)) for epoch, loss in points]
        draw.line(places, fill=colour, width=2, joint="curve")
        if len(places) <= _MOST_DOTS:
            for x, y in places:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        draw.line((left, 18, left + 22, 18), fill=colour, width=3)
        text = f"{name} {points[-1][1]:.4g}"
        draw.text((left + 28, 11), text, fill=_INK, font=font())
        left += round(font().getlength(text)) + 56
    return picture


def _draw_axes(picture: PIL.Image.Image, draw: PIL.ImageDraw.ImageDraw, scale: Axes) -> None:
    for tick in _loss_ticks(scale):
        y = scale.y(tick)
        draw.line((_LEFT, y, _RIGHT, y), fill=_PALE)
        draw.text((_LEFT - 6, y), f"{tick:.4g}", fill=_INK, font=font(), anchor="rm")
    first, last = scale.epochs
    step = max(1, round(_step((last - first) / 8))) if last > first else 1
    for epoch in {first, *range(math.ceil(first / step) * step, last + 1, step)}:
        if epoch != first or first % step == 0 or step - first % step > step / 2:
            x = scale.x(epoch)
            draw.line((x, _BOTTOM, x, _BOTTOM + 4), fill=_INK)
            draw.text((x, _BOTTOM + 7), str(epoch), fill=_INK, font=font(), anchor="ma")
    draw.line((_LEFT, _TOP, _LEFT, _BOTTOM, _RIGHT, _BOTTOM), fill=_INK)
    middle = (_LEFT + _RIGHT) // 2
    draw.text((middle, _BOTTOM + 26), "epoch", fill=_INK, font=font(), anchor="ma")
    label = "loss (logarithmic)" if scale.logarithmic else "loss"
    width = math.ceil(font().getlength(label)) + 2
    written = PIL.Image.new("RGB", (width, 16), _PAPER)
    PIL.ImageDraw.Draw(written).text((1, 1), label, fill=_INK, font=font())
    picture.paste(written.rotate(90, expand=True), (8, (_TOP + _BOTTOM - width) // 2))


def _step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def _loss_ticks(scale: Axes) -> list[float]:
    if not scale.logarithmic:
        step = _step((scale.high - scale.low) / 5)
        first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
        return [index * step for index in range(first, last + 1)]
    decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    factors = (1, 2, 5) if len(decades) < 5 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if scale.low <= tick <= scale.high]
