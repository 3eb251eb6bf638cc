"""Trial (`train --debug`): a few batches of every step of a training and of its sampling."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from synthcube import compute, config, storage
from synthcube.config import RunConfig
from synthcube.data.conditions import cell
from synthcube.data.manifest import Manifest, Row, read_manifest, write_manifest
from synthcube.models import artifact
from synthcube.models.family import Samples
from synthcube.tasks.infer import InferRequest, infer
from synthcube.tasks.inference_jobs import IMAGES
from synthcube.tasks.train import train

_BATCHES, _CPU_BATCH, _IMAGES = 3, 2, 2


def trial(
    config_path: Path, data_path: Path, out: Path, *, overrides: Sequence[str] = ()
) -> Iterator[str]:
    """Train on a few images of the data, save, and infer, in a folder that is removed again.

    On a CPU the batch is cut to two images for each process; on a GPU it is the real one, to find
    out whether it fits.

    Args:
        out: folder of the real run, which must be writable; its content is not changed.

    Yields:
        One line for each step. Only the first of processes that train together yields any.
    """
    start = time.monotonic()
    settings = config.load(config_path, overrides)
    changes = _changes(settings)
    storage.require_separate({"output_path": out}, {"data_path": data_path})
    manifest = read_manifest(data_path)
    existed = out.exists()
    storage.make_folder(out, "output_path")
    try:
        with storage.scratch_folder(out) as folder:
            data = folder / "data.csv"
            write_manifest(data, _few(manifest, settings, _batch_size(settings) * _BATCHES))
            words = [f"{key}={value}" for key, value in changes.items()]
            yield "trial with " + ", ".join(words)
            model = train(
                config_path, data, folder / "run", overrides=[*overrides, *words], resume="never"
            )
            if model:
                yield from _sampled(model, data, folder, settings)
                yield (
                    f"Tried: {_BATCHES} batches of training, validation, pictures, a checkpoint, "
                    f"the trained model and {_IMAGES} images of it, in "
                    f"{time.monotonic() - start:.0f} s. All of it works; nothing of it is kept."
                )
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # another process of this trial is still in it
                out.rmdir()


def _changes(settings: RunConfig) -> dict[str, int | str]:
    """The keys in which the trial differs from the run, with their values."""
    keys, epochs = settings.model.shortened()
    changes: dict[str, int | str] = {
        "training.max_epochs": epochs,
        "training.batch_size": _batch_size(settings),
        "training.accumulate": min(2, settings.training.accumulate),
        "training.validate_every_n_epochs": 1,
        "training.sample_every_n_epochs": 1,
        "training.num_sample_images": _IMAGES,
        "training.log_every_n_steps": 1,
        "training.loggers": "[]",  # nobody wants a trial among their runs
    }
    return changes | {f"model.{key}": value for key, value in keys.items()}


def _batch_size(settings: RunConfig) -> int:
    """The number of images in a batch of the trial, over all processes."""
    device = compute.device(settings.compute.accelerator)
    if device.type != "cpu":
        return settings.training.batch_size
    processes = compute.devices_used(settings.compute, device) * settings.compute.num_nodes
    return min(settings.training.batch_size, _CPU_BATCH * processes)


def _few(manifest: Manifest, settings: RunConfig, number: int) -> list[dict[str, str]]:
    """`number` training images from all over the list, some of them as validation images too."""
    splits = {row.split for row in manifest.rows}
    # An empty cell of Split means train; a list without any is split by the training.
    trained = [row for row in manifest.rows if row.split in ("", "train")] or list(manifest.rows)
    step = max(1.0, len(trained) / number)
    indices = {int(i * step) for i in range(min(number, len(trained)))}
    for name, kind in settings.data.conditions.items():
        if kind == "number":  # its range must not be a point
            known = {i: value for i, row in enumerate(trained) if (value := _number(row, name))}
            ordered = sorted(known, key=lambda index: known[index])
            indices |= {*ordered[:1], *ordered[-1:]}
    rows = [trained[index] for index in sorted(indices)]
    validates = "validation" in splits or (not splits - {""} and settings.data.validation_fraction)
    validated = rows[: settings.compute.num_nodes * _batch_size(settings)] if validates else []
    return [_cells(row, "train") for row in rows] + [_cells(row, "validation") for row in validated]


def _number(row: Row, name: str) -> tuple[float, ...]:
    try:
        return (float(cell(row, name)),)
    except ValueError:
        return ()  # empty, or a fault that the training will report


def _cells(row: Row, split: str) -> dict[str, str]:
    return row.cells | {"SubjectID": f"{row.subject} ({split})", "Split": split}


def _sampled(model: Path, data: Path, folder: Path, settings: RunConfig) -> Iterator[str]:
    device = compute.device(settings.compute.accelerator)
    trained = artifact.load(model)
    generates = isinstance(trained.build(device), Samples) and not trained.image.source_channels
    infer(
        InferRequest(
            model, folder / "images", num_images=_IMAGES if generates else None, num_devices=1,
            data=None if generates else data, batch_size=_IMAGES,
        )
    )  # fmt: skip
    paths = list((folder / "images" / IMAGES).iterdir())
    yield f"made {len(paths)} image(s) of {'x'.join(map(str, trained.image.size))}"
