"""Train: a config and data in, a run folder with an artifact out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from synthcube import compute, config, runtime, storage
from synthcube.config import RunConfig
from synthcube.data.manifest import read_manifest, require_outside
from synthcube.data.module import DataModule
from synthcube.data.postprocessing import Postprocessing
from synthcube.errors import ConfigError, ImageError
from synthcube.tasks import forecast, origins, run_folder
from synthcube.training import Plan, TrainingConfig, checkpoints, fit, start, strategies
from synthcube.training.early_stop import stopped_early
from synthcube.training.preemption import Preemption

log = logging.getLogger("synthcube")


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
    with Preemption(settings.training.stop_signals).listening() as preemption, ExitStack() as held:
        return _train(settings, data_path, run, resume, accept_changes, preemption, held)


def _train(
    settings: RunConfig, data_path: Path, run: Path, resume: str, accept_changes: bool,
    preemption: Preemption, held: ExitStack,
) -> Path | None:  # fmt: skip
    device = compute.device(settings.compute.accelerator)
    rank = _join(settings, compute.devices_used(settings.compute, device))
    storage.require_separate({"output_path": run}, _inputs(settings, data_path))
    run_folder.take(run, rank, held)
    checkpoint = run_folder.checkpoint(run, resume)
    end = _end(run, checkpoint, settings.training)
    # Where nothing was trained yet, a config that was refused may be mended.
    before = run_folder.recorded(run) if checkpoint or (run / "artifact").exists() else {}
    settings = origins.pinned(settings, before)
    settings = settings.model_copy(update={"model": settings.model.resolved()})
    if settings.compute.deterministic:
        runtime.fix_cublas()
    precision, reason = compute.precision(settings.compute.precision, device)
    strategies.require_usable(settings.compute, settings.training, device)
    manifest = read_manifest(data_path)
    require_outside({"output_path": run}, manifest)
    storage.make_folder(run, "output_path")
    run_folder.take(run, rank, held)
    started = start.resolved(settings.training, before.get("training", {}))
    settings = settings.model_copy(update={"training": started})
    if before:
        run_folder.check_unchanged(run, before, settings, accept_changes)
    log.info("Computing on %s in %s (%s).", device.type, precision, reason)
    data = DataModule(
        manifest, settings.data, batch_size=settings.training.batch_size,
        seed=settings.seed, cache=runtime.cache_folder(),
    )  # fmt: skip
    if faults := settings.model.faults(data.image):
        raise ImageError("The images do not fit the model:", faults)
    # infer would refuse it, after all the training
    Postprocessing(settings.sampling.postprocessing, data.image)
    if rank == 0:
        run_folder.record(
            run, settings, data, runtime.environment_record(device, precision),
            continued=bool(before), accept_changes=accept_changes,
        )  # fmt: skip
    need = forecast.need_of(settings, data.image, precision, device)
    with forecast.shortage_explained(need, run):
        if end:
            log.info("This training is complete; %s to continue it.", end)
        else:
            if rank == 0:
                forecast.foretell(need)
            _fit(run, settings, data, precision, device, checkpoint, preemption, accept_changes)
        if rank == 0 and not (end and run_folder.has_current_artifact(run, settings)):
            run_folder.save_artifact(run, settings, data)
    return None if rank else run / "artifact"


def _inputs(settings: RunConfig, data_path: Path) -> dict[str, Path | None]:
    """What a training reads, by name, but for what it downloads."""
    named = {
        "training.start_from": settings.training.start_from,
        "model.first_stage": getattr(settings.model, "first_stage", ""),
    }
    models = {name: Path(text) for name, text in named.items() if text and ":" not in str(text)}
    return {"data_path": data_path, **models}


def _end(run: Path, checkpoint: Path | None, training: TrainingConfig) -> str:
    """What to change so that a complete training goes on; empty where it goes on as it is.

    Raises:
        ConfigError: it is complete, and not that of this run.
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
            "in the run folder that it is of, which synthcube infer and training.start_from take."
        )
    return end


def _join(settings: RunConfig, num_devices: int) -> int:
    """This process's rank in the training, whose other processes stay silent but for warnings.

    Raises:
        ConfigError: the processes cannot share a batch.
    """
    compute.require_even_shares(settings.compute, num_devices, settings.training.batch_size)
    processes = num_devices * settings.compute.num_nodes
    rank = runtime.process_rank(num_devices) if processes > 1 else 0
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
    family.fit_statistics(data.every_image(), data.rows("train"))
    if not checkpoint:
        # After `fit_statistics`: the weights were trained with the statistics of other images.
        start.take_weights(family, settings.training)
    fit(
        family,
        Plan(
            data, settings.training, settings.compute, run, settings.seed, precision, device,
            checkpoint, preemption, accept_changes, settings.dump(),
        ),
    )  # fmt: skip
