"""Train: a config and data in, a run folder with an artifact out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from synthcube import artifact, compute, config, runtime, storage
from synthcube.config import RunConfig
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError, ImageError, OutputError
from synthcube.tasks import forecast
from synthcube.training import checkpoints, fit
from synthcube.training.preemption import Preemption

log = logging.getLogger("synthcube")

CONFIG, SPLIT, ENVIRONMENT = "config.yaml", "split.csv", "environment.json"
# Keys that may differ from the run that is continued: they change no step already taken.
_FREE = (
    "training.max_epochs.", "training.max_minutes.", "training.sample_every_n_epochs.",
    "training.num_sample_images.", "training.log_every_n_steps.",
    "training.checkpoint_every_n_minutes.", "training.stop_signals.", "sampling.", "compute.",
    "data.num_workers.", "data.cache_gb.", "model.first_stage.",  # its hash must stay
)  # fmt: skip


def train(
    config_path: Path,
    data_path: Path,
    run: Path,
    *,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    accept_changes: bool = False,
) -> Path | None:
    """Train, or continue the training in `run`; returns the artifact folder.

    Of processes that train together the first writes it; the others return None.

    Args:
        resume: "auto" continues where there is something to continue, "never" refuses a folder
            that holds a run, anything else is the path of a checkpoint.
        accept_changes: continue with other values of keys that matter, from here on.

    Raises:
        PreemptedError: a signal came; the same call goes on where this one was.
        SynthCubeError: bad config, data or output folder; see errors.py.
    """
    settings = config.load(config_path, overrides)
    with Preemption(settings.training.stop_signals).listening() as preemption:
        return _train(settings, data_path, run, resume, accept_changes, preemption)


def _train(
    settings: RunConfig, data_path: Path, run: Path, resume: str, accept_changes: bool,
    preemption: Preemption,
) -> Path | None:  # fmt: skip
    settings = settings.model_copy(update={"model": settings.model.resolved()})
    device = compute.device(settings.compute.accelerator)
    rank = _join(settings, compute.devices_used(settings.compute, device))
    precision, reason = compute.precision(settings.compute.precision, device)
    manifest = read_manifest(data_path)
    storage.make_folder(run, "output_path")
    checkpoint = _checkpoint(run, resume)
    if (run / CONFIG).exists():
        _check_unchanged(run / CONFIG, settings, accept_changes)
    log.info("Computing on %s in %s (%s).", device.type, precision, reason)
    data = DataModule(
        manifest, settings.data, batch_size=settings.training.batch_size,
        seed=settings.seed, cache=runtime.cache_folder(),
    )  # fmt: skip
    if faults := settings.model.faults(data.image):
        raise ImageError("The images do not fit the model:", faults)
    if rank == 0:
        _record(run, settings, data, runtime.environment_record(device, precision))
    need = forecast.need_of(settings, data.image, precision, device)
    with forecast.shortage_explained(need, run):
        if not (checkpoint and checkpoints.is_complete(checkpoint, settings.training)):
            if rank == 0:
                forecast.foretell(need)
            _fit(run, settings, data, precision, device, checkpoint, preemption, accept_changes)
        else:
            log.info(
                "This training is complete; raise training.max_epochs, or max_minutes, to "
                "continue it."
            )
            if (run / "artifact" / artifact.INDEX).exists():
                return None if rank else run / "artifact"
        if rank == 0:
            _save_artifact(run, settings, data)
    return None if rank else run / "artifact"


def _join(settings: RunConfig, num_devices: int) -> int:
    """This process's rank in the training, whose other processes stay silent but for warnings.

    Raises:
        ConfigError: the processes cannot share a batch.
    """
    processes, batch_size = num_devices * settings.compute.num_nodes, settings.training.batch_size
    if batch_size % processes:
        less = batch_size - batch_size % processes
        sizes = f"{less} or {less + processes}" if less else f"{processes}"
        raise ConfigError(
            f"training.batch_size is {batch_size}, which {processes} processes "
            f"(compute.num_devices {num_devices} x num_nodes {settings.compute.num_nodes}) cannot "
            f"share evenly: use {sizes}."
        )
    rank = runtime.process_rank() if processes > 1 else 0
    if rank:
        log.setLevel(logging.WARNING)
    return rank


def _fit(
    run: Path, settings: RunConfig, data: DataModule, precision: str, device: torch.device,
    checkpoint: Path | None, preemption: Preemption, accept_changes: bool,
) -> None:  # fmt: skip
    log.info(
        "%d training and %d validation images of size %s, %d channel(s).",
        len(data.rows("train")), len(data.rows("validation")),
        "x".join(map(str, data.image.size)), data.image.channels,
    )  # fmt: skip
    torch.manual_seed(runtime.derived_seed(settings.seed, "weights"))
    family = settings.model.build(data.image).to(device)
    if checkpoint:
        checkpoints.check_fits(checkpoint, family)
        epochs, steps = checkpoints.reached(checkpoint)
        log.info("Continuing after epoch %d, step %d, from %s.", epochs, steps, checkpoint)
    family.begin(data.every_image(), data.rows("train"))
    fit(
        family, data, settings.training, settings.compute,
        run=run, seed=settings.seed, precision=precision, device=device, checkpoint=checkpoint,
        preemption=preemption, accept_changes=accept_changes,
    )  # fmt: skip


def _save_artifact(run: Path, settings: RunConfig, data: DataModule) -> None:
    best = run / "checkpoints" / checkpoints.BEST
    source = best if best.exists() else run / "checkpoints" / checkpoints.LAST
    epochs, steps = checkpoints.reached(source)
    pictures = sorted((run / "samples").glob("*.png"))
    artifact.save(
        run / "artifact",
        config=settings.dump(),
        image=data.image,
        weights=checkpoints.weights(source),
        metrics={"epochs": epochs, "steps": steps, **checkpoints.monitored(source)},
        picture=pictures[-1] if pictures else None,
    )


def _checkpoint(run: Path, resume: str) -> Path | None:
    last = run / "checkpoints" / checkpoints.LAST
    if resume == "auto":
        return last if last.exists() else None
    if resume == "never":
        if last.exists() or (run / "artifact").exists():
            raise OutputError(
                f"output_path {run} already holds a run, and --resume is never: give another one, "
                "or remove this one."
            )
        return None
    if not Path(resume).is_file():
        raise ConfigError(
            f"--resume {resume}: there is no such checkpoint; use auto, never, or the path of one."
        )
    return Path(resume)


def _check_unchanged(path: Path, settings: RunConfig, accept_changes: bool) -> None:
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    now = _flat(settings.dump())
    changed = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not f"{key}.".startswith(_FREE)
    ]
    faults = [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]
    kinds = [key for key in changed if re.fullmatch(r"model\.(name|.*optimizer\.name)", key)]
    if faults and accept_changes and not kinds:
        log.warning("Continuing with other values: %s", "; ".join(faults))
    elif faults:
        way = "" if kinds else ", or --accept_changes to go on with these"
        raise ConfigError(
            f"output_path {path.parent} was trained with another config; give another one, or the "
            f"same values{way}:",
            faults,
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _record(run: Path, settings: RunConfig, data: DataModule, environment: dict[str, Any]) -> None:
    rows = [
        {
            "SubjectID": row.subject,
            "Split": split,
            "Label": row.label_name,
            **{f"Channel_{i}": str(path) for i, path in enumerate(row.channels)},
        }
        for row, split in zip(data.manifest.rows, data.splits, strict=True)
    ]
    _check_same_split(run / SPLIT, rows)
    storage.write_text(run / CONFIG, yaml.safe_dump(settings.dump(), sort_keys=False))
    write_manifest(run / SPLIT, rows)
    storage.write_json(run / ENVIRONMENT, environment)


def _check_same_split(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A run is continued on the images it was started with: subjects must not change sides."""
    if not path.exists():
        return
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        before = [(row["SubjectID"], row["Split"]) for row in csv.DictReader(file)]
    if before != [(row["SubjectID"], row["Split"]) for row in rows]:
        raise ConfigError(
            f"output_path {path.parent} was trained on other subjects ({len(before)} images then, "
            f"{len(rows)} now); give another one, or the same data."
        )
