"""What does privacy cost in images? A public start, few trained weights, and epsilon by epsilon.

    python -m bench privacy --data MedNIST --private Hand --work trials

A small rectified flow is trained at 32x32 on all classes of a folder but one, which are the public
images. From there it is trained on that one class, the private images: without privacy, and with
epsilon 10, 3 and 1. Of the network only the weights that --freeze leaves are trained, as the noise
grows with their number. Each draws images, which are judged on a fifth of the private images that
nothing was trained on: in the features of EfficientNet-Lite0, and by a classifier of real images.
Trials that are done are kept in --work.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from bench import recognition
from bench.quality import MEASURES

CONFIG: Mapping[str, Any] = {
    "data": {"size": [32, 32], "num_workers": 0, "intensity_range": [0, 255]},
    "model": {
        "name": "rectified_flow", "channels": [16, 32, 64], "wavelet_levels": 0,
        "attention_from": 2,
        "optimizer": {"lr": 2e-3, "betas": [0.9, 0.99]}, "scheduler": {"warmup_steps": 20},
    },
    "training": {"batch_size": 8, "sample_every_n_epochs": 0},
    "compute": {"accelerator": "cpu"},
}  # fmt: skip
# Norms, biases and the two ends are trained.
FREEZE = (
    "network.*blocks.*conv.weight", "network.middle_block.*conv.weight", "network.*attn.*weight",
    "network.*proj.weight", "network.time_embed.*weight",
)  # fmt: skip
EPSILONS = (10.0, 3.0, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench privacy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--private", required=True, help="the class whose images are private")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--public_images", type=int, default=400, help="of each public class")
    parser.add_argument("--public_epochs", type=int, default=16)
    parser.add_argument("--freeze", nargs="*", default=FREEZE, help="patterns of names")
    parser.add_argument("--epochs", type=int, default=20, help="of the private trainings")
    parser.add_argument("--lr", type=float, default=1e-2, help="of few weights")
    parser.add_argument("--draws", type=int, default=1, help="as training.privacy.draws")
    parser.add_argument("--images", type=int, default=200, help="to draw and to judge")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    num_private = write_lists(options)
    public = options.work / "public"
    results = {"public start": trial(options, public, "public.csv", [
        f"training.max_epochs={options.public_epochs}",
    ])}  # fmt: skip
    start = f"training.start_from={public}"
    results["all weights, not private"] = trial(
        options, options.work / "all-weights", "private.csv",
        [start, f"training.max_epochs={options.epochs}", "data.validation_fraction=0"],
    )  # fmt: skip
    few = [
        start, f"training.freeze={json.dumps([*options.freeze])}",
        f"training.batch_size={num_private // 4}", f"training.max_epochs={options.epochs}",
        f"model.optimizer.lr={options.lr}", "data.validation_fraction=0",
        "model.scheduler.warmup_steps=2",
    ]  # fmt: skip
    results["few weights, not private"] = trial(
        options, options.work / "few-weights", "private.csv", few
    )
    for epsilon in EPSILONS:
        privacy = (
            f"training.privacy={{epsilon: {epsilon}, draws: {options.draws}, images_at_once: 30}}"
        )
        results[f"few weights, epsilon {epsilon:g}"] = trial(
            options, options.work / f"epsilon-{epsilon:g}", "private.csv", [*few, privacy]
        )
    recognise(options, results)
    print(table(results))
    return 0


def write_lists(options: argparse.Namespace) -> int:
    """Write public.csv, private.csv and judge.csv; returns the number of private images."""
    from synthcube.data.images import image_fault

    lines = {name: ["SubjectID,Channel_0"] for name in ("public", "private", "judge")}
    for folder in sorted(path for path in options.data.iterdir() if path.is_dir()):
        paths = (path for path in sorted(folder.iterdir()) if not image_fault(path))
        is_private = folder.name == options.private
        for number, path in enumerate(islice(paths, None if is_private else options.public_images)):
            kind = "public" if not is_private else "judge" if number % 5 == 4 else "private"
            lines[kind].append(f"{folder.name}-{path.stem},{path.resolve()}")
    for kind, rows in lines.items():
        (options.work / f"{kind}.csv").write_text("\n".join(rows) + "\n")
    return len(lines["private"]) - 1


def trial(
    options: argparse.Namespace, run: Path, data: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Train, draw and judge; its last act is to write the results."""
    from synthcube.tasks.evaluate import evaluate
    from synthcube.tasks.infer import InferRequest, infer
    from synthcube.tasks.train import train

    path, drawn = run.with_name(f"{run.name}.yaml"), run.with_name(f"{run.name}-drawn")
    if not path.exists():
        train(CONFIG, options.work / data, run, overrides=overrides)
        shutil.rmtree(drawn, ignore_errors=True)
        infer(InferRequest(run, drawn, num_images=options.images))
        evaluate(
            drawn, options.work / "judge.csv", path,
            config_path={**CONFIG, "evaluation": {"usefulness": False}},
        )  # fmt: skip
    result: dict[str, Any] = yaml.safe_load(path.read_text())
    budget = run / "artifact" / "privacy.json"
    result["drawn"] = str(drawn)
    result["sigma"] = json.loads(budget.read_text())["sigma"] if budget.exists() else None
    return result


def recognise(options: argparse.Namespace, results: Mapping[str, dict[str, Any]]) -> None:
    """Add the share of drawn images that a classifier of real ones takes for the private class."""
    side = CONFIG["data"]["size"][0]
    classes, halves, network = recognition.classifier(options.data, side=side)
    index = classes.index(options.private)

    def share(images: torch.Tensor) -> float:
        return (network(images).argmax(1) == index).float().mean().item()

    real = share(halves[index][1::2])
    for result in results.values():
        drawn = recognition.pictures(Path(result["drawn"]) / "images", side)
        result["recognised"] = {"value": share(drawn), "real_baseline": real}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a row for each training, then what real images reach."""
    heads = ["sigma", *(name.replace("_", " ") for name in MEASURES), "recognised"]
    lines = [f"| training | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name, result in results.items():
        entries = [*(result["fidelity"][key] for key in MEASURES), result["recognised"]]
        cells = [_number(result["sigma"]), *(_number(entry["value"]) for entry in entries)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    real = [_number(entry.get("real_baseline")) for entry in entries]
    lines.append(f"| real images | | {' | '.join(real)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
