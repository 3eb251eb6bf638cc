"""Is a federation as good as a training on all images? Trials and a table.

    python -m bench federation --data MedNIST --work trials --epochs 24

A training on all images is compared with federations of as many sites as there are classes: sites
that are alike, and sites of one class each, which are the least alike that there can be. All have
the same config. They draw images of every class, which are judged on images that none of them saw:
in the features of EfficientNet-Lite0, and by a classifier that is trained on generated images and
tested on real ones. Trials that are done are kept in --work.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from bench.quality import MEASURES

CONFIG: Mapping[str, Any] = {
    "data": {"size": [32, 32], "conditions": {"Label": "class"}, "num_workers": 0},
    "model": {
        "name": "rectified_flow", "channels": [16, 32, 64], "wavelet_levels": 0,
        "attention_from": 2, "optimizer": {"lr": 2e-3, "betas": [0.9, 0.99]},
        "scheduler": {"warmup_steps": 20},
    },
    "training": {"batch_size": 8, "sample_every_n_epochs": 0, "validate_every_n_epochs": 4},
    "compute": {"accelerator": "cpu"},
}  # fmt: skip


@dataclass(frozen=True)
class Federation:
    """How the images are divided, and how often the sites are averaged."""

    local_epochs: int = 1
    by_class: bool = True


ARMS: Mapping[str, Federation | None] = {
    "one training on all": None,
    "alike, averaged each epoch": Federation(by_class=False),
    "a class each, averaged each epoch": Federation(),
    "a class each, every fourth epoch": Federation(local_epochs=4),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the arms that are not trained yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench federation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--classes", nargs="+", help="those of the folder (all)")
    parser.add_argument("--number", type=int, default=250, help="images of a class, a fifth judges")
    parser.add_argument("--epochs", type=int, default=24, help="passes over the images")
    parser.add_argument("--images", type=int, default=100, help="images to draw of each class")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    classes = split(options)
    results = {}
    for name, federation in ARMS.items():
        folder = options.work / name.replace(",", "").replace(" ", "-")
        if not (folder / "results.yaml").exists():
            train_and_draw(options, folder, classes, federation)
        results[name] = yaml.safe_load((folder / "results.yaml").read_text())
    print(table(results))
    return 0


def split(options: argparse.Namespace) -> list[str]:
    """Write train.csv and judge.csv; returns the classes."""
    from synthcube.data.images import image_fault

    classes: list[str] = options.classes or [p.name for p in options.data.iterdir() if p.is_dir()]
    classes.sort()
    lines = {name: ["SubjectID,Channel_0,Label"] for name in ("train", "judge")}
    for name in classes:
        paths = (path for path in sorted((options.data / name).iterdir()) if not image_fault(path))
        for number, path in enumerate(islice(paths, options.number)):
            kind = "judge" if number % 5 == 4 else "train"
            lines[kind].append(f"{name}-{path.stem},{path.resolve()},{name}")
    for kind, rows in lines.items():
        (options.work / f"{kind}.csv").write_text("\n".join(rows) + "\n")
    return classes


def train_and_draw(
    options: argparse.Namespace, folder: Path, classes: Sequence[str], federation: Federation | None
) -> None:
    """One arm; its last act is to write results.yaml. A training that was stopped goes on."""
    from synthcube.tasks.evaluate import evaluate
    from synthcube.tasks.federate import simulate
    from synthcube.tasks.infer import InferRequest, infer
    from synthcube.tasks.train import train

    data, run, drawn = options.work / "train.csv", folder / "run", folder / "drawn"
    if federation:
        sites: dict[str, Any] = (
            {"site_column": "Label"} if federation.by_class else {"sites": len(classes)}
        )
        local_epochs = federation.local_epochs
        simulate(
            CONFIG, data, run, num_rounds=options.epochs // local_epochs,
            local_epochs=local_epochs, **sites,
        )  # fmt: skip
    else:
        train(CONFIG, data, run, overrides=[f"training.max_epochs={options.epochs}"])
    shutil.rmtree(drawn, ignore_errors=True)
    number = ",".join(f"{name}={options.images}" for name in classes)
    infer(InferRequest(run, drawn, num_images=number))
    evaluate(
        drawn, options.work / "judge.csv", folder / "results.yaml", config_path=CONFIG,
        train_data=data,
    )  # fmt: skip


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a row for each arm, then what real images reach."""
    heads = [*(name.replace("_", " ") for name in MEASURES), "usefulness"]
    lines = [f"| training | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name, result in results.items():
        entries = [
            *(result["fidelity"][key] for key in MEASURES),
            result["usefulness"]["accuracy_synthetic"],
        ]
        lines.append(f"| {name} | {' | '.join(_number(entry['value']) for entry in entries)} |")
    real = [_number(entry.get("real_baseline")) for entry in entries]
    lines.append(f"| real images | {' | '.join(real)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
