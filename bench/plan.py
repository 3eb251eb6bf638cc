"""Does a plan keep its word? Memory, time and images of planned trainings, on eight data sets.

    python -m bench plan --pictures MedNIST --volumes VOLUMES --work trials --minutes 3

For each data set `synthcube plan` chooses the settings of a training that takes about --minutes. It
is trained without an edit: its time and its peak of memory stand beside those that the plan named,
and its CPU-seconds, as the time is that of the other work on the machine too.
A config that somebody wrote for such images is trained for as many CPU-seconds. Both draw images,
which are judged on images that neither saw, in the features of EfficientNet-Lite0. These do not
tell noise from bad images, so the last losses of the images that validate stand beside them; they
compare where both configs have the same size. Where images have classes, a small classifier of real
pictures says which share of the drawn ones is of the class asked for, on average and of the worst
class. Results are kept in --work, and the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from bench import recognition
from bench.plan_sets import DataSet, data_sets
from bench.process import apart, one_thread
from bench.quality import MEASURES, last_loss
from synthcube.planning.draft import LIBRARY_BYTES

_FIRST_BUDGET = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--volumes", type=Path, required=True, help="folder of volumes")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each training")
    parser.add_argument(
        "--images", type=int, default=100, help="to draw and to judge; 0: time and memory alone"
    )
    names = [data_set.name for data_set in data_sets()]
    parser.add_argument("--sets", nargs="+", choices=names, default=names, help="which sets (all)")
    options = parser.parse_args(arguments)
    results = {}
    for data_set in data_sets():
        if data_set.name in options.sets:
            folder = options.work / data_set.name.replace(" ", "-")
            if not (folder / "result.json").exists():
                run_set(options, data_set, folder)
            results[data_set.name] = json.loads((folder / "result.json").read_text())
            losses = [last_loss(folder / name) for name in ("planned", "by-hand")]
            results[data_set.name]["losses"] = losses
    print(table(results))
    return 0


def run_set(options: argparse.Namespace, data_set: DataSet, folder: Path) -> None:
    """Plan, train and judge; its last act is to write result.json."""
    if not (folder / "written").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        data_set.write(folder, options.pictures, options.volumes)
        (folder / "written").touch()
    train, judge = (
        next((path for path in (folder / f"{part}.csv", folder / part) if path.exists()), None)
        for part in ("train", "judge")
    )
    assert train
    if (folder / "cost.json").exists():
        cost = json.loads((folder / "cost.json").read_text())
    else:
        cost = apart(planned_cost, folder / "planned.yaml", train, _FIRST_BUDGET)
        for _ in range(2):  # validations and pictures follow from the length
            rest = cost["seconds"] - cost["steps_seconds"]
            share = max(1.0, 60 * options.minutes - rest) / cost["steps_seconds"]
            budget = max(1, round(share * cost["images"]))
            cost = apart(planned_cost, folder / "planned.yaml", train, budget)
        (folder / "cost.json").write_text(json.dumps(cost))
    planned = _trained(folder / "planned.yaml", train, folder / "planned")
    result = {"cost": cost, "planned": planned}
    if options.images:
        by_hand = _trained_by_hand(data_set, folder, train, planned["cpu_seconds"])
        result["by_hand"] = by_hand
        for name, trained in (("planned", planned), ("by-hand", by_hand)):
            trained["fidelity"] = _judged(folder, name, judge, options.images)
            trained["recognised"] = _recognised(options.pictures, folder / f"{name}-drawn")
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def _trained_by_hand(
    data_set: DataSet, folder: Path, train: Path, cpu_seconds: float
) -> dict[str, Any]:
    """Train for so many CPU-seconds with the config that somebody wrote."""
    record, run = folder / "by-hand-trained.json", folder / "by-hand"
    if record.exists():
        return dict(json.loads(record.read_text()))
    shutil.rmtree(run, ignore_errors=True)
    config = {**data_set.written_by_hand}
    config["training"] = {
        **config.get("training", {}), "max_epochs": 100_000,
        "max_minutes": round(cpu_seconds / 60, 3),
    }  # fmt: skip
    (folder / "by-hand.yaml").write_text(yaml.safe_dump(config))
    used = apart(trained_by_the_processor, folder / "by-hand.yaml", train, run)
    trained = {"cpu_seconds": used, "steps": _steps(run)}
    record.write_text(json.dumps(trained))
    return trained


def trained_by_the_processor(config: Path, data: Path, run: Path) -> float:
    """Train in this process, max_minutes counting its CPU-seconds; returns those it took."""
    from lightning.pytorch.callbacks import timer

    from synthcube.tasks.train import train

    timer.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[attr-defined]
    train(config, data, run, overrides=["compute.accelerator=cpu"])
    return time.process_time()


def planned_cost(path: Path, data: Path, budget: int) -> dict[str, float]:
    """Plan for so many images, write the plan, and return what it says that the training costs."""
    from synthcube.planning.draft import PlanRequest
    from synthcube.tasks import plan

    planned = plan.plan(data, PlanRequest(budget_images=budget))
    path.unlink(missing_ok=True)
    plan.write(planned, path)
    cost, training = planned.cost, planned.settings.training
    assert cost.duration
    assert cost.timed
    busy = cost.timed.process_step / cost.timed.step
    return {
        "bytes": max(cost.training_bytes, cost.reading_bytes), "seconds": cost.duration.total,
        "cpu_seconds": busy * cost.duration.total,
        "steps_seconds": cost.duration.steps, "steps": cost.steps,
        "images": cost.steps * training.batch_size * training.accumulate,
    }  # fmt: skip


def _trained(config: Path, data: Path, run: Path) -> dict[str, Any]:
    """Train with the command line; returns seconds, CPU-seconds, peak memory and steps."""
    record = run.with_name(f"{run.name}-trained.json")
    if record.exists():
        return dict(json.loads(record.read_text()))
    shutil.rmtree(run, ignore_errors=True)
    words = ["train", "-c", str(config), "-d", str(data), "-o", str(run)]
    command = [sys.executable, "-m", "synthcube", *words, "--set", "compute.accelerator=cpu"]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=one_thread())
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"training {run} failed: {status}")
    trained = {
        "seconds": time.perf_counter() - start, "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss * 1024, "steps": _steps(run),
    }  # fmt: skip
    record.write_text(json.dumps(trained))
    return trained


def _steps(run: Path) -> int:
    with (run / "metrics.csv").open() as file:
        return int(file.readlines()[-1].split(",")[1])


def _judged(folder: Path, name: str, judge: Path | None, images: int) -> dict[str, Any]:
    """The fidelity of drawn images; empty where there is nothing to judge by."""
    run, drawn = folder / name, folder / f"{name}-drawn"
    shutil.rmtree(drawn, ignore_errors=True)
    command = [sys.executable, "-m", "synthcube"]
    words = ["infer", "-m", str(run), "-o", str(drawn), "-n", str(images)]
    subprocess.run([*command, *words], check=True, env=one_thread())
    if judge is None:
        return {}
    results = folder / f"{name}-results.yaml"
    words = ["evaluate", "-p", str(drawn), "-l", str(judge), "-o", str(results)]
    config = (
        folder / "evaluation.yaml"
    )  # its data section brings real images to the drawn ones' grid
    data = yaml.safe_load((folder / f"{name}.yaml").read_text())["data"]
    config.write_text(yaml.safe_dump({"evaluation": {"usefulness": False}, "data": data}))
    subprocess.run([*command, *words, "-c", str(config)], check=True, env=one_thread())
    fidelity: dict[str, Any] = yaml.safe_load(results.read_text())["fidelity"]
    return {key: fidelity[key] for key in MEASURES}


def _recognised(pictures: Path, drawn: Path) -> dict[str, float]:
    """Of images of classes, what a classifier of real pictures says; empty otherwise."""
    with (drawn / "manifest.csv").open(newline="") as file:
        if "Label" not in (csv.DictReader(file).fieldnames or ()):
            return {}
    return dict(apart(recognition.recognised, pictures, drawn))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a row for each set."""
    heads = [
        "images", "steps: plan, by hand", "time: planned, taken",
        "CPU-seconds: planned, taken", "memory with libraries: planned, peak",
        "held-out loss: plan, by hand", "kernel distance: plan, by hand (real)",
        "precision, recall, coverage: plan", "by hand",
        "recognised, mean and worst: plan, by hand (real)",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, result in results.items():
        cost, planned, by_hand = result["cost"], result["planned"], result.get("by_hand", {})
        needed = cost["bytes"] + LIBRARY_BYTES
        first, second = planned.get("fidelity"), by_hand.get("fidelity")
        distances = "-"
        if first and second:
            real = first["kernel_distance"].get("real_baseline")
            both = ", ".join(_number(r["kernel_distance"]["value"]) for r in (first, second))
            distances = f"{both} ({_number(real)})"
        cells = [
            name, f"{planned['steps']}, {by_hand.get('steps', '-')}",
            f"{cost['seconds']:.0f} s, {planned['seconds']:.0f} s",
            f"{cost['cpu_seconds']:.0f}, {planned['cpu_seconds']:.0f}",
            f"{needed / 1e9:.2f} GB, {planned['peak'] / 1e9:.2f} GB",
            ", ".join(_number(loss) for loss in result["losses"]), distances,
            *(_shares(fidelity) for fidelity in (first, second)),
            _recognition(planned.get("recognised"), by_hand.get("recognised")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shares(fidelity: Mapping[str, Any] | None) -> str:
    if not fidelity:
        return "-"
    return ", ".join(_number(fidelity[key]["value"]) for key in MEASURES[1:])


def _recognition(plan: Mapping[str, float] | None, by_hand: Mapping[str, float] | None) -> str:
    if not plan or not by_hand:
        return "-"
    both = ", ".join(f"{rates['mean']:.0%} {rates['worst']:.0%}" for rates in (plan, by_hand))
    return f"{both} ({plan['real_mean']:.0%} {plan['real_worst']:.0%})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())
