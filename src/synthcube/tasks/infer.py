"""Infer: a trained model in, images with their provenance out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from synthcube import compute, config, environment, storage
from synthcube.config import Animation, OutputFormat
from synthcube.data.conditions import parse_counts, read_condition_requests
from synthcube.data.manifest import require_outside
from synthcube.errors import ConfigError, FamilyError
from synthcube.models import artifact
from synthcube.models.artifact import Artifact
from synthcube.models.family import SAMPLING_KEYS, Reconstructs, Samples, sampling_field
from synthcube.schema import flattened
from synthcube.sharing.config import CroissantConfig
from synthcube.sharing.croissant import wished
from synthcube.sharing.runtimes import RuntimeOrTorch
from synthcube.tasks.inference_jobs import Generation, Job, Reconstruction, Translation
from synthcube.tasks.loaded_model import LoadedModel, inference_settings
from synthcube.tasks.parallel_inference import make_alone, make_in_pool, make_in_ranks
from synthcube.tasks.run_folder import HELD_OUT, SPLIT, read_images, rows_of

log = logging.getLogger("synthcube")

_SAMPLING_KEYS = {sampling_field(key): f"sampling.{key}" for key in SAMPLING_KEYS}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """The images to make: of which model, where, how many, and with which settings.

    What is None is taken from `config`, or else from the config of the training.
    """

    model: Path
    output: Path
    num_images: int | str | Mapping[str, int] | None = None
    """How many, or "Hand=5,HeadCT=3": how many of each class; or a mapping of these."""
    seed: int | None = None
    data: Path | None = None
    """Images to reconstruct or to translate, or a run: those that it held out; None: images are
    generated."""
    batch_size: int | None = None
    guidance: float | None = None
    """How strictly conditions are followed."""
    sampler: str | None = None
    steps: int | None = None
    """Steps of the sampler."""
    animate: Animation | None = None
    """Write animation.gif: of the steps of the sampler, or of the slices of volumes."""
    format: OutputFormat | None = None
    """Write a DICOM series of each image too; over sampling.format."""
    config: Path | Mapping[str, Any] | None = None
    """A YAML, or its content: seed, sampling and compute, over those of the training."""
    overrides: Sequence[str] = ()
    """Keys of that YAML as "key=value"."""
    conditions: Sequence[str] = ()
    """"name=value" for all images; see data/conditions.py."""
    conditions_table: Path | Sequence[Mapping[str, str]] | None = None
    """A CSV, or its rows: the conditions of each image, in place of a number."""
    num_devices: int | None = None
    """In place of compute.num_devices; 1: this process makes every image."""
    croissant: CroissantConfig | None = None
    """Describe the images in croissant.json; over sampling.croissant."""
    runtime: RuntimeOrTorch | None = None
    """What computes the networks; over sampling.runtime."""

    def paths(self) -> dict[str, Path | None]:
        """What is read, by the name of its option."""
        files = {"config": self.config, "conditions": self.conditions_table}
        return {
            "model_path": self.model, "data_path": self.data,
            **{name: value for name, value in files.items() if isinstance(value, Path)},
        }  # fmt: skip


def infer(request: InferRequest) -> Path | None:
    """Generate, reconstruct or translate images; returns a picture of them.

    Of the processes that a launcher has started for it only the first returns one.
    """
    trained = artifact.load(request.model)
    storage.require_separate({"output_path": request.output}, request.paths())
    changes = stated_changes(request, trained)
    settings = inference_settings(trained, changes, request.runtime)
    device = compute.device(settings["compute"]["accelerator"])
    precision, reason = compute.resolve_precision(settings["compute"]["precision"], device)
    open_on = partial(open_job, request, settings, precision)
    launched = 1 if request.num_devices == 1 else environment.launched_processes()
    if launched > 1 and launched == _processes(settings["compute"], device):
        if device.type == "cuda":
            device = torch.device("cuda", environment.local_rank() % torch.cuda.device_count())
        return make_in_ranks(open_on, device)
    is_set = "num_devices" in changes.get("compute", {})
    number = request.num_devices or _devices(settings["compute"], is_set, device, launched)
    job = open_on(torch.device("cpu") if number > 1 else device)
    number = min(number, len(job.batches()))
    used = f"{number} x {device.type}" if number > 1 else device.type
    log.info("Computing on %s in %s (%s).", used, precision, reason)
    job.claim()
    if number == 1:
        job.model.family.to(device)
        return job.finish(make_alone(job))
    names = [f"{device.type}:{i}" if device.type == "cuda" else "cpu" for i in range(number)]
    return job.finish(make_in_pool(open_on, job.batches(), names))


def open_job(
    request: InferRequest, settings: Mapping[str, Any], precision: str, device: torch.device
) -> Job:
    """The job of a request, its model on `device`; every process opens its own.

    Args:
        settings: see :func:`inference_settings`.
    """
    job = _job(request, settings, precision, device)
    job.animate = settings["sampling"]["animate"]
    job.require_animation()
    job.format = settings["sampling"]["format"]
    job.require_format()
    return job


def _job(
    request: InferRequest, settings: Mapping[str, Any], precision: str, device: torch.device
) -> Job:
    trained = artifact.load(request.model)
    sampling = settings["sampling"]
    model = LoadedModel(trained, settings, device, precision)
    model.batch_size = request.batch_size or model.batch_size
    description = wished(sampling, request.croissant)
    seed = settings["seed"] if request.seed is None else request.seed
    name = settings["model"]["name"]
    if request.data:
        manifest = read_images(request.data)
        is_run = manifest.path == request.data / SPLIT
        if is_run:
            manifest = rows_of(manifest, HELD_OUT, "data_path")
        require_outside({"output_path": request.output}, manifest)
        if trained.image.source_channels:
            return Translation(
                model, request.output, description, manifest, seed, extrapolate=is_run
            )
        if not isinstance(model.family, Reconstructs):
            raise FamilyError(f"{name} does not reconstruct images: leave out data_path.")
        return Reconstruction(model, request.output, description, manifest)
    if trained.image.source_channels:
        raise FamilyError(
            f"This {name} makes images out of others (channels "
            f"{list(trained.image.source_channels)} of its data): give them as data_path."
        )
    if not isinstance(model.family, Samples):
        raise FamilyError(
            f"{name} does not generate images out of nothing: give images to reconstruct as "
            "data_path."
        )
    conditions = _condition_requests(request, trained, sampling["num_images"])
    return Generation(model, request.output, description, conditions, seed)


def _condition_requests(
    request: InferRequest, trained: Artifact, default: int | Mapping[str, int]
) -> list[dict[str, str]]:
    """The conditions that are requested of each generated image."""
    specs, table = trained.image.conditions, request.conditions_table
    if table is not None and not isinstance(table, Path):
        common = read_condition_requests(specs, len(table), request.conditions)
        return [{**all_images, **row} for all_images, row in zip(common, table, strict=True)]
    number = default if request.num_images is None else request.num_images
    number = parse_counts(number) if isinstance(number, str) else number
    return read_condition_requests(specs, number, request.conditions, table)


def stated_changes(request: InferRequest, trained: Artifact) -> dict[str, Any]:
    """The keys that the request sets.

    Raises:
        ConfigError: one of them is fixed by the training, and the model has another value.
    """
    settings = config.load_any(request.config or {}, request.overrides, trained=True)
    changes = settings.model_dump(mode="json", exclude_unset=True)
    _require_same_training(changes, trained)
    options = {
        "guidance": request.guidance, "sampler": request.sampler, "steps": request.steps,
        "animate": request.animate, "format": request.format,
    }  # fmt: skip
    stated = {key: value for key, value in options.items() if value is not None}
    return changes | {"sampling": {**changes.get("sampling", {}), **stated}}


# A path of the training, which an exported model does not name; and what changes no image.
_MAY_DIFFER = ("first_stage", "num_workers", "cache_gb", "validation_fraction")


def _require_same_training(changes: Mapping[str, Any], trained: Artifact) -> None:
    """Refuse keys of the model and its images that the training has fixed to other values."""
    faults = []
    family = trained.config["model"]["name"]
    for section in ("model", "data"):
        before = flattened(trained.config.get(section, {}))
        for key, value in flattened(changes.get(section, {})).items():
            if key.startswith(_MAY_DIFFER):
                continue
            instead = _SAMPLING_KEYS.get(key.rpartition(".")[2]) if section == "model" else None
            if key not in before and section == "model":
                faults.append(f"model.{key}: {family} has no such key: leave it out")
            elif before.get(key, value) != value:
                faults.append(
                    f"{section}.{key} is {value!r}, the model was trained with {before[key]!r}: "
                    + (f"use {instead}" if instead else "leave it out")
                )
    if faults:
        raise ConfigError("These keys cannot be changed after the training:", faults)


def _processes(section: Mapping[str, Any], device: torch.device) -> int:
    """The number of processes that the config asks for, on all nodes."""
    present = torch.cuda.device_count() if device.type == "cuda" else 1
    return int((section.get("num_devices") or present) * section.get("num_nodes", 1))


def _devices(section: Mapping[str, Any], is_set: bool, device: torch.device, launched: int) -> int:
    """The number of devices of this machine to use, each by a process of its own.

    Args:
        is_set: the number is in the YAML of this inference, not in that of the training.
    """
    if launched > 1:
        log.warning(
            "A launcher has started %d processes, but compute.num_devices x num_nodes is %d: this "
            "process makes every image.", launched, _processes(section, device),
        )  # fmt: skip
        return 1
    number = section.get("num_devices")
    if not is_set and number and device.type == "cuda":
        number = min(number, torch.cuda.device_count())  # the training's machine may have had more
    return compute.devices_used(compute.ComputeConfig(num_devices=number), device)
