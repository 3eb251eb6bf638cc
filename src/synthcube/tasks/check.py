"""Check: find what could fail in a training before it starts."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthcube import compute, config, environment
from synthcube.config import RunConfig
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError, SynthCubeError
from synthcube.tasks import hub_pins, train
from synthcube.training import deepspeed, fine_tuning, memory


def check(config_path: Path, data_path: Path, *, overrides: Sequence[str] = ()) -> list[str]:
    """Read the config and every image, and build the model; returns one line for each result.

    All faults of the config and of the manifest are raised together, or all faults of images.
    """
    settings, manifest = results_or_faults(
        lambda: hub_pins.pinned(config.load(config_path, overrides), {}),
        lambda: read_manifest(data_path),
    )
    data = train.open_data(settings, manifest)
    return [*_data_lines(data), *_start_lines(settings, data), *_resource_lines(settings, data)]


def results_or_faults(*steps: Callable[[], Any]) -> list[Any]:
    """The results of all steps; the user's faults in all of them are raised together."""
    results, faults = [], []
    for step in steps:
        try:
            results.append(step())
        except SynthCubeError as error:
            faults.append(error)
    if faults:
        raise faults[0] if len(faults) == 1 else ConfigError("\n".join(map(str, faults)))
    return results


def _start_lines(settings: RunConfig, data: DataModule) -> list[str]:
    training = fine_tuning.resolved(settings.training, {})
    if training.start_from is None:
        return []
    family = settings.model.build(data.image)
    fine_tuning.take_weights(family, training)
    fine_tuning.freeze(family, training)
    trained = sum(parameter.requires_grad for parameter in family.parameters())
    return [f"start: {training.start_from} fits, {trained} weights are trained further"]


def _data_lines(data: DataModule) -> list[str]:
    image, rows = data.image, data.manifest.rows
    subjects = len({row.subject for row in rows})
    ranges = data.cache.intensity_ranges  # (N, C, 2)
    lines = [
        f"images: {len(rows)} of {subjects} subjects, all readable and of one shape",
        f"splits: {dict(Counter(data.splits))}",
        f"size: {' x '.join(map(str, image.size))}, {image.channels} channel(s), "
        f"{' x '.join(f'{side:g}' for side in image.spacing_mm)} mm",
    ]
    for channel in range(image.channels):
        low, high = ranges[:, channel].mean(axis=0)
        lines.append(f"channel {channel}: intensities {low:g} to {high:g} become -1 to 1")
    if image.labels:
        counts = Counter(row.label for row in rows)
        named = {name: counts[index] for index, name in enumerate(image.labels)}
        lines.append(f"classes: {named}")
    if not data.rows("validation"):
        lines.append("no validation images: the best checkpoint is chosen by the training loss")
    return lines


def _resource_lines(settings: RunConfig, data: DataModule) -> list[str]:
    device = compute.device(settings.compute.accelerator)
    precision, reason = compute.resolve_precision(settings.compute.precision, device)
    deepspeed.require_usable(settings.compute, settings.training, device)
    num_devices = compute.devices_used(settings.compute, device)
    compute.require_even_shares(settings.compute, num_devices, settings.training.batch_size)
    estimate = train.need_of(settings, data.image, precision, device)
    weights, needed = estimate.estimate().weights, estimate.bytes_needed()
    shortage = memory.warning(estimate, needed, estimate.bytes_free())
    # Two checkpoints of weights, average and two moments, and a third one while it is written.
    on_disk = 3 * 4 * weights + weights
    free = shutil.disk_usage(Path.cwd()).free
    steps = len(data.train_dataloader()) * settings.training.max_epochs
    return [
        f"model: {settings.model.name}, {weights / 1e6:.1f} MB of weights",
        f"precision: {precision} on {device.type} ({reason})",
        f"memory: about {needed / 1e9:.2f} GB at batch size {settings.training.batch_size}, "
        f"beside about 1 GB of libraries{' for each process' if estimate.processes > 1 else ''}",
        *([shortage] if shortage else []),
        f"disk: about {on_disk / 1e6:.0f} MB for the run, {free / 1e9:.1f} GB free here; the "
        f"cache holds {np.prod(data.cache.shape) * 4 / 1e6:.0f} MB in {environment.cache_folder()}",
        f"length: {steps} steps in {settings.training.max_epochs} epochs",
    ]
