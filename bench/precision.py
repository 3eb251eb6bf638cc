"""Whether training in bfloat16 costs quality: validation losses beside those in float32."""

from __future__ import annotations

import csv
import io
from contextlib import redirect_stderr
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from bench.process import apart
from bench.report import Options, Row

PRECISIONS = {"32": (40, 90, 200), "bf16": (220, 110, 20)}  # colour of its lines
SIDE, BATCH_SIZE = 32, 16
WIDTH, HEIGHT, MARGIN = 640, 400, 40

Curves = dict[str, list[list[float]]]


def measure(options: Options) -> list[Row]:
    num_seeds, num_epochs, num_images = (1, 2, 40) if options.quick else (3, 12, 480)
    curves: Curves = {name: [] for name in PRECISIONS}
    for seed in range(num_seeds):
        for name, runs in curves.items():
            runs.append(apart(validation_losses, name, seed, num_epochs, num_images))
    if options.output:
        draw(curves, options.output)
    rows = [
        Row(
            f"precision: validation loss of each epoch, {name}, seed {seed}",
            losses[-1],
            " ".join(f"{loss:.5f}" for loss in losses),
        )
        for name, runs in curves.items()
        for seed, losses in enumerate(runs)
    ]
    full, mixed = (mean(losses[-1] for losses in curves[name]) for name in PRECISIONS)
    shown = f"{mixed / full:.4f} ({mixed:.5f} against {full:.5f})"
    return [*rows, Row("precision: last loss in bf16 over that in fp32", mixed / full, shown)]


def validation_losses(precision_name: str, seed: int, epochs: int, num_images: int) -> list[float]:
    """Train the default family on phantoms; the loss of every validation."""
    import torch

    from synthcube import compute, environment
    from synthcube.data.manifest import read_manifest
    from synthcube.data.module import DataModule
    from synthcube.data.phantom import write_phantoms
    from synthcube.data.preprocessing import DataConfig
    from synthcube.models import registry
    from synthcube.training import TrainingConfig, TrainingRun, fit

    device = torch.device("cpu")
    precision, _ = compute.resolve_precision(precision_name, device)
    with TemporaryDirectory() as name, redirect_stderr(io.StringIO()):  # no progress bar
        folder = Path(name)
        images = write_phantoms(folder / "images", num=num_images, size=(SIDE, SIDE))
        data = DataModule(
            read_manifest(images), DataConfig(), batch_size=BATCH_SIZE, seed=seed,
            cache=folder / "cache",
        )  # fmt: skip
        torch.manual_seed(environment.derived_seed(seed, "weights"))
        family = registry.find(registry.DEFAULT)(name=registry.DEFAULT).build(data.image)
        training = TrainingConfig(max_epochs=epochs, sample_every_n_epochs=0)
        place = compute.ComputeConfig(accelerator="cpu")
        fit(family, TrainingRun(data, training, place, folder, seed, precision, device))
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            losses = [row.get("validation/loss") for row in csv.DictReader(file)]
    return [float(loss) for loss in losses if loss]


def draw(curves: Curves, path: Path) -> None:
    """A plot of all curves, one colour for each precision."""
    from PIL import Image, ImageDraw

    losses = [loss for runs in curves.values() for curve in runs for loss in curve]
    low, high = min(losses), max(losses)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline="black")
    pen.text((4, MARGIN), f"{high:.3f}", fill="black")
    pen.text((4, HEIGHT - MARGIN - 10), f"{low:.3f}", fill="black")
    pen.text((WIDTH // 2 - 40, HEIGHT - MARGIN + 12), "validations", fill="black")
    for place, (name, runs) in enumerate(curves.items()):
        pen.text((MARGIN + 100 * place, 14), name, fill=PRECISIONS[name])
        for curve in runs:
            pen.line(_points(curve, low, high), fill=PRECISIONS[name], width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _points(curve: list[float], low: float, high: float) -> list[tuple[float, float]]:
    across = (WIDTH - 2 * MARGIN) / max(len(curve) - 1, 1)
    down = (HEIGHT - 2 * MARGIN) / ((high - low) or 1)
    return [
        (MARGIN + index * across, MARGIN + (high - loss) * down) for index, loss in enumerate(curve)
    ]
