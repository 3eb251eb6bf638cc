"""Self-check: train, infer, evaluate and export each family on phantoms."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import synthcube
from synthcube import reading
from synthcube.data.phantom import write_phantoms
from synthcube.models import artifact, registry
from synthcube.models.family import Samples
from synthcube.sharing.config import ExportRequest
from synthcube.sharing.runtimes import NAMES, RuntimeName, RuntimeOrTorch, is_installed
from synthcube.storage import make_folder, sha256, write_text
from synthcube.tasks.evaluate import evaluate
from synthcube.tasks.export import export
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.inference_jobs import IMAGES
from synthcube.tasks.run_folder import CONFIG
from synthcube.tasks.train import train

_NUM_IMAGES, _SIDE, _SPACING_MM = 6, 16, (1.0, 1.5, 3.0)


class SelfCheckError(Exception):
    """A step failed: a fault of this installation or machine, not of a user's input."""


def self_check() -> Iterator[str]:
    """Train, sample and export the smallest model of every family, in a temporary folder.

    Yields:
        One line for each step that succeeded.
    """
    logging.getLogger("synthcube").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="synthcube-self-check-") as name:
        for family in registry.names():
            for rank in (2, 3):
                folder = Path(name) / f"{family}-{rank}d"
                for step, run in _steps(folder, family, rank).items():
                    what = f"{family} in {rank}D, {step}"
                    yield f"{what}: {_timed(run, what):.1f} s"
        for runtime in NAMES:
            what = f"{registry.names()[0]} with {runtime}"
            if is_installed(runtime):
                run = partial(_convert, Path(name) / f"{registry.names()[0]}-2d", runtime)
                yield f"{what}: {_timed(run, what):.1f} s"
            else:
                yield f"{what}: not tried, it is not installed"


def _steps(folder: Path, family: str, rank: int) -> dict[str, Callable[[], object]]:
    data, run, images, shared = (folder / name for name in ("data", "run", "images", "model"))
    return {
        "phantoms": lambda: _write_inputs(folder, data, family, rank),
        "train": lambda: train(folder / CONFIG, data, run),
        "infer": lambda: _infer(run, images, data),
        # of phantoms: images of so small a model are constant, and would be refused
        "evaluate": lambda: evaluate(
            data, data, folder / "results.yaml", config_path=folder / CONFIG
        ),
        "export": lambda: export(run, shared),
        "verify": lambda: _verify(shared, data, images, folder / "again"),
        "open in Python": lambda: _open(shared, data, images, folder / "opened"),
    }


def _timed(run: Callable[[], object], what: str) -> float:
    start = time.perf_counter()
    try:
        run()
    except Exception as error:
        raise SelfCheckError(f"{what}: {error}") from error
    return time.perf_counter() - start


def _write_inputs(folder: Path, data: Path, family: str, rank: int) -> None:
    make_folder(folder)
    if not data.exists():
        write_phantoms(data, num=_NUM_IMAGES, size=(_SIDE,) * rank, spacing_mm=_SPACING_MM)
    model_config = registry.find(family)
    model = model_config.tiny().model_dump(mode="json")
    if model_config.needs:
        first = folder / model_config.needs
        _write_inputs(first, data, model_config.needs, rank)
        train(first / CONFIG, data, first / "run")
        model["first_stage"] = str(first / "run")
    training = {"max_epochs": 1, "batch_size": 4, "sample_every_n_epochs": 0}
    light = {"extractor": {"name": "radiomic"}, "num_repeats": 2}
    content = {"model": model, "training": training, "evaluation": light}
    write_text(folder / CONFIG, reading.dump(content))


def _source(model: Path, data: Path) -> Path | None:
    """The images to reconstruct, for a family that does not generate any."""
    family = artifact.load(model).build(torch.device("cpu"))
    return None if isinstance(family, Samples) else data


def _verify(shared: Path, data: Path, images: Path, again: Path) -> None:
    """Check that the exported model makes the same images, byte for byte."""
    _infer(shared, again, data)
    _compare(images / IMAGES, again / IMAGES)


def _open(shared: Path, data: Path, images: Path, opened: Path) -> None:
    """Check that from_pretrained makes the same images from the same seed."""
    model = synthcube.from_pretrained(shared)
    images_of_python = model.reconstruct(data) if _source(shared, data) else model.sample(3)
    images_of_python.save(opened)
    _compare(images / IMAGES, opened)


def _convert(folder: Path, runtime: RuntimeName) -> None:
    """Export for a runtime, which compares its outputs with those of torch, and infer with it."""
    shared, data = folder / runtime, folder / "data"
    export(folder / "run", shared, ExportRequest(runtimes=(runtime,)))
    _infer(shared, folder / f"{runtime}-images", data, runtime)


def _infer(model: Path, out: Path, data: Path, runtime: RuntimeOrTorch = "torch") -> None:
    source = _source(model, data)
    infer(InferRequest(model, out, num_images=3, data=source, runtime=runtime))


def _compare(one: Path, other: Path) -> None:
    first, second = ([sha256(path) for path in sorted(folder.iterdir())] for folder in (one, other))
    if first != second:
        raise ValueError(f"the exported model makes other images: {first} and {second}")
