"""The rules of `synthcube plan`: each chooses keys of the config, with a reason for the user.

A rule that was not measured in this project names its source. Learning rates and schedules are the
family's defaults.

No rule ever adds a flip: across the body's midline it would put the liver on the left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from synthcube.errors import ConfigError, SynthCubeError
from synthcube.evaluation.config import EvaluationConfig
from synthcube.models.families.autoencoder_kl import AutoencoderKLConfig
from synthcube.models.families.rectified_flow import RectifiedFlowConfig
from synthcube.models.nets.unet import CONDITIONED_GROUPS, UNetFields
from synthcube.planning.draft import Draft, lookup
from synthcube.planning.length import is_small, lacks_steps
from synthcube.schema import ImageSpec, near_multiples
from synthcube.training.config import TrainingConfig

DEFAULTS = TrainingConfig()
SMALL_SIDE = {2: 64, 3: 32}
"""Longest side on a CPU, where time is short: the sizes of the configs of `synthcube init`."""
PIXEL_SIDE = 256
"""Longest side of a picture on a GPU; U-Nets in pixel space are published up to it."""
LEAST_SIDE = {2: 32, 3: 16}
FAR_OFF = 1.5
"""From what factor on a side or a batch that differs from the plan's is worth a line."""
_LEAST_COARSE = 4  # voxels along the shortest side of the coarsest level (nnU-Net)
_LEAST_OF_THICK = 2  # of few thick slices: a level halves all sides, and the others are long
MOST_TOKENS = 4096  # at the finest level with attention
_BATCH_SHARE = 0.05  # of the images in one step (nnU-Net)
_BATCH_SHARE_ON_CPU = 0.1  # of pictures
_VOLUME_BATCH = 4  # WFM trains with 4 volumes, MAISI with 1 or 2, WDM with 10 at 128^3
_FEW_IMAGES = 500
_BATCH_ON_CPU = 8  # of pictures
_CHANNELS_OF_SMALL = (16, 32, 64)  # of pictures of 32 x 32 (docs/recipes.md)
_ANISOTROPIC = 3.0
_MOST_VALIDATED = 2000
_FEW_OF_A_CLASS = 10
_MOST_FALSE_ALARMS = 0.3


def choose_model(draft: Draft) -> None:
    """The family: a generator in pixel space, or for goal compress an autoencoder.

    A flow in pixel space needs one training; a latent one needs two, and the first limits what
    can be seen. It is an alternative that the table names where it would save memory.
    """
    request = draft.request
    name: str = RectifiedFlowConfig.model_fields["name"].default
    reason = "one training, good images in 20 steps"
    if request.goal == "compress":
        name = AutoencoderKLConfig.model_fields["name"].default
        reason = "goal compress: the first stage of latent_diffusion"
    if request.family:
        name, reason = request.family, "--family"
    draft.choose("model.name", name, reason)


def choose_channels(draft: Draft) -> None:
    """What each channel is, and which of them are given."""
    measured, masks = draft.fingerprint, draft.fingerprint.masks
    if masks:
        kinds: dict[int, dict[str, Any]] = {
            channel: {"kind": "mask", "classes": list(classes)}
            for channel, classes in masks.items()
        }
        kinds |= _fixed_ranges(draft)
        draft.choose("data.channels", kinds, "few whole numbers in all images: classes, no grey")
    elif ranges := _fixed_ranges(draft):
        low, high = ranges[0]["intensity_range"]
        if len(measured.channels) == 1:
            draft.choose(
                "data.intensity_range", [low, high],
                "Hounsfield units: the same grey means the same tissue in every image",
            )  # fmt: skip
        else:
            draft.choose("data.channels", ranges, "Hounsfield units: one range for all images")
    if draft.request.goal != "translate":
        return
    number = len(measured.channels)
    if number < 2:
        raise ConfigError(
            "--goal translate makes channels out of others, and these images have one channel: "
            "list both in a manifest (synthcube prepare --channels t1,t2)."
        )
    images = [channel for channel in range(number) if channel not in masks]
    sources = sorted(masks) if masks and images else list(range(number - 1))
    reason = "masks say where, images are made" if masks and images else "the last one is made"
    draft.choose("data.source_channels", sources, f"goal translate: {reason}")


def _fixed_ranges(draft: Draft) -> dict[int, dict[str, Any]]:
    """A fixed range for each channel that is a CT: whole numbers from about -1000.

    nnU-Net clips a CT to percentiles 0.5 and 99.5 of the foreground of all images; here air stays
    in, as a generator makes the background too.
    """
    ranges: dict[int, dict[str, Any]] = {}
    for channel, part in enumerate(draft.fingerprint.channels):
        is_ct = draft.fingerprint.has_geometry and part.integer and -3100 <= part.lowest <= -500
        if part.kind == "image" and is_ct:
            low = max(-1024.0, math.floor(part.lowest / 10) * 10)
            high = math.ceil(part.percentiles[2] / 50) * 50.0
            ranges[channel] = {"kind": "image", "intensity_range": [low, max(high, low + 100)]}
    return ranges


def choose_conditions(draft: Draft) -> None:
    """Follow the class where each has enough images, and is not a person."""
    counts = draft.fingerprint.class_counts
    known = [count for count in counts if count]
    if len(known) < 2 or draft.request.goal != "generate":
        return
    if "guidance" not in draft.family.model_fields:
        return  # of the families that make images, all but StyleGAN's kin follow classes so
    if draft.fingerprint.classes_of_subjects or min(known) < _FEW_OF_A_CLASS:
        draft.warnings.append(
            f"the {len(known)} classes are not followed: each must have at least "
            f"{_FEW_OF_A_CLASS} images, of several subjects"
        )
        return
    reason = f"{len(known)} classes of {min(known)} to {max(known)} images"
    draft.choose("data.conditions", {"Label": "class"}, reason)


def choose_validation(draft: Draft) -> None:
    """A tenth held out, but one subject at least, and no more than tell the loss apart."""
    measured = draft.fingerprint
    if measured.splits:
        return
    number = measured.num_subjects or measured.num_images
    share, reason = 0.1, "a tenth, split by subject"
    if number < 2:
        share, reason = 0.0, "a single subject: nothing can be held out"
    elif number < 10:
        share, reason = round(1 / number, 3), f"1 of {number} subjects"
    elif measured.num_images * share > _MOST_VALIDATED:
        share = max(0.001, round(_MOST_VALIDATED / measured.num_images, 3))
        reason = f"about {_MOST_VALIDATED:,} images: more would only take time"
    draft.choose("data.validation_fraction", share, reason)


def target_spacing(draft: Draft) -> tuple[float, ...]:
    """The spacing that volumes are resampled to: nnU-Net's rule.

    The median along each axis. If one axis is more than three times as coarse as the others and
    has less than a third of their voxels, it takes the 10th percentile there.
    """
    measured = draft.fingerprint
    spacing = list(draft.along_axes(measured.spacing_mm.median))
    voxels = draft.along_axes(measured.shape.median)
    worst = int(np.argmax(spacing))
    finer = [value for axis, value in enumerate(spacing) if axis != worst]
    more = [value for axis, value in enumerate(voxels) if axis != worst]
    if spacing[worst] > _ANISOTROPIC * max(finer) and voxels[worst] * 3 < min(more):
        tenth = draft.along_axes(measured.spacing_10)[worst]
        spacing[worst] = max(tenth, max(finer))
    return tuple(spacing)


def choose_size(draft: Draft, longest: int | None) -> None:
    """Size, and with it the spacing: the whole image, no longer than `longest` voxels.

    Volumes of several spacings or shapes get one spacing, and are padded to the largest: none is
    stretched. Pictures, which have no spacing, are resized.
    """
    measured = draft.fingerprint
    if draft.is_fixed("data.patches"):
        draft.choose("data.patches", None, "")
        return
    native = draft.along_axes(measured.shape.median)
    varies = not (measured.one_shape and measured.one_spacing)
    if measured.has_geometry and varies and not draft.is_fixed("data.size"):
        spacing = target_spacing(draft)
        extent = draft.along_axes(measured.extent_mm.highest)
        native = tuple(side / step for side, step in zip(extent, spacing, strict=True))
        factor = max(1.0, max(native) / (longest or math.inf))
        spacing = _coarser(spacing, factor)
        exact = tuple(side / step for side, step in zip(extent, spacing, strict=True))
        size = _fitting(draft, exact, up=True)
        reason = "the median, on a coarse axis its 10th percentile"
        if factor > 1:
            reason += f"; coarser, so that no side is above {longest}"
        draft.choose("data.spacing_mm", [float(f"{step:.4g}") for step in spacing], reason)
        draft.choose("data.fit", "crop_or_pad", "padded, not stretched: voxels keep their shape")
        draft.choose("data.size", size, "holds the largest image at this spacing")
        return
    exact = _within(native, draft.along_axes(measured.spacing_mm.median), longest or math.inf)
    size = _fitting(draft, exact, up=False)
    if size == [round(side) for side in native]:
        reason = "the size of the images" + ("" if measured.one_shape else " (median)")
    elif exact != native:
        what = " x ".join(f"{side:g}" for side in native)
        reason = f"{what} in the aspect, no side above {longest}"
        if len({round(before / side, 3) for before, side in zip(native, exact, strict=True)}) > 1:
            reason = f"{what}, fine axes made coarser until no side is above {longest}"
    else:
        reason = "the nearest size that the network takes"
    draft.choose("data.size", size, reason)


def _coarser(spacing: Sequence[float], factor: float) -> tuple[float, ...]:
    """A spacing with `factor`^rank times fewer voxels; fine axes give way first.

    So a volume of thick slices keeps its slices as long as the others can be coarser.
    """
    rank, steps = len(spacing), list(spacing)
    left = factor**rank
    while left > 1 + 1e-6:
        finest = min(steps)
        fine = [axis for axis, step in enumerate(steps) if step <= finest * (1 + 1e-6)]
        coarser = [step for step in steps if step > finest * (1 + 1e-6)]
        limit = min(coarser) / finest if coarser else math.inf
        grown = min(limit, left ** (1 / len(fine)))
        for axis in fine:
            steps[axis] *= grown
        left /= grown ** len(fine)
    return tuple(steps)


def _within(size: tuple[float, ...], spacing: Sequence[float], longest: float) -> tuple[float, ...]:
    """Sides of at most `longest` voxels: fine axes become coarser, thick slices stay."""
    extent = [side * step for side, step in zip(size, spacing, strict=True)]
    too_long = (length for length, side in zip(extent, size, strict=True) if side > longest)
    least = max(too_long, default=0.0) / longest
    return tuple(side * step / max(step, least) for side, step in zip(size, spacing, strict=True))


def _fitting(draft: Draft, exact: Sequence[float], *, up: bool) -> list[int]:
    """The size nearest to `exact` (or not below it) that the model can make."""
    levels = "channels" in draft.family.model_fields and issubclass(draft.family, UNetFields)
    step = 2 ** (_num_levels(exact, draft) - 1 + draft.wavelet_levels) if levels else 1
    while True:
        size = near_multiples([math.ceil(side) for side in exact], step)
        if up:
            size = [max(1, math.ceil(side / step - 1e-6)) * step for side in exact]
        if levels or step > max(exact) * 2 or _fits_model(draft, size):
            return size
        step *= 2


def _fits_model(draft: Draft, size: Sequence[int]) -> bool:
    """Whether the family makes images of that size."""
    settings = draft.config()
    image = draft.image(settings).model_copy(update={"size": tuple(size)})
    return not settings.model.faults(image)


def _num_levels(size: Sequence[float], draft: Draft) -> int:
    """Levels of a U-Net: coarse enough for attention, and 4 voxels left of the shortest side."""
    _, own = lookup(draft.fixed, "model.channels")
    if isinstance(own, list):
        return len(own)
    levels = len(_default_channels(draft))
    size = [side / 2**draft.wavelet_levels for side in size]
    least = _LEAST_COARSE if max(size) < 3 * min(size) else _LEAST_OF_THICK
    while levels > 2 and min(size) / 2 ** (levels - 1) < least:
        levels -= 1
    while (
        math.prod(size) / 2 ** (len(size) * (levels - 1)) > MOST_TOKENS
        and min(size) / 2**levels >= least
    ):
        levels += 1
    return levels


def _default_channels(draft: Draft) -> tuple[int, ...]:
    if draft.wavelet_levels and is_small(draft) and lacks_steps(draft):
        return _CHANNELS_OF_SMALL
    default: tuple[int, ...] = draft.family.model_fields["channels"].default
    return default


def choose_depth(draft: Draft) -> None:
    """Levels of a U-Net, and where it has attention: at no more than 4,096 places.

    A level halves every side. Attention compares each place with each other one, and takes memory
    with the square of their number.
    """
    if not issubclass(draft.family, UNetFields) or draft.family.needs:
        return
    size = draft.values["data"].get("size") or draft.values["data"].get("patches")
    if not size:
        return
    default = _default_channels(draft)
    levels = _num_levels(size, draft)
    channels = [*default[:levels], *[default[-1]] * (levels - len(default))]
    size = [side / 2**draft.wavelet_levels for side in size]
    coarse = " x ".join(f"{side / 2 ** (levels - 1):g}" for side in size)
    draft.choose("model.channels", channels, f"{levels} levels, the coarsest of {coarse} places")
    if draft.values["data"].get("conditions"):
        reason = "with a group for each channel, classes and the time pass less"
        draft.choose("model.num_norm_groups", CONDITIONED_GROUPS, reason)
    default_from: int = draft.family.model_fields["attention_from"].default
    if draft.family is RectifiedFlowConfig:
        default_from = levels - 1
    places = [math.prod(size) / 2 ** (len(size) * level) for level in range(levels)]
    first = next(
        (i for i, n in enumerate(places) if i >= default_from and n <= MOST_TOKENS), levels
    )
    what = f"{places[first]:,.0f} places" if first < levels else "no level is coarse enough"
    draft.choose("model.attention_from", first, f"{what}; more than {MOST_TOKENS:,} cost too much")


def choose_batch(draft: Draft) -> None:
    """Images in a step: the default, but 5% of the data at most (nnU-Net), and 4 volumes.

    Of pictures on a CPU 10%: with 5 of 108 drawn shapes the model of the demo drew pieces, with 8
    whole ones.
    """
    number, rank = draft.num_training_images, draft.rank
    lacking = lacks_steps(draft)
    share = _BATCH_SHARE if rank == 3 or draft.machine.is_gpu else _BATCH_SHARE_ON_CPU
    most = max(2, math.floor(share * number))
    size = min(_BATCH_ON_CPU if lacking else DEFAULTS.batch_size, most)
    reason = "on a CPU: smaller batches, more steps" if lacking else "the default"
    if size == most:
        reason = f"at most {share:.0%} of the {number} training images"
    if rank == 3 and size > _VOLUME_BATCH:
        size, reason = _VOLUME_BATCH, "published models of volumes train with 1 to 10"
    processes = draft.machine.processes
    if size % processes:
        size = processes * max(1, size // processes)
        reason += f", shared by {processes} processes"
    draft.choose("training.batch_size", min(size, max(1, number)), reason)


def fit_memory(draft: Draft, bytes_needed: Callable[[Draft], int]) -> bool:
    """Change the batch, then recompute, then narrow the network, until it fits; False if not.

    The order is that of docs/settings.md: what changes the images least comes first.
    """
    usable = draft.machine.usable
    needed = bytes_needed(draft)
    if needed > usable and not draft.is_fixed("training.batch_size"):
        needed = _halve_batch(draft, bytes_needed)
    if needed > usable and not draft.is_fixed("compute.activation_checkpointing"):
        reason = "the memory: a step takes about a quarter longer"
        draft.choose("compute.activation_checkpointing", True, reason)
        try:
            needed = bytes_needed(draft)
        except SynthCubeError:  # the family has no blocks to recompute
            draft.choose("compute.activation_checkpointing", False, "this family cannot")
    while needed > usable and _narrow(draft):
        needed = bytes_needed(draft)
    return needed <= usable


def _halve_batch(draft: Draft, bytes_needed: Callable[[Draft], int]) -> int:
    whole: int = draft.values["training"]["batch_size"]
    size, processes = whole, draft.machine.processes
    needed = bytes_needed(draft)
    while needed > draft.machine.usable and size > processes:
        size = max(1, size // 2 // processes) * processes
        accumulate = -(-whole // size)
        draft.choose("training.batch_size", size, "what the memory holds at once")
        draft.choose("training.accumulate", accumulate, f"steps of {whole} images all the same")
        needed = bytes_needed(draft)
    return needed


def _narrow(draft: Draft) -> bool:
    """Halve the channels of the first level, or the blocks; False if nothing is left to narrow.

    The first level works on every voxel (docs/benchmarks.md: 9.5 GB in place of over 14).
    """
    model = draft.values["model"]
    if "num_res_blocks" in draft.family.model_fields and not draft.is_fixed("model.num_res_blocks"):
        default = draft.family.model_fields["num_res_blocks"].default
        if model.get("num_res_blocks", default) > 1:
            draft.choose("model.num_res_blocks", 1, "the memory")
            return True
    channels = list(model.get("channels", ()))
    if not channels or draft.is_fixed("model.channels") or channels[0] <= 8:
        return False
    halved = [max(8, number // 2) if i < 2 else number for i, number in enumerate(channels)]
    draft.choose("model.channels", halved, "narrow at the first levels, for the memory")
    return True


def smaller_side(draft: Draft, needed: int) -> int | None:
    """The longest side with which `needed` bytes should shrink to what there is; None: too small.

    Memory grows with the number of voxels.
    """
    size: list[int] = draft.values["data"]["size"]
    share = min(0.9, (draft.machine.usable / needed) ** (1 / len(size)))
    side = math.floor(max(size) * share / 8) * 8
    return side if side >= LEAST_SIDE[len(size)] else None


def choose_augmentation(draft: Draft) -> None:
    """Small turns and shifts where images are few; never a flip.

    EDM (Karras et al. 2022) gains most from augmentation on the smallest sets. Here it is weak,
    as the model cannot be told that an image was turned, and may make turned ones.
    """
    number = draft.num_images
    if number >= _FEW_IMAGES or draft.request.goal == "translate":
        return
    step = {
        "name": "RandomAffine", "degrees": 4, "scales": 0.04, "translation": 0,
        "isotropic": True,
    }  # fmt: skip
    if draft.rank == 3:
        step["degrees"] = 3
    reason = f"only {number} images: small turns and scales, against copies; no flips"
    draft.choose("data.augmentation", [step], reason)
    if draft.machine.is_gpu:
        workers = max(1, min(4, draft.machine.cores - 1))
        draft.choose("data.num_workers", workers, "augmentation is computed on the CPU")


def choose_sampling(draft: Draft, image: ImageSpec, bytes_of: Callable[[int], int]) -> None:
    """The steps of the sampler, and the batch of `infer` that the memory holds."""
    steps = draft.family.model_fields.get("num_sampling_steps")
    if steps and steps.default:
        reason = "the default: with twice as many, hands were no better"
        draft.choose("model.num_sampling_steps", steps.default, reason)
    size = 16 if image.rank == 2 else 4
    while size > 1 and bytes_of(size) > draft.machine.usable:
        size //= 2
    draft.choose("sampling.batch_size", size, "images that the memory holds at once, without steps")


def choose_evaluation(draft: Draft) -> None:
    """Slices of volumes, and the rate of false alarms that the held-out images can tell."""
    measured, data = draft.fingerprint, draft.values["data"]
    size = data.get("size") or data.get("patches")
    if size and draft.rank == 3:
        slices = min(EvaluationConfig().slices_per_plane, *size)
        reason = "evenly spaced; volumes are compared by their slices"
        draft.choose("evaluation.slices_per_plane", slices, reason)
    share = data.get("validation_fraction", 0)
    if measured.splits:
        share = measured.splits.get("validation", 0) / measured.num_images
    held_out = round(draft.num_images * share)
    rarest = math.ceil(1000 / (held_out + 1)) / 1000
    if EvaluationConfig().copy_false_alarms < rarest < _MOST_FALSE_ALARMS:
        reason = f"{held_out} held-out images cannot tell a rarer false alarm of copies"
        draft.choose("evaluation.copy_false_alarms", rarest, reason)


def warn_of_data(draft: Draft) -> None:
    """What in the data a specialist would stop at."""
    measured = draft.fingerprint
    if measured.near_duplicates:
        across = measured.duplicates_across_subjects
        more = f", {across} of them of different subjects: they may be in both splits" * (
            across > 0 and bool(measured.num_subjects)
        )
        draft.warnings.append(
            f"{measured.near_duplicates} of {measured.num_images} images nearly equal another "
            f"one{more}. Copies are memorised first: leave them out"
        )
    largest, usual = max(measured.shape.highest), max(measured.shape.median)
    if not measured.has_geometry and largest > 2 * usual:
        draft.warnings.append(
            "some pictures are more than twice as large as the median: they are made smaller"
        )
