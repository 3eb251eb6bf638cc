"""Check: find what could fail in a training before it starts."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthcube import compute, config, environment
from synthcube.config import RunConfig
from synthcube.data.manifest import image_suffix, read_manifest, split_warning
from synthcube.data.module import DataModule
from synthcube.errors import SynthCubeError, results_or_faults
from synthcube.models.first_stage import TwoStageFamily
from synthcube.tasks import hub_pins, plan, train
from synthcube.training import deepspeed, fine_tuning, leaks, memory
from synthcube.training.accountant import noise_warning
from synthcube.training.privacy import require_differentiable, trained

_SMALL_PART = 0.05  # of the range from -1 to 1: masks and wrong units, but no real image


@dataclass(frozen=True)
class CheckReport:
    """One line for each result, what may do harm, and what the memory lacks (empty: nothing)."""

    lines: list[str]
    warnings: list[str]
    shortage: str


def check(config_path: Path, data_path: Path, *, overrides: Sequence[str] = ()) -> CheckReport:
    """Read the config and every image, and build the model.

    All faults of the config and of the manifest are raised together, or all faults of images.
    """
    settings, manifest = results_or_faults(
        lambda: hub_pins.pinned(config.load(config_path, overrides), {}),
        lambda: read_manifest(data_path),
    )
    data = train.open_data(settings, manifest)
    lines = [*_data_lines(data), *_start_lines(settings, data)]
    resources, shortage = _resources(settings, data)
    privacy, hopeless = _privacy(settings, data)
    lines += [*resources, *privacy, *_plan_lines(settings, data)]
    return CheckReport(lines, [*_data_warnings(data), *hopeless], shortage)


def _plan_lines(settings: RunConfig, data: DataModule) -> list[str]:
    """Where the config differs from what `synthcube plan` would choose, which knows no privacy."""
    if settings.training.privacy:
        return []
    try:
        return plan.differences(settings, data.files)
    except SynthCubeError:  # no plan fits, which the lines above tell better
        return []


def _privacy(settings: RunConfig, data: DataModule) -> tuple[list[str], list[str]]:
    """What a private training does and spends, and a warning where it is mostly noise."""
    budget = train.planned_budget(settings, data)
    if budget is None or settings.training.privacy is None:
        return [], []
    leaks.require_one_process(
        settings.training, settings.compute, compute.device(settings.compute.accelerator)
    )
    family = settings.model.build(data.image.encoded).train()
    fine_tuning.take_weights(family, settings.training)
    fine_tuning.freeze(family, settings.training)
    leaks.require_private(family)
    if not isinstance(family, TwoStageFamily):  # which compresses the images first
        rows = [rows[0] for rows in data.training_subjects[:2]]
        require_differentiable(family, data.examples(rows), settings.training.privacy)
    weights = sum(weight.numel() for weight in trained(family).values())
    lines = [
        train.privacy_line(budget, settings.training.max_epochs * len(data.train_dataloader())),
        f"noise over the largest possible signal in a step: {budget.noise_over_signal(weights):.2g}"
        f" ({weights} trained weights)",
    ]
    warning = noise_warning(budget, weights)
    return lines, [warning] if warning else []


def _start_lines(settings: RunConfig, data: DataModule) -> list[str]:
    training = fine_tuning.resolved(settings.training, {})
    if training.start_from is None:
        return []
    family = settings.model.build(data.image.encoded)
    fine_tuning.take_weights(family, training)
    fine_tuning.freeze(family, training)
    trained = sum(parameter.requires_grad for parameter in family.parameters())
    return [f"start: {training.start_from} fits, {trained} weights are trained further"]


def _data_lines(data: DataModule) -> list[str]:
    image, rows = data.image, data.manifest.rows
    volumes = f" (slices of {len(data.files.rows)} volumes)" if data.config.slices else ""
    subjects = len({row.subject for row in rows})
    ranges = data.cache.intensity_ranges  # (N, C, 2)
    lines = [
        f"images: {len(rows)}{volumes} of {subjects} subjects, all readable and of "
        f"{'one shape' if data.cache.is_of_one_shape else 'several shapes'}",
        f"splits: {dict(Counter(data.splits))}",
        f"size: {data.sides}, {image.channels} channel(s), "
        f"{' x '.join(f'{side:g}' for side in image.spacing_mm)} mm",
    ]
    masks = data.config.masks
    for channel in range(data.cache.shape[1]):
        if channel in masks:
            shares = _class_shares(data, channel, len(masks[channel]))
            listed = ", ".join(
                f"{value} ({share:.2%})"
                for value, share in zip(masks[channel], shares, strict=True)
            )
            lines.append(f"channel {channel}: a mask, share of the voxels of each class: {listed}")
        else:
            low, high = ranges[:, channel].mean(axis=0)
            lines.append(f"channel {channel}: intensities {low:g} to {high:g} become -1 to 1")
    if image.labels:
        counts = Counter(row.label for row in rows)
        named = {name: counts[index] for index, name in enumerate(image.labels)}
        lines.append(f"classes: {named}")
    if not data.rows("validation") and not data.private:
        lines.append("no validation images: the best checkpoint is chosen by the training loss")
    return lines


def _data_warnings(data: DataModule) -> list[str]:
    folder = os.path.commonpath([row.channels[0].parent for row in data.files.rows])
    subjects = {}
    for row in data.files.rows:
        name = row.channels[0].relative_to(folder).as_posix()
        subjects[name[: -len(image_suffix(row.channels[0]))]] = row.subject
    warnings = [split_warning(subjects), _held_out_warning(data), *_flat_warnings(data)]
    warnings.append(data.mask_warning())
    return [warning for warning in warnings if warning]


def _held_out_warning(data: DataModule) -> str:
    rows, asked_for = data.manifest.rows, data.config.validation_fraction
    if any(row.split for row in rows):
        return ""  # the user's own split
    subjects = {row.subject for row in rows}
    held_out = {rows[index].subject for index in data.rows("validation")}
    share = len(held_out) / len(subjects)
    if abs(share - asked_for) <= max(0.05, asked_for / 2):
        return ""
    return (
        f"{len(held_out)} of {len(subjects)} subjects ({share:.0%}) are held out for validation, "
        f"and data.validation_fraction is {asked_for:g}: there are too few subjects to come nearer "
        "(each class with several subjects is in both parts). Add subjects, or give the split in "
        "a column Split"
    )


def _class_shares(data: DataModule, channel: int, count: int) -> npt.NDArray[np.float64]:
    """(count,): the share of the voxels of all images that are of each class of a mask."""
    numbers = np.zeros(count)
    for image in _flattened(data):
        places = np.rint((image[channel] + 1) / 2 * (count - 1)).astype(np.int64)
        numbers += np.bincount(places, minlength=count)
    shares: npt.NDArray[np.float64] = numbers / numbers.sum()
    return shares


def _flat_warnings(data: DataModule) -> list[str]:
    """One for each channel that fills a small part of its fixed range in every image."""
    fixed = [data.config.fixed_range(channel) for channel in range(data.cache.shape[1])]
    if not any(pair for _, pair in fixed):
        return []
    ends = [(image.min(axis=1), image.max(axis=1)) for image in _flattened(data)]
    lowest, highest = np.stack(ends, axis=1)  # (N, C) each
    contrasts = (highest - lowest).max(axis=0) / 2
    warnings = []
    for channel, ((key, pair), contrast) in enumerate(zip(fixed, contrasts, strict=True)):
        if pair is None or contrast >= _SMALL_PART:
            continue
        low, high = pair
        first, last = (
            low + (end[channel] + 1) / 2 * (high - low)
            for end in (lowest.min(axis=0), highest.max(axis=0))
        )
        warnings.append(
            f"channel {channel} is nearly flat under {key} [{low:g}, {high:g}]: its intensities "
            f"are {first:g} to {last:g}, {contrast:.1%} of the range at most. Give a range that "
            "fits, or null for percentiles of each image"
        )
    return warnings


def _flattened(data: DataModule) -> Iterator[npt.NDArray[np.float32]]:
    """Each image as (C, voxels), in [-1, 1]."""
    for index in range(len(data.cache)):
        image = data.cache.read([index])[0]
        yield image.reshape(len(image), -1)


def _resources(settings: RunConfig, data: DataModule) -> tuple[list[str], str]:
    """What the training needs, line by line, and what the memory lacks."""
    device = compute.device(settings.compute.accelerator)
    precision, reason = compute.resolve_precision(settings.compute.precision, device)
    deepspeed.require_usable(settings.compute, settings.training, device)
    num_devices = compute.devices_used(settings.compute, device)
    compute.require_even_shares(settings.compute, num_devices, settings.training.batch_size)
    estimate = train.need_of(settings, data.image, precision, device)
    of_patches = " of patches" if data.image.patches else ""
    weights, needed = estimate.estimate().weights, estimate.bytes_needed()
    shortage = memory.warning(estimate, needed, estimate.bytes_free())
    # Two checkpoints of weights, average and two moments, and a third one while it is written.
    on_disk = 3 * 4 * weights + weights
    free = shutil.disk_usage(Path.cwd()).free
    steps = len(data.train_dataloader()) * settings.training.max_epochs
    lines = [
        f"model: {settings.model.name}, {weights / 1e6:.1f} MB of weights",
        f"precision: {precision} on {device.type} ({reason})",
        f"memory: about {needed / 1e9:.2f} GB at batch size {settings.training.batch_size}"
        f"{of_patches}, "
        f"beside about 1 GB of libraries{' for each process' if estimate.processes > 1 else ''}",
        f"disk: about {on_disk / 1e6:.0f} MB for the run, {free / 1e9:.1f} GB free here; the "
        f"cache holds {data.cache.nbytes / 1e6:.0f} MB in {environment.cache_folder()}",
        f"length: {steps} steps in {settings.training.max_epochs} epochs",
    ]
    return lines, shortage
