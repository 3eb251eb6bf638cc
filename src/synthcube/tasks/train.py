"""Train: from a list of images to a trained model, in a folder that can be continued."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from synthcube import compute, config, environment, reading, storage
from synthcube.config import RunConfig
from synthcube.data.cache import content_digests
from synthcube.data.manifest import Manifest, capped, read_manifest, require_outside, write_manifest
from synthcube.data.module import DataModule
from synthcube.data.postprocessing import Postprocessing
from synthcube.errors import ConfigError, ImageError, OutputError
from synthcube.models import artifact
from synthcube.schema import ImageSpec
from synthcube.tasks import hub_pins
from synthcube.training import (
    TrainingConfig,
    TrainingRun,
    checkpoints,
    fine_tuning,
    fit,
    memory,
    strategies,
)
from synthcube.training.memory import MemoryEstimate
from synthcube.training.metrics import stopped_early
from synthcube.training.preemption import Preemption

log = logging.getLogger("synthcube")

CONFIG, SPLIT, ENVIRONMENT = "config.yaml", "split.csv", "environment.json"
LOCK = ".synthcube.lock"
_WRITTEN = (CONFIG, "artifact", "samples", "metrics.csv", "throughput.json", "logs")
IMAGES = "images.json"
"""File with a digest of each image, in the order of SPLIT."""
# Keys that may change when a run is continued: they affect no step already taken.
_FREE = (
    "training.max_epochs.", "training.max_minutes.", "training.sample_every_n_epochs.",
    "training.num_sample_images.", "training.log_every_n_steps.", "training.loggers.",
    "training.checkpoint_every_n_minutes.", "training.stop_signals.", "training.early_stop.",
    "sampling.", "compute.", "evaluation.", "data.num_workers.", "data.cache_gb.",
    "model.first_stage.",  # its hash must stay
    "model.first_stage_image.labels.",  # an export leaves out labels that name people
    "export.",
)  # fmt: skip
# Keys that may never change: the state of the optimizers would no longer fit.
_FIXED = r"model\.(name|.*optimizer\.name)|training\.(freeze|start_.*)"


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

    Only the first of the processes that train together writes and returns it.

    Args:
        resume: "auto" continues from the last checkpoint if there is one, "never" refuses a folder
            that holds a run, anything else is the path of a checkpoint.
        accept_changes: continue although keys that affect the result have changed.

    Raises:
        PreemptedError: a signal stopped it; the same call continues it.
        SynthCubeError: bad config, data or output folder; see errors.py.
    """
    settings = config.load(config_path, overrides)
    with Preemption(settings.training.stop_signals).listening() as preemption, ExitStack() as held:
        return _train(settings, data_path, run, resume, accept_changes, preemption, held)


def _train(
    settings: RunConfig, data_path: Path, run: Path, resume: str, accept_changes: bool,
    preemption: Preemption, held: ExitStack,
) -> Path | None:  # fmt: skip
    device = compute.device(settings.compute.accelerator)
    rank = _join(settings, compute.devices_used(settings.compute, device))
    storage.require_separate({"output_path": run}, _inputs(settings, data_path))
    take(run, rank, held)
    checkpoint = starting_checkpoint(run, resume)
    end = _end(run, checkpoint, settings.training)
    # Before the first checkpoint the config may still be corrected.
    before = recorded_config(run) if checkpoint or (run / "artifact").exists() else {}
    settings = pinned(settings, before)
    if settings.compute.deterministic:
        environment.fix_cublas()
    precision, reason = compute.resolve_precision(settings.compute.precision, device)
    strategies.require_usable(settings.compute, settings.training, device)
    manifest = read_manifest(data_path)
    require_outside({"output_path": run}, manifest)
    storage.make_folder(run, "output_path")
    take(run, rank, held)
    training = fine_tuning.resolved(settings.training, before.get("training", {}))
    settings = settings.model_copy(update={"training": training})
    if before:
        check_unchanged(run, before, settings, accept_changes)
    log.info("Computing on %s in %s (%s).", device.type, precision, reason)
    data = open_data(settings, manifest)
    if rank == 0:
        record_run(
            run, settings, data, environment.environment_record(device, precision),
            continued=bool(before), accept_changes=accept_changes,
        )  # fmt: skip
    need = need_of(settings, data.image, precision, device)
    with shortage_explained(need, run):
        if end:
            log.info("This training is complete; %s to continue it.", end)
        else:
            if rank == 0:
                log_memory_estimate(need)
            _fit(run, settings, data, precision, device, checkpoint, preemption, accept_changes)
        if rank == 0 and not (end and has_current_artifact(run, settings)):
            save_artifact(run, settings, data)
    return None if rank else run / "artifact"


def pinned(settings: RunConfig, before: Mapping[str, Any]) -> RunConfig:
    """The config with the models that it starts from downloaded, pinned and read.

    Args:
        before: the config of the run that is continued, empty for a new one.
    """
    settings = hub_pins.pinned(settings, before)
    return settings.model_copy(update={"model": settings.model.resolved()})


def open_data(settings: RunConfig, manifest: Manifest) -> DataModule:
    """The images of a training, all of them read.

    Raises:
        ImageError, ConfigError: they fit neither the model nor sampling.postprocessing.
    """
    data = DataModule(
        manifest, settings.data, batch_size=settings.training.batch_size,
        seed=settings.seed, cache=environment.cache_folder(),
    )  # fmt: skip
    if faults := settings.model.faults(data.image):
        raise ImageError("The images do not fit the model:", faults)
    # checked here, not by infer after all the training
    Postprocessing(settings.sampling.postprocessing, data.image)
    return data


def _inputs(settings: RunConfig, data_path: Path) -> dict[str, Path | None]:
    """The local files that a training reads, by the name of their option."""
    named = {
        "training.start_from": settings.training.start_from,
        "model.first_stage": getattr(settings.model, "first_stage", ""),
    }
    models = {name: Path(text) for name, text in named.items() if text and ":" not in str(text)}
    return {"data_path": data_path, **models}


def _end(run: Path, checkpoint: Path | None, training: TrainingConfig) -> str:
    """What to change to continue a complete training; empty if it is not complete.

    Raises:
        ConfigError: the checkpoint is complete, and belongs to another run.
    """
    if checkpoint is None:
        return ""
    if checkpoints.is_complete(checkpoint, training):
        end = "raise training.max_epochs, or max_minutes,"
    elif reason := stopped_early(checkpoint, training):
        end = f"{reason}; raise that patience"
    else:
        return ""
    if checkpoint.parent.resolve() != (run / "checkpoints").resolve():
        raise ConfigError(
            f"--resume {checkpoint}: its training is complete; {end} to continue it. Its model is "
            "in its run folder, which synthcube infer and training.start_from take."
        )
    return end


def starting_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that a training continues from; None: it starts anew.

    Args:
        resume: "auto", "never" or a path; see `train`.
    """
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
    if lack := checkpoints.lack(Path(resume)):
        raise ConfigError(
            f"--resume {resume}: {lack}. Only a checkpoint of synthcube train can be continued: "
            "checkpoints/last.ckpt of a run. To start a new training from the weights of a model, "
            "set training.start_from to its folder (a run, an exported or an imported model)."
        )
    return Path(resume)


def _join(settings: RunConfig, num_devices: int) -> int:
    """This process's rank in the training; all but the first log only warnings."""
    compute.require_even_shares(settings.compute, num_devices, settings.training.batch_size)
    processes = num_devices * settings.compute.num_nodes
    rank = environment.process_rank(num_devices) if processes > 1 else 0
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
    torch.manual_seed(environment.derived_seed(settings.seed, "weights"))
    sampled = settings.model.with_sampling(settings.sampling.of_model())
    family = sampled.build(data.image).to(device)
    if checkpoint:
        checkpoints.check_fits(checkpoint, family)
        epochs, steps = checkpoints.reached(checkpoint)
        log.info("Continuing after epoch %d, step %d, from %s.", epochs, steps, checkpoint)
    family.fit_statistics(data.every_image(), data.rows("train"))
    if not checkpoint:
        # After `fit_statistics`, which it overwrites: the weights belong to their own statistics.
        fine_tuning.take_weights(family, settings.training)
    fit(
        family,
        TrainingRun(
            data, settings.training, settings.compute, run, settings.seed, precision, device,
            checkpoint, preemption, accept_changes, settings.dump(),
        ),
    )  # fmt: skip


def take(run: Path, rank: int, held: ExitStack) -> None:
    """Lock an existing run folder until `held` closes; remove leftovers of a killed training.

    Only the first of the processes that train together does so.

    Raises:
        OutputError: the folder is not a run, or another training uses it.
    """
    if rank or not run.is_dir():
        return
    claim(run)
    held.enter_context(locked(run))
    for name in ("artifact", "checkpoints", "samples", "logs"):
        storage.sweep(run / name)
    storage.settle(run / "artifact")


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run folder for one training; the lock ends with the process, however that ends.

    Raises:
        OutputError: another training holds the lock.
    """
    path = run / LOCK
    with ExitStack() as held:
        try:
            file = held.enter_context(path.open("r+b" if path.exists() else "w+b", buffering=0))
            # A lock of this process only: a data loader that outlives it must not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate()
            file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n".encode())
        except BlockingIOError as error:
            raise OutputError(
                f"output_path {run} is being trained by another process "
                f"({file.read().decode(errors='replace').strip()}): wait for its end, or give "
                "another folder."
            ) from error
        except OSError as error:  # read-only, owned by another user, or a full disk
            log.warning("%s cannot be locked against a second training: %s.", run, error.strerror)
        yield


def claim(run: Path) -> None:
    """Check that a training may write to a folder: it is a run, or nothing would be overwritten.

    Raises:
        OutputError: it may not.
    """
    storage.require_own(run, SPLIT, "output_path")
    if any((run / name).exists() for name in (LOCK, SPLIT, ENVIRONMENT, "checkpoints")):
        return
    if existing := [name for name in _WRITTEN if (run / name).exists()]:
        raise OutputError(
            f"output_path {run} is no run, and files in it would be overwritten "
            f"({', '.join(existing)}): give another one."
        )


def recorded_config(run: Path) -> dict[str, Any]:
    """The config that a run was last trained with; empty if there is none."""
    path = run / CONFIG
    recorded = reading.read_yaml(path, OutputError) if path.exists() else {}
    for section in ("model", "data", "training", "sampling", "compute"):
        if not isinstance(recorded.get(section, {}), dict):
            raise OutputError(f"{path} is damaged: {section} is not a section.")
    return recorded


def check_unchanged(
    run: Path, recorded: Mapping[str, Any], settings: RunConfig, accept_changes: bool
) -> None:
    """Compare the config of a run with the one that it is continued with.

    Raises:
        ConfigError: a key differs that affects the result, and `accept_changes` does not allow it.
    """
    before, now = _flat(recorded), _flat(settings.dump())
    changed = [
        key
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not f"{key}.".startswith(_FREE)
        # Keys may be added to the schema, as long as they are left empty.
        and (key in before or now[key])
    ]
    faults = [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]
    fixed = [key for key in changed if re.fullmatch(_FIXED, key)]
    if faults and accept_changes and not fixed:
        log.warning("Continuing with other values: %s", "; ".join(faults))
    elif faults:
        way = "" if fixed else ", or --accept_changes to go on with these"
        raise ConfigError(
            f"output_path {run} was trained with another config; give another one, or the "
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


def record_run(
    run: Path, settings: RunConfig, data: DataModule, machine: dict[str, Any], *,
    continued: bool, accept_changes: bool,
) -> None:  # fmt: skip
    """Write config, split, digests of the images, and environment.

    Args:
        continued: whether the run has a checkpoint or an artifact already.

    Raises:
        ConfigError: the run was trained on other subjects, or their files have changed since and
            `accept_changes` is not set.
    """
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
    paths = [path for row in data.manifest.rows for path in row.channels]
    by_path = content_digests(paths, environment.cache_folder())
    digests = ["-".join(by_path[path] for path in row.channels) for row in data.manifest.rows]
    if continued:
        _check_same_content(run / IMAGES, data.manifest, digests, accept_changes)
    storage.write_text(run / CONFIG, reading.dump(settings.dump()))
    write_manifest(run / SPLIT, rows)
    storage.write_json(run / IMAGES, digests)
    storage.write_json(run / ENVIRONMENT, machine)


def _check_same_split(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Refuse another split than the run's: subjects must not move from validation to training."""
    if not path.exists():
        return
    recorded_rows = reading.read_rows(path, ("SubjectID", "Split"), OutputError)
    before = [(row["SubjectID"], row["Split"]) for row in recorded_rows]
    if before != [(row["SubjectID"], row["Split"]) for row in rows]:
        raise ConfigError(
            f"output_path {path.parent} was trained on other subjects ({len(before)} images then, "
            f"{len(rows)} now); give another one, or the same data."
        )


def _check_same_content(
    path: Path, manifest: Manifest, digests: Sequence[str], accept_changes: bool
) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a run that was killed before it was written
    if not isinstance(before, list) or len(before) != len(digests):
        return
    changed = [
        ", ".join(map(str, row.channels))
        for row, old, new in zip(manifest.rows, before, digests, strict=True)
        if old != new
    ]
    if changed and accept_changes:
        log.warning("Continuing on changed images: %s", "; ".join(capped(changed)))
    elif changed:
        count = "1 image has" if len(changed) == 1 else f"{len(changed)} images have"
        raise ConfigError(
            f"{count} changed since output_path {path.parent} was trained on them; restore them, "
            "give another output_path, or --accept_changes to go on with these:",
            capped(changed),
        )


def save_artifact(run: Path, settings: RunConfig, data: DataModule) -> None:
    """Write the best checkpoint of a run, or else its last, as an artifact."""
    source = _source(run)
    epochs, steps = checkpoints.reached(source)
    pictures = sorted((run / "samples").glob("*.png"))
    artifact.save(
        run / "artifact",
        config=settings.dump(),
        image=data.image,
        # In float32, whatever they were trained in: every machine can sample with that.
        weights={
            name: value.float() if value.is_floating_point() else value
            for name, value in checkpoints.weights(source).items()
        },
        metrics={"epochs": epochs, "steps": steps, **checkpoints.monitored(source)},
        picture=pictures[-1] if pictures else None,
        checkpoint=checkpoints.fingerprint(source),
    )


def has_current_artifact(run: Path, settings: RunConfig) -> bool:
    """Whether the artifact was written from the current checkpoint and config of the run.

    A training that was killed between the two leaves an older artifact.
    """
    folder = run / "artifact"
    try:
        index = json.loads((folder / artifact.INDEX).read_text(encoding="utf-8"))
        written = (folder / artifact.CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return (
        isinstance(index, dict)
        and index.get("checkpoint") == checkpoints.fingerprint(_source(run))
        and written == reading.dump(settings.dump())
    )


def _source(run: Path) -> Path:
    best = run / "checkpoints" / checkpoints.BEST
    return best if best.exists() else run / "checkpoints" / checkpoints.LAST


def need_of(
    settings: RunConfig, image: ImageSpec, precision: str, device: torch.device
) -> MemoryEstimate:
    """Estimate of the memory that a run on `device` needs."""
    return MemoryEstimate(
        settings.model, image, settings.training, settings.compute, precision, device,
        settings.data.num_workers,
    )  # fmt: skip


def log_memory_estimate(need: MemoryEstimate) -> None:
    """Log the memory that is needed and free, and a warning if too little is free."""
    free = need.bytes_free()
    try:
        needed = need.bytes_needed()
    except Exception as error:  # the training will report the fault better
        log.debug("No estimate of memory: %s", error)
        return
    log.info("Needs about %.2f GB beside the libraries; %.2f GB free.", needed / 1e9, free / 1e9)
    if lack := memory.warning(need, needed, free):
        log.warning(lack)


@contextmanager
def shortage_explained(need: MemoryEstimate, run: Path) -> Iterator[None]:
    """Turn an out-of-memory error into a MemoryShortageError that says what is left of `run`."""

    def intact() -> str:
        last = run / "checkpoints" / checkpoints.LAST
        if last.exists():
            return f"The last checkpoint, {last}, is intact."
        return "There is no checkpoint yet, and nothing half-written."

    with memory.memory_errors(need, need.bytes_free(), intact):
        yield
