"""Which recipe makes the better images of the same CPU-seconds? Trials, a table and pictures.

    python -m bench quality --data MedNIST/Hand --work trials \\
        --recipe "default" --recipe "fast: model.optimizer.lr=2e-3 training.batch_size=8"

Each recipe is a name and the keys in which it differs from the tool's defaults. It is trained by
the tool itself on one thread until the process has used --seconds of CPU, draws --images images,
and is judged against real images of other subjects that no recipe trains on. A trial that is done
is kept in --work and not repeated; the same command goes on after a kill.

On a machine that does other work, a CPU-second is worth more or less from minute to minute. With
--steps N in place of --seconds, each recipe takes as many steps as cost what N steps of the first
recipe cost, by steps of all recipes that are timed in turns before the trials.

The features are those of EfficientNet-Lite0; beside each value stands that of real images against
real ones, and with several --seed values the range over the trials. `spectrum` is the mean absolute
difference of the logarithms (base 10) of the radial power spectra, of volumes each divided by its
standard deviation. Volumes need three numbers for --size; the features see their middle planes.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

from bench import recognition
from bench.process import one_thread

MEASURES = ("kernel_distance", "precision", "recall", "coverage")
_HELD_BACK = 0.2  # share of the subjects that judge, and that no recipe sees
_SHEET_IMAGES = 12
_ROUNDS = 3  # in which the steps of all recipes are timed


@dataclass(frozen=True)
class Recipe:
    """A name, and the keys of the YAML that differ from the defaults."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Recipe:
        name, _, words = text.partition(":")
        return cls(name.strip(), tuple(words.split()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials that are not done yet, and print the table of all."""
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of images, or a CSV")
    parser.add_argument("--paradigm", default="unlabeled", help="as of synthcube prepare")
    parser.add_argument("--recipe", action="append", default=[], help="NAME: KEY=VALUE ...")
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU-seconds of a training")
    parser.add_argument("--steps", type=int, help="the cost of so many steps of the first recipe")
    parser.add_argument("--images", type=int, default=500, help="images to draw and to judge")
    parser.add_argument("--seed", type=int, action="append", help="repeatable (0)")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 64])
    parser.add_argument("--work", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    recipes = [Recipe.parse(text) for text in options.recipe or ["default"]]
    if options.time:
        time_steps(options, recipes)
        return 0
    if options.trial:
        run_trial(options, recipes[0], int(options.trial))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    split(options)
    command_line = [*(arguments or sys.argv[2:])]
    if options.steps and not set(recipe_costs(options)) >= {recipe.name for recipe in recipes}:
        command = [sys.executable, "-m", "bench.quality", *command_line, "--time"]
        subprocess.run(command, check=True, env=one_thread())
    results: dict[str, list[dict[str, Any]]] = {recipe.name: [] for recipe in recipes}
    for seed in options.seed or [0]:  # recipes take turns, so that all see the same machine
        for recipe in recipes:
            folder = trial_folder(options, recipe, seed)
            if not (folder / "result.json").exists():
                words = [*command_line, "--trial", str(seed)]
                chosen = ["--recipe", f"{recipe.name}: {' '.join(recipe.overrides)}"]
                command = [sys.executable, "-m", "bench.quality", *_without(words), *chosen]
                subprocess.run(command, check=True, env=one_thread())
            results[recipe.name].append(json.loads((folder / "result.json").read_text()))
    print(table(results))
    folders = [trial_folder(options, recipe, 0) for recipe in recipes]
    sheet(folders, options.size, options.work / "sheet.png")
    return 0


def _without(words: Sequence[str]) -> list[str]:
    """The command line without its recipes."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--recipe":
            kept.append(word)
        skip = word == "--recipe"
    return kept


def trial_folder(options: argparse.Namespace, recipe: Recipe, seed: int) -> Path:
    budget = f"{options.steps}steps" if options.steps else f"{options.seconds:g}s"
    return Path(options.work) / f"{recipe.name}-{budget}-seed{seed}"


def recipe_costs(options: argparse.Namespace) -> dict[str, float]:
    """CPU-seconds of a step of each recipe, as far as they are timed."""
    path = options.work / "steps.json"
    return json.loads(path.read_text()) if path.exists() else {}


def time_steps(options: argparse.Namespace, recipes: Sequence[Recipe]) -> None:
    """Time steps of all recipes in turns, and write their medians in CPU-seconds."""
    import torch

    from synthcube import config
    from synthcube.planning import cost
    from synthcube.planning.draft import machine
    from synthcube.schema import ImageSpec

    torch.set_num_threads(1)
    on_cpu = [f"data.size={options.size}", "compute.accelerator=cpu"]
    image = ImageSpec(
        size=options.size, channels=1, spacing_mm=(1, 1, 1), intensity_range=((0, 255),),
        affine=tuple(tuple(float(i == j) for j in range(4)) for i in range(4)), file_format="png",
    )  # fmt: skip
    times: dict[str, list[float]] = {recipe.name: [] for recipe in recipes}
    for _ in range(_ROUNDS):
        for recipe in recipes:
            settings = config.build({}, [*on_cpu, *recipe.overrides])
            where = machine(settings.compute, None)
            times[recipe.name].append(cost.probe(settings, image, where).process_step)
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    (options.work / "steps.json").write_text(json.dumps(medians, indent=1))
    first = medians[recipes[0].name]
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.3f} CPU-s a step, {seconds / first:.3f} of {recipes[0].name}")


def num_epochs(options: argparse.Namespace, recipe: Recipe) -> int:
    """The epochs that cost what --steps of the first recipe cost."""
    from synthcube import config

    costs, settings = recipe_costs(options), config.build({}, recipe.overrides)
    steps = options.steps * next(iter(costs.values())) / costs[recipe.name]
    with (options.work / "train.csv").open(newline="") as file:
        images = len(list(csv.DictReader(file))) * (1 - settings.data.validation_fraction)
    return max(1, round(steps / (images // settings.training.batch_size)))


def split(options: argparse.Namespace) -> None:
    """Write train.csv and judge.csv into the work folder: other subjects, the same for all."""
    from synthcube.data.images import image_fault
    from synthcube.data.preparation import prepare

    if (options.work / "judge.csv").exists():
        return
    prepared = prepare(
        options.data, options.work / "all.csv", paradigm=options.paradigm, test=_HELD_BACK,
        fault_of=image_fault,
    )  # fmt: skip
    with prepared.manifest_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train", "judge"):  # the judge last: its file says that both are there
        chosen = [row for row in rows if (row["Split"] == "test") == (name == "judge")]
        with (options.work / f"{name}.csv").open("w", newline="") as file:
            columns = [column for column in rows[0] if column != "Split"]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(chosen)


def run_trial(options: argparse.Namespace, recipe: Recipe, seed: int) -> None:
    """Train, draw and judge once, in this process; its last act is to write result.json."""
    from lightning.pytorch.callbacks import timer

    from synthcube.tasks.evaluate import evaluate
    from synthcube.tasks.infer import InferRequest, infer
    from synthcube.tasks.train import train
    from synthcube.training import checkpoints

    # CPU-seconds in place of a clock: other work on the machine changes nothing.
    timer.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[attr-defined]
    folder = trial_folder(options, recipe, seed)
    run, drawn = folder / "run", folder / "drawn"
    shutil.rmtree(drawn, ignore_errors=True)
    if options.steps:  # a training that was stopped goes on
        epochs = num_epochs(options, recipe)
        length = {"max_epochs": epochs, "validate_every_n_epochs": max(1, epochs // 4)}
    else:
        shutil.rmtree(run, ignore_errors=True)
        length = {
            "max_epochs": 100_000, "max_minutes": options.seconds / 60,
            "validate_every_n_epochs": 10, "checkpoint_every_n_minutes": None,
        }  # fmt: skip
    config = {
        "seed": seed,
        "data": {"size": options.size, "num_workers": 0},
        "training": {"sample_every_n_epochs": 0, **length},
    }
    if options.paradigm == "custom":
        config["data"] |= {"conditions": {"Label": "class"}}  # type: ignore[operator]
    train(config, options.work / "train.csv", run, overrides=recipe.overrides)
    begun = time.process_time()
    infer(InferRequest(run, drawn, num_images=number_of_images(options)))
    sampling = (time.process_time() - begun) / options.images
    evaluate(
        drawn, options.work / "judge.csv", folder / "results.yaml",
        config_path={"evaluation": {"usefulness": False}}, train_data=options.work / "train.csv",
    )  # fmt: skip
    results = yaml.safe_load((folder / "results.yaml").read_text())
    judge = intensities(options.work / "judge.csv", options.size)
    half = len(judge) // 2
    result = {
        "recipe": recipe.name, "overrides": recipe.overrides, "seed": seed,
        "cpu_seconds": (
            options.steps * next(iter(recipe_costs(options).values()))
            if options.steps
            else options.seconds
        ),
        "steps": checkpoints.reached(run / "checkpoints" / "last.ckpt")[1],
        "loss": last_loss(run),
        "seconds_per_image": sampling,
        **{name: results["fidelity"][name] for name in MEASURES},
        "spectrum": {
            "value": spectrum_error(intensities(drawn / "manifest.csv", options.size), judge),
            "real_baseline": spectrum_error(judge[:half], judge[half:]),
        },
        "copies": {
            name: {"value": entry["value"], "real_baseline": entry.get("real_baseline")}
            for name, entry in results.get("memorisation", {}).items()
            if isinstance(entry, dict) and "value" in entry
        },
    }  # fmt: skip
    if options.paradigm == "custom":
        result["recognised"] = recognition.recognised(options.data, drawn, options.size[0])
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def number_of_images(options: argparse.Namespace) -> int | str:
    """As `infer -n` takes it: so many in all, as many of each class."""
    if options.paradigm != "custom":
        return int(options.images)
    with (options.work / "train.csv").open(newline="") as file:
        classes = sorted({row["LabelMapping"] for row in csv.DictReader(file)})
    return ",".join(f"{name}={max(1, options.images // len(classes))}" for name in classes)


def last_loss(run: Path) -> float | None:
    """The validation loss of the last epoch, of the averaged weights; a private run has none."""
    path = run / "metrics.csv"
    if not path.exists():
        return None
    with path.open(newline="") as file:
        losses = [loss for row in csv.DictReader(file) if (loss := row.get("validation/loss"))]
    return float(losses[-1]) if losses else None


def intensities(manifest: Path, size: Sequence[int]) -> np.ndarray:
    """(N, *size): of pictures the grey values from 0 to 1, of volumes with a deviation of 1."""
    with manifest.open(newline="") as file:
        paths = [manifest.parent / row["Channel_0"] for row in csv.DictReader(file)]
    return np.stack([_image(path, size) for path in paths])


def _image(path: Path, size: Sequence[int]) -> np.ndarray:
    if len(size) == 2:
        grey = Image.open(path).convert("L").resize((size[1], size[0]))
        return np.asarray(grey).astype(np.float64) / 255
    voxels = nibabel.load(path).get_fdata()
    zoom = [side / length for side, length in zip(size, voxels.shape, strict=True)]
    resized: np.ndarray = ndimage.zoom(voxels, zoom, order=1)
    return resized / resized.std()


def spectrum_error(images: np.ndarray, others: np.ndarray) -> float:
    """Mean absolute difference of log10 of the radial power spectra of two sets (N, *size)."""
    return float(np.abs(_radial_power(images) - _radial_power(others)).mean())


def _radial_power(images: np.ndarray) -> np.ndarray:
    size = images.shape[1:]
    axes = tuple(range(1, images.ndim))
    centred = images - images.mean(axis=axes, keepdims=True)
    power = (np.abs(np.fft.fftn(centred, axes=axes)) ** 2).mean(axis=0)
    frequencies = np.meshgrid(*(np.fft.fftfreq(side) * side for side in size), indexing="ij")
    rings = np.rint(np.linalg.norm(frequencies, axis=0)).astype(int)
    highest = min(size) // 2
    sums = np.bincount(rings.ravel(), power.ravel())[1 : highest + 1]
    counts = np.bincount(rings.ravel())[1 : highest + 1]
    return np.log10(sums / counts + 1e-12)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: a row for each recipe, means over its seeds, then the real baseline."""
    names = [*MEASURES, "spectrum"]
    first = next(iter(results.values()))[0]
    shares = ["mean", "worst"] if "recognised" in first else []
    heads = [
        "recipe", "steps", "loss", *(name.replace("_", " ") for name in names),
        *(f"recognised, {name}" for name in shares), "images per CPU-s",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, trials in results.items():
        cells = [_mean([trial["steps"] for trial in trials], ".0f")]
        cells += [_mean([trial["loss"] for trial in trials], ".4f")]
        cells += [_mean([trial[key].get("value") for trial in trials], ".3g") for key in names]
        cells += [_mean([trial["recognised"][key] for trial in trials], ".3f") for key in shares]
        cells += [_mean([1 / trial["seconds_per_image"] for trial in trials], ".2f")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [_mean([first[key].get("real_baseline")], ".3g") for key in names]
    cells += [_mean([first["recognised"][f"real_{key}"]], ".3f") for key in shares]
    lines.append(f"| real images | | | {' | '.join(cells)} | |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None], form: str) -> str:
    values = [value for value in values if value is not None]  # too few images for a measure
    if not values:
        return "-"
    mean = format(float(np.mean(values)), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def sheet(folders: Sequence[Path], size: Sequence[int], path: Path) -> None:
    """Draw the first images of each trial, a row for each, all of the same seeds.

    Of a volume it is the middle slice along its last axis, the upper side towards the front.
    """
    rows = []
    for folder in folders:
        if (folder / "drawn" / "manifest.csv").exists():
            drawn = intensities(folder / "drawn" / "manifest.csv", size)[:_SHEET_IMAGES]
            if len(size) == 3:
                middle = drawn[..., size[2] // 2].swapaxes(1, 2)[:, ::-1]
                drawn = (middle - middle.min()) / np.percentile(middle - middle.min(), 99.5)
            rows.append(np.hstack([*(255 * drawn.clip(0, 1)).round().astype(np.uint8)]))
    if rows:
        Image.fromarray(np.vstack(rows)).save(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
