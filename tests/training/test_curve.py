"""curve.png: every loss is where the axes say."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import PIL.Image
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from synthcube.training import curve
from synthcube.training.metrics import MetricsTable

LOSSES = {
    "train": [(1, 0.9), (2, 0.5), (3, 0.4), (4, 0.3)],
    "validation": [(2, 0.7), (4, 0.62)],
}
AREA = (slice(34, 369), slice(76, 701))  # of the plot


def coloured(pixels: np.ndarray, name: str) -> np.ndarray:
    return (pixels == curve.COLOURS[name]).all(axis=-1)


def test_every_point_is_where_its_number_says() -> None:
    pixels = np.asarray(curve.drawn(LOSSES))
    assert pixels.shape == (420, 720, 3)
    for name, points in LOSSES.items():
        for epoch, loss in points:
            # from 76 to 700 for epochs 1 to 4; 0.6 of loss and a twentieth on either side
            x = round(76 + (epoch - 1) / 3 * 624)
            y = round(368 - (loss - 0.27) / 0.66 * 334)
            assert coloured(pixels, name)[y - 1 : y + 2, x - 1 : x + 2].all(), (name, epoch)
        assert coloured(pixels, name)[:34].any(), "the legend"
    assert not coloured(pixels, "validation")[AREA][:, :200].any(), "none before epoch 2"


def test_losses_far_apart_are_shown_by_their_logarithm() -> None:
    points = {"train": [(1, 100.0), (2, 1.0), (3, 0.01)], "validation": []}
    scale = curve.axes(points)
    assert scale.logarithmic
    assert abs((scale.y(100.0) + scale.y(0.01)) / 2 - scale.y(1.0)) <= 1
    pixels = np.asarray(curve.drawn(points))
    assert coloured(pixels, "train")[scale.y(1.0), scale.x(2)]
    assert not coloured(pixels, "validation").any()
    assert not curve.axes({"train": [(1, -5.0), (2, 100.0)]}).logarithmic


def test_axes_have_numbers_and_names() -> None:
    dark = (np.asarray(curve.drawn(LOSSES)) < 120).all(axis=-1)
    assert dark[160:240, :24].any(), "loss"
    assert dark[385:, 370:410].any(), "epoch"
    assert dark[34:369, 40:70].any(), "numbers of losses"
    for x in (76, 284, 492, 700):
        assert dark[374:388, x - 6 : x + 7].any(), "numbers of epochs"
    assert not dark[:, :4].any(), "nothing is cut off"
    assert not dark[:, -4:].any(), "nothing is cut off"


@pytest.mark.parametrize("epochs", [1, 2, 7, 100, 12345])
@pytest.mark.parametrize("scale", [1e-9, 1, 3e8])
def test_any_training_can_be_drawn(epochs: int, scale: float) -> None:
    step = max(1, epochs // 500)
    points = [(n, scale * (1 + 1 / n)) for n in range(1, epochs + 1, step)]
    dark = (np.asarray(curve.drawn({"train": points})) < 120).all(axis=-1)
    assert not dark[:, :6].any()
    assert not dark[:, -4:].any()


def test_rows_of_the_table_become_epochs_from_one(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    curve.draw_losses(table)
    assert not (tmp_path / "curve.png").exists(), "nothing to draw yet"
    table.log_metrics({"train/loss_now": 9.0}, 1)
    for epoch, loss in enumerate((0.5, math.nan, 0.25)):
        table.log_metrics({"epoch": epoch, "validation/loss": loss + 1}, epoch + 1)
        table.log_metrics({"epoch": epoch, "train/loss": loss}, epoch + 1)
    losses = curve.read_losses(table.rows())
    assert losses == {"train": [(1, 0.5), (3, 0.25)], "validation": [(1, 1.5), (3, 1.25)]}
    curve.draw_losses(table)
    with PIL.Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(curve.drawn(losses)))


def test_the_curve_is_drawn_again_while_a_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = MetricsTable(tmp_path / "metrics.csv")
    drawing = curve.LossCurve(table)
    trainer = pl.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path,
        plugins=[LightningEnvironment()],
    )  # fmt: skip
    table.log_metrics({"epoch": 0, "train/loss": 1.0}, 1)
    drawing.on_train_epoch_end(trainer, pl.LightningModule())
    assert not (tmp_path / "curve.png").exists(), "less than half a minute has passed"
    monkeypatch.setattr(curve.time, "monotonic", lambda: drawing._last + 31)
    drawing.on_train_epoch_end(trainer, pl.LightningModule())
    assert (tmp_path / "curve.png").exists()
