"""Infer: a trained model in, images with their provenance out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from synthcube import compute, config, environment, storage
from synthcube.data.conditions import parse_counts, read_wishes
from synthcube.data.manifest import read_manifest, require_outside
from synthcube.data.postprocessing import Postprocessing
from synthcube.errors import ConfigError, FamilyError
from synthcube.models import artifact
from synthcube.models.artifact import Artifact
from synthcube.models.family import Reconstructs, Samples
from synthcube.sharing.conversion import substitute
from synthcube.sharing.croissant import CroissantConfig, wished
from synthcube.tasks.inference_jobs import Generation, Job, Reconstruction, Request, Translation
from synthcube.tasks.parallel_inference import make_alone, make_in_pool, make_in_ranks

log = logging.getLogger("synthcube")


def infer(
    model_path: Path,
    out: Path,
    *,
    num_images: int | str | None = None,
    seed: int | None = None,
    data_path: Path | None = None,
    batch_size: int | None = None,
    config_path: Path | None = None,
    conditions: Sequence[str] = (),
    conditions_path: Path | None = None,
    num_devices: int | None = None,
    croissant: CroissantConfig | None = None,
    with_runtime: str | None = None,
) -> Path | None:
    """Generate images, or reconstruct or translate those at `data_path`; returns a picture of them.

    Of the processes that a launcher has started for it only the first returns one.

    Args:
        num_images: how many, or "Hand=5,HeadCT=3": how many of each class.
        conditions: "name=value" that all images follow; see data/wishes.py.
        conditions_path: CSV of what each image follows, in place of a number.
        config_path: YAML whose seed, sampling and compute win over those of the training.
        num_devices: in place of compute.num_devices; 1 makes every image in this process.
        croissant: over sampling.croissant: describe the images in croissant.json.
        with_runtime: over sampling.runtime: torch, onnx or openvino computes the networks.

    Raises:
        ConfigError: the YAML is not valid.
        ArtifactError: there is no trained model, or it is damaged.
        FamilyError: the family cannot do what is asked.
        OutputError: `out` is not writable, or holds other images.
    """
    trained = artifact.load(model_path)
    storage.require_separate(
        {"output_path": out},
        {
            "model_path": model_path, "data_path": data_path, "config": config_path,
            "conditions": conditions_path,
        },
    )  # fmt: skip
    settings, given = _settings(trained, config_path)
    computed_by = with_runtime or settings["sampling"].get("runtime", "torch")
    settings = _for_runtime(settings, computed_by)
    device = compute.device(settings["compute"]["accelerator"])
    precision, reason = compute.precision(settings["compute"]["precision"], device)
    asked = _Asked(
        model_path, out, settings, precision, num_images, seed, data_path, batch_size,
        tuple(conditions), conditions_path, wished(settings["sampling"], croissant),
        computed_by,
    )  # fmt: skip
    launched = 1 if num_devices == 1 else environment.launched_processes()
    if launched > 1 and launched == _processes(settings["compute"], device):
        return make_in_ranks(asked.open, _own_device(device))
    number = num_devices or _devices(settings["compute"], given, device, launched)
    job = asked.open(torch.device("cpu") if number > 1 else device)
    number = min(number, len(job.batches()))
    shown = f"{number} x {device.type}" if number > 1 else device.type
    log.info("Computing on %s in %s (%s).", shown, precision, reason)
    job.claim()
    if number == 1:
        job.request.family.to(device)
        return job.finish(make_alone(job))
    names = [f"{device.type}:{i}" if device.type == "cuda" else "cpu" for i in range(number)]
    return job.finish(make_in_pool(asked.open, job.batches(), names))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What infer was asked for, in values that another process can be given."""

    model_path: Path
    out: Path
    settings: dict[str, Any]
    precision: str
    num_images: int | str | None
    seed: int | None
    data_path: Path | None
    batch_size: int | None
    conditions: tuple[str, ...]
    conditions_path: Path | None
    croissant: CroissantConfig | None
    runtime: Any  # torch, or one of export.config.Runtime

    def open(self, device: torch.device) -> Job:
        """The job, its model on that device."""
        trained, settings = artifact.load(self.model_path), self.settings
        family = trained.build(device)
        if self.runtime != "torch":
            substitute(family, trained.folder, self.runtime)
        request = Request(
            trained, family, self.out, self.batch_size or settings["sampling"]["batch_size"],
            self.precision, settings["seed"] if self.seed is None else self.seed,
            Postprocessing(settings["sampling"].get("postprocessing", ()), trained.image),
            self.runtime, self.croissant,
        )  # fmt: skip
        if self.data_path:
            return self._of_images(request, self.data_path)
        return self._of_noise(request)

    def _of_images(self, request: Request, data_path: Path) -> Job:
        manifest = read_manifest(data_path)
        require_outside({"output_path": self.out}, manifest)
        if request.trained.image.source_channels:
            return Translation(request, manifest)
        if not isinstance(request.family, Reconstructs):
            name = self.settings["model"]["name"]
            raise FamilyError(f"{name} does not reconstruct images: leave out data_path.")
        return Reconstruction(request, manifest)

    def _of_noise(self, request: Request) -> Job:
        image, settings = request.trained.image, self.settings
        name = settings["model"]["name"]
        if image.source_channels:
            raise FamilyError(
                f"This {name} makes images out of others (channels "
                f"{list(image.source_channels)} of its data): give them as data_path."
            )
        if not isinstance(request.family, Samples):
            raise FamilyError(
                f"{name} does not generate images out of nothing: give images to reconstruct as "
                "data_path."
            )
        number = settings["sampling"]["num_images"] if self.num_images is None else self.num_images
        number = parse_counts(number) if isinstance(number, str) else number
        wishes = read_wishes(image.conditions, number, self.conditions, self.conditions_path)
        return Generation(request, wishes)


def _settings(trained: Artifact, config_path: Path | None) -> tuple[dict[str, Any], set[str]]:
    """The training's settings, those in the YAML over them; and which keys of compute it has."""
    settings = config.trained_settings(trained)
    given: dict[str, Any] = {}
    if config_path:
        given = config.load(config_path, trained=True).model_dump(mode="json", exclude_unset=True)
        settings["seed"] = given.get("seed", settings["seed"])
        for section in ("sampling", "compute"):
            settings[section] = {**settings[section], **given.get(section, {})}
    return settings, {*given.get("compute", {})}


def _for_runtime(settings: dict[str, Any], computed_by: str) -> dict[str, Any]:
    """Other runtimes than torch compute on the CPU, and in 32 bits, as they were checked.

    Raises:
        ConfigError: a GPU is asked for.
    """
    if computed_by == "torch":
        return settings
    if settings["compute"]["accelerator"] == "gpu":
        raise ConfigError(
            f"--runtime {computed_by} computes on the CPU, and compute.accelerator is gpu: use "
            "auto or cpu, or the runtime torch."
        )
    own = settings["compute"] | {"accelerator": "cpu", "precision": "32-true"}
    return settings | {"compute": own}


def _own_device(device: torch.device) -> torch.device:
    """That of this process among those of its node."""
    if device.type == "cpu":
        return device
    return torch.device("cuda", environment.local_rank() % torch.cuda.device_count())


def _processes(section: Mapping[str, Any], device: torch.device) -> int:
    """Processes that the config tells of, on all nodes."""
    present = torch.cuda.device_count() if device.type == "cuda" else 1
    return int((section.get("num_devices") or present) * section.get("num_nodes", 1))


def _devices(
    section: Mapping[str, Any], given: set[str], device: torch.device, launched: int
) -> int:
    """Devices of this machine to use, with a process of ours for each.

    Raises:
        ConfigError: the YAML asks for more than there are.
    """
    if launched > 1:
        log.warning(
            "A launcher has started %d processes, but compute.num_devices x num_nodes is %d: this "
            "process makes every image.", launched, _processes(section, device),
        )  # fmt: skip
        return 1
    number = section.get("num_devices")
    if "num_devices" not in given and number and device.type == "cuda":
        number = min(number, torch.cuda.device_count())  # those of the training's machine
    return compute.devices_used(compute.ComputeConfig(num_devices=number), device)
