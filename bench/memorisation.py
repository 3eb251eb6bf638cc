"""After how many passes over its images does a model copy them? A row for each number of images.

    python -m bench memorisation --data MedNIST/Hand --work trials --numbers 50 150 500

A small rectified flow is trained at 32x32 with a constant learning rate on the first images of a
folder, and validated on the last hundred. Each 250 steps it draws 32 images with its averaged
weights; a training ends when more than a tenth of them are copies of training images, as with
`training.early_stop: {metric: copies}`, or after --most_steps. Trainings are kept in --work, and
the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

CONFIG: Mapping[str, Any] = {
    "data": {"size": [32, 32], "num_workers": 0},
    "model": {
        "name": "rectified_flow", "channels": [16, 32, 64], "refinement_channels": 8,
        "scheduler": {"name": "constant_with_warmup", "warmup_steps": 20},
    },
    "training": {
        "batch_size": 8, "sample_every_n_epochs": 0, "early_stop": {"metric": "copies"},
    },
    "compute": {"accelerator": "cpu"},
}  # fmt: skip
_HELD_OUT = 100
_STEPS_BETWEEN = 250


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with each number of images, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench memorisation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--numbers", type=int, nargs="+", default=[50, 150, 500, 1500])
    parser.add_argument("--most_steps", type=int, default=20_000, help="of each training")
    parser.add_argument("--passes", type=int, help="most passes over the images")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the config")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    print("| training images | steps | passes | drawn copies | validation loss | lowest, after |")
    print("| --- " * 6 + "|")
    for number in options.numbers:
        print(trained(options, number), flush=True)
    return 0


def trained(options: argparse.Namespace, number: int) -> str:
    """The row of a training on so many images."""
    from synthcube.tasks.train import train

    data, run = options.work / f"{number}.csv", options.work / f"{number}"
    write_list(options.data, data, number)
    steps = max(1, number // CONFIG["training"]["batch_size"])  # of an epoch
    every = max(1, round(min(_STEPS_BETWEEN, options.most_steps) / steps))
    epochs = max(1, round(options.most_steps / steps / every)) * every
    if options.passes:
        epochs = min(epochs, math.ceil(options.passes / every) * every)
    train(
        CONFIG, data, run,
        overrides=[
            f"training.max_epochs={epochs}", f"training.validate_every_n_epochs={every}",
            *options.set,
        ],
    )  # fmt: skip
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["validation/copies"]]
    last, best = rows[-1], min(rows, key=lambda row: float(row["validation/loss"]))
    copies = float(last["validation/copies"])
    return (
        f"| {number} | {last['step']} | {last['epoch']} | {copies:.2f} "
        f"| {float(last['validation/loss']):.3f} "
        f"| {float(best['validation/loss']):.3f}, {best['epoch']} passes |"
    )


def write_list(folder: Path, path: Path, number: int) -> None:
    """The first images of a folder to train on, and its last to validate."""
    from synthcube.data.images import image_fault

    images = [image for image in sorted(folder.iterdir()) if not image_fault(image)]
    lines = ["SubjectID,Channel_0,Split"]
    for split, chosen in (
        ("train", islice(images, min(number, len(images) - _HELD_OUT))),
        ("validation", images[-_HELD_OUT:]),
    ):
        lines += [f"{image.stem},{image.resolve()},{split}" for image in chosen]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
