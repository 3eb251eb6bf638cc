"""Self-check: the whole way from images to an exported model, for each family, on phantoms."""

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
from synthcube.sharing import runtimes
from synthcube.sharing.config import ExportRequest
from synthcube.storage import make_folder, sha256, write_text
from synthcube.tasks.evaluate import evaluate
from synthcube.tasks.export import export
from synthcube.tasks.infer import infer
from synthcube.tasks.inference_jobs import IMAGES
from synthcube.tasks.train import CONFIG, train

_NUM_IMAGES, _SIDE, _SPACING_MM = 6, 16, (1.0, 1.5, 3.0)


class SelfCheckError(Exception):
    """A step failed: a fault of this installation or of this machine, not of a user's input."""


def self_check() -> Iterator[str]:
    """Every family's smallest model, trained in a temporary folder, drawn from and exported.

    Yields:
        One line for each step that succeeded.

    Raises:
        SelfCheckError: a step failed; which one, and why.
    """
    logging.getLogger("synthcube").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="synthcube-self-check-") as name:
        for family in registry.names():
            for rank in (2, 3):
                folder = Path(name) / f"{family}-{rank}d"
                for step, run in _steps(folder, family, rank).items():
                    what = f"{family} in {rank}D, {step}"
                    yield f"{what}: {_timed(run, what):.1f} s"
        for each in runtimes.NAMES:
            what = f"{registry.names()[0]} with {each}"
            if runtimes.is_installed(each):
                run = partial(_convert, Path(name) / f"{registry.names()[0]}-2d", each)
                yield f"{what}: {_timed(run, what):.1f} s"
            else:
                yield f"{what}: not tried, it is not installed"


def _steps(folder: Path, family: str, rank: int) -> dict[str, Callable[[], object]]:
    data, run, images, shared = (folder / name for name in ("data", "run", "images", "model"))
    return {
        "phantoms": lambda: _write_inputs(folder, data, family, rank),
        "train": lambda: train(folder / CONFIG, data, run),
        "infer": lambda: infer(run, images, num_images=3, data_path=_source(run, data)),
        # so small a model makes images that are refused: grey ones
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
    kind = registry.find(family)
    model = kind.tiny().model_dump(mode="json")
    if kind.needs:
        first = folder / kind.needs
        _write_inputs(first, data, kind.needs, rank)
        train(first / CONFIG, data, first / "run")
        model["first_stage"] = str(first / "run")
    training = {"max_epochs": 1, "batch_size": 4, "sample_every_n_epochs": 0}
    light = {"extractor": {"name": "radiomic"}, "num_repeats": 2}
    content = {"model": model, "training": training, "evaluation": light}
    write_text(folder / CONFIG, reading.dump(content))


def _source(model: Path, data: Path) -> Path | None:
    """The images to reconstruct, for a family that does not make them out of nothing."""
    family = artifact.load(model).build(torch.device("cpu"))
    return None if isinstance(family, Samples) else data


def _verify(shared: Path, data: Path, images: Path, again: Path) -> None:
    """The exported model makes the same images, byte for byte."""
    infer(shared, again, num_images=3, data_path=_source(shared, data))
    _compare(images / IMAGES, again / IMAGES)


def _open(shared: Path, data: Path, images: Path, opened: Path) -> None:
    """And so it does for those who work in Python, from the same seed."""
    model = synthcube.from_pretrained(shared)
    made = model.reconstruct(data) if _source(shared, data) else model.sample(3)
    made.save(opened)
    _compare(images / IMAGES, opened)


def _convert(folder: Path, runtime: str) -> None:
    """Its export for another runtime, which compares the images, makes some."""
    shared, data = folder / runtime, folder / "data"
    export(folder / "run", shared, ExportRequest(runtimes=(runtime,)))
    source = _source(shared, data)
    infer(shared, folder / f"{runtime}-images", num_images=3, data_path=source,
          with_runtime=runtime)  # fmt: skip


def _compare(one: Path, other: Path) -> None:
    first, second = ([sha256(path) for path in sorted(folder.iterdir())] for folder in (one, other))
    if first != second:
        raise ValueError(f"the exported model makes other images: {first} and {second}")
