"""Train: from a list of images to a trained model, in a folder that can be continued."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from synthcube import compute, config, environment, storage
from synthcube.config import RunConfig
from synthcube.data.batches import steps_per_epoch
from synthcube.data.manifest import Manifest, read_manifest, require_outside
from synthcube.data.module import DataModule
from synthcube.data.postprocessing import Postprocessing
from synthcube.errors import ConfigError, ImageError
from synthcube.models.family import Family, ScalesByMoments
from synthcube.schema import ImageSpec, Moments, near_multiples
from synthcube.tasks import hub_pins, run_folder
from synthcube.training import (
    accountant,
    checkpoints,
    deepspeed,
    fine_tuning,
    leaks,
    memory,
    threads,
)
from synthcube.training.accountant import Budget
from synthcube.training.config import TrainingConfig
from synthcube.training.curve import draw_losses
from synthcube.training.fit import TrainingRun, fit
from synthcube.training.memory import MemoryEstimate
from synthcube.training.metrics import MetricsTable, stopped_early
from synthcube.training.preemption import Preemption
from synthcube.training.privacy import recorded_budget
from synthcube.training.proximal import Proximal, ProximalTerm

log = logging.getLogger("synthcube")


def train(
    config_path: Path | Mapping[str, Any],
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
        config_path: a YAML, or its content.
        resume: "auto" continues from the last checkpoint if there is one, "never" refuses a folder
            that holds a run, anything else is the path of a checkpoint.
        accept_changes: continue although keys that affect the result have changed.

    Raises PreemptedError if a signal stopped it: the same call continues it.
    """
    settings = config.load_any(config_path, overrides)
    with Preemption(settings.training.stop_signals).listening() as preemption, ExitStack() as locks:
        return _train(settings, data_path, run, resume, accept_changes, preemption, locks)


@dataclass(frozen=True, slots=True)
class FederatedRound:
    """A part of a training that a site does between two averages.

    Args:
        image: images as the sites have agreed on them.
        until_epoch: epochs of the site's run at the end of the round.
        moments: of the latents of all sites, for a family that scales by them.
        weights: what a site without a checkpoint starts from; None: the plan's initial weights.
        proximal: holds the weights near those that the round began with.
    """

    image: ImageSpec
    until_epoch: int
    moments: Moments | None = None
    weights: Mapping[str, torch.Tensor] | None = None
    proximal: Proximal | None = None


def train_round(
    settings: RunConfig, data_path: Path, run: Path, federated_round: FederatedRound
) -> None:
    """Continue the training in `run` up to the end of a round; no artifact is written.

    Raises PreemptedError if a signal stopped it: the same call continues it.
    """
    with Preemption(settings.training.stop_signals).listening() as preemption, ExitStack() as locks:
        _train(settings, data_path, run, "auto", False, preemption, locks, federated_round)


def _train(
    settings: RunConfig, data_path: Path, run: Path, resume: str, accept_changes: bool,
    preemption: Preemption, locks: ExitStack, federated_round: FederatedRound | None = None,
) -> Path | None:  # fmt: skip
    device = compute.device(settings.compute.accelerator)
    rank = _join(settings, device)
    storage.require_separate({"output_path": run}, _inputs(settings, data_path))
    run_folder.take(run, rank, locks)
    checkpoint = run_folder.starting_checkpoint(run, resume)
    end = _end(run, checkpoint, settings.training)
    # Before the first checkpoint the config may still be corrected.
    has_trained = checkpoint or (run / "artifact").exists()
    before = run_folder.recorded_config(run) if has_trained else {}
    settings = hub_pins.pinned(settings, before)
    if settings.compute.deterministic:
        environment.fix_cublas()
    precision, reason = compute.resolve_precision(settings.compute.precision, device)
    deepspeed.require_usable(settings.compute, settings.training, device)
    leaks.require_one_process(settings.training, settings.compute, device)
    manifest = read_manifest(data_path)
    require_outside({"output_path": run}, manifest)
    storage.make_folder(run, "output_path")
    run_folder.take(run, rank, locks)
    training = fine_tuning.resolved(settings.training, before.get("training", {}))
    settings = settings.model_copy(update={"training": training})
    if before:
        run_folder.check_unchanged(run, before, settings, accept_changes)
    log.info("Computing on %s in %s (%s).", device.type, precision, reason)
    data = open_data(settings, manifest, federated_round.image if federated_round else None)
    budget = planned_budget(settings, data, checkpoint)
    if device.type == "cpu" and settings.compute.num_devices in (None, 1) and not end:
        threads.choose_threads(
            settings.model, data.image.encoded, settings.training.batch_size,
            mixed=precision == "bf16-mixed", deterministic=settings.compute.deterministic,
            recorded=run_folder.recorded_threads(run) if has_trained else None,
        )  # fmt: skip
    if rank == 0:
        run_folder.record_run(
            run, settings, data, environment.environment_record(device, precision),
            continued=bool(before), accept_changes=accept_changes,
        )  # fmt: skip
    estimate = need_of(settings, data.image, precision, device)
    with memory.memory_errors(estimate, estimate.bytes_free(), partial(_what_remains, run)):
        if end:
            log.info("This training is complete; %s to continue it.", end)
        else:
            if rank == 0:
                _log_memory_estimate(estimate)
                if warning := data.mask_warning():
                    log.warning("%s.", warning[:1].upper() + warning[1:])
            _fit(
                run, settings, data, precision, device, checkpoint, preemption, accept_changes,
                federated_round, budget,
            )  # fmt: skip
        if federated_round:
            return None
        if rank == 0 and not (end and run_folder.has_current_artifact(run, settings)):
            # Before the artifact, whose presence says that the run needs nothing more.
            draw_losses(MetricsTable(run / "metrics.csv"))
            run_folder.save_artifact(run, settings, data)
    return None if rank else run / "artifact"


def open_data(
    settings: RunConfig, manifest: Manifest, agreed: ImageSpec | None = None
) -> DataModule:
    """The images of a training, all of them read; they fit the model and its postprocessing.

    Args:
        agreed: description of the images that sites have agreed on, in place of their own.
    """
    data = DataModule(
        manifest, settings.data, batch_size=settings.training.batch_size,
        seed=settings.seed, cache=environment.cache_folder(),
        conditions=agreed.conditions if agreed else None,
        private=settings.training.privacy is not None,
    )  # fmt: skip
    if agreed:
        data.image = agreed
    if faults := settings.model.faults(data.image.encoded):
        if fitting := _fitting_size(settings, data):
            faults = [*faults, f"data.size: {fitting} fits"]
        if settings.data.patches:
            faults = [fault.replace("data.size", "data.patches") for fault in faults]
        raise ImageError("The images do not fit the model:", faults)
    # checked here, not by infer after all the training
    Postprocessing(settings.sampling.postprocessing, data.image)
    return data


def _fitting_size(settings: RunConfig, data: DataModule) -> list[int]:
    """A size near that of the images that the model can make; empty where none is near.

    Patches are no larger than the images.
    """
    image = data.image.encoded
    for step in (4, 8, 16, 32, 64, 128):
        size = near_multiples(image.size, step)
        if image.patches:
            room = data.cache.shape[2:]
            size = [min(side, most // step * step) for side, most in zip(size, room, strict=True)]
        fitting = image.model_copy(update={"size": tuple(size)})
        if min(size) > 0 and not settings.model.faults(fitting):
            return size
    return []


def _inputs(settings: RunConfig, data_path: Path) -> dict[str, Path | None]:
    """The local files that a training reads, by the name of their option."""
    named = {
        "training.start_from": settings.training.start_from,
        "model.first_stage": getattr(settings.model, "first_stage", ""),
    }
    models = {name: Path(text) for name, text in named.items() if text and ":" not in str(text)}
    return {"data_path": data_path, **models}


def _end(run: Path, checkpoint: Path | None, training: TrainingConfig) -> str:
    """What to change to continue a complete training; empty if it is not complete."""
    if checkpoint is None:
        return ""
    if checkpoints.is_complete(checkpoint, training):
        end = "raise training.max_epochs, or max_minutes,"
    elif reason := stopped_early(checkpoint, training):
        end = reason
    else:
        return ""
    if checkpoint.parent.resolve() != (run / "checkpoints").resolve():
        raise ConfigError(
            f"--resume {checkpoint}: its training is complete; {end} to continue it. Its model is "
            "in its run folder, which synthcube infer and training.start_from take."
        )
    return end


def _join(settings: RunConfig, device: torch.device) -> int:
    """This process's rank in the training; all but the first log only warnings."""
    num_devices = compute.devices_used(settings.compute, device)
    compute.require_even_shares(settings.compute, num_devices, settings.training.batch_size)
    processes = num_devices * settings.compute.num_nodes
    rank = environment.process_rank(num_devices) if processes > 1 else 0
    if rank:
        log.setLevel(logging.WARNING)
    if device.type == "cuda" and num_devices > 1:
        # What is built before Lightning takes over belongs on this process's own GPU.
        torch.cuda.set_device(environment.local_rank() % torch.cuda.device_count())
    return rank


def _fit(
    run: Path, settings: RunConfig, data: DataModule, precision: str, device: torch.device,
    checkpoint: Path | None, preemption: Preemption, accept_changes: bool,
    federated_round: FederatedRound | None, budget: Budget | None,
) -> None:  # fmt: skip
    if budget:
        log.info(privacy_line(budget, _steps(settings, data)))
    log.info(
        "%d training and %d validation images of size %s, %d channel(s).",
        len(data.rows("train")), len(data.rows("validation")),
        data.sides.replace(" x ", "x"), data.image.channels,
    )  # fmt: skip
    torch.manual_seed(environment.derived_seed(settings.seed, "weights"))
    sampled = settings.model.with_sampling(settings.sampling.of_model())
    family = sampled.build(data.image.encoded).to(device)
    if checkpoint:
        checkpoints.check_fits(checkpoint, family)
        epochs, steps = checkpoints.reached(checkpoint)
        is_within = checkpoints.position(checkpoint)[1]
        where = f"in epoch {epochs + 1}, after" if is_within else f"after epoch {epochs},"
        log.info("Continuing %s step %d, from %s.", where, steps, checkpoint)
    family.fit_statistics(data.every_image(), data.rows("train"))
    if federated_round and federated_round.moments and isinstance(family, ScalesByMoments):
        family.scale_by(federated_round.moments)
    if not checkpoint:
        # After `fit_statistics`, which it overwrites: the weights belong to their own statistics.
        fine_tuning.take_weights(family, settings.training)
        if federated_round and federated_round.weights is not None:
            family.load_state_dict({**family.state_dict(), **federated_round.weights})
    term = _proximal_term(family, settings, federated_round.proximal) if federated_round else None
    fit(
        family,
        TrainingRun(
            data, settings.training, settings.compute, run, settings.seed, precision, device,
            checkpoint, preemption, accept_changes, settings.dump(),
            federated_round.until_epoch if federated_round else None, term, budget,
        ),
    )  # fmt: skip


def _proximal_term(
    family: Family, settings: RunConfig, proximal: Proximal | None
) -> ProximalTerm | None:
    """The term that holds a site near the weights of its round; None without one."""
    if proximal is None:
        return None
    weights = proximal.weights
    if weights is None:  # the first round, also where it is resumed from a checkpoint
        fine_tuning.take_weights(family, settings.training)
        weights = {name: weight.detach().clone() for name, weight in family.named_parameters()}
    return ProximalTerm(proximal.mu, weights)


def planned_budget(
    settings: RunConfig, data: DataModule, checkpoint: Path | None = None
) -> Budget | None:
    """The budget of a private training, with the steps of its checkpoint; None without privacy.

    Raises ConfigError where the checkpoint does not fit, or more would be spent than is allowed.
    """
    if settings.training.privacy is None:
        return None
    before = None
    if checkpoint:
        before = recorded_budget(checkpoints.load(checkpoint, mapped=True), checkpoint)
    return accountant.planned(
        settings.training.privacy, settings.training.batch_size, len(data.training_subjects),
        _steps(settings, data), before,
    )  # fmt: skip


def privacy_line(budget: Budget, steps: int) -> str:
    """What a private training does and spends, in a line."""
    spent = f", of which {budget.steps} have spent {budget.epsilon:.3g}" if budget.steps else ""
    return (
        f"privacy: epsilon {budget.after(steps):.3g} and delta {budget.delta:.2g} for each of "
        f"{budget.subjects} subjects after {steps} steps{spent}; each joins a step with "
        f"probability {budget.sample_rate:.3g}, noise multiplier (sigma) {budget.sigma:.3g}, "
        f"clip norm {budget.clip_norm:g}"
    )


def _steps(settings: RunConfig, data: DataModule) -> int:
    """Steps of a private training in all."""
    subjects = len(data.training_subjects)
    return settings.training.max_epochs * steps_per_epoch(subjects, settings.training.batch_size)


def need_of(
    settings: RunConfig, image: ImageSpec, precision: str, device: torch.device
) -> MemoryEstimate:
    """Estimate of the memory that a run on `device` needs."""
    return MemoryEstimate(
        settings.model, image.encoded, settings.training, settings.compute, precision, device,
        settings.data.num_workers,
    )  # fmt: skip


def _log_memory_estimate(estimate: MemoryEstimate) -> None:
    """Log the memory that is needed and free, and a warning if too little is free."""
    free = estimate.bytes_free()
    try:
        needed = estimate.bytes_needed()
    except Exception as error:  # the training will report the fault better
        log.debug("No estimate of memory: %s", error)
        return
    log.info("Needs about %.2f GB beside the libraries; %.2f GB free.", needed / 1e9, free / 1e9)
    if shortage := memory.warning(estimate, needed, free):
        log.warning(shortage)


def _what_remains(run: Path) -> str:
    last = run / "checkpoints" / checkpoints.LAST
    if last.exists():
        return f"The last checkpoint, {last}, is intact."
    return "There is no checkpoint yet, and nothing half-written."
