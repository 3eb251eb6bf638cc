"""Plan: choose every setting of a training from the images, the machine and the budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from synthcube import config, environment, storage
from synthcube.config import RunConfig
from synthcube.data.fingerprint import FILE_NAME as FINGERPRINT
from synthcube.data.fingerprint import Fingerprint, fingerprint
from synthcube.data.manifest import Manifest, read_manifest
from synthcube.errors import ConfigError, MemoryShortageError
from synthcube.models import registry
from synthcube.models.nets.unet import PixelConfig
from synthcube.planning import cost, length, rules
from synthcube.planning.cost import StepTime
from synthcube.planning.draft import Choice, Draft, Machine, PlanRequest, machine
from synthcube.planning.table import HEADING, Alternative, Cost, Plan, yaml_text
from synthcube.schema import ImageSpec

log = logging.getLogger("synthcube")

PLAN = "plan.yaml"
_START = '{\n  "num_images"'  # of a fingerprint
_MOST_SHRINKS = 12
_ENLARGED_FROM = 4  # times the images that a larger size must still be trained on

Probe = Callable[[RunConfig, ImageSpec, Machine], StepTime]


def plan(data_path: Path, request: PlanRequest, *, timed: bool = True) -> Plan:
    """Choose the settings for the images at a path.

    Args:
        timed: take some training steps on this machine, to know how long the training takes.

    Raises:
        SynthCubeError: images or overrides are faulty, or nothing fits the memory.
    """
    settings = config.build(_named(request))  # faults of the overrides, before an image is read
    measured = fingerprint(read_manifest(data_path), environment.cache_folder())
    where = machine(settings.compute, request.memory_gb)
    log.info("Planning for %d images ...", measured.num_images)
    return planned(measured, where, request, cost.probe if timed and where.is_here else None)


def _named(request: PlanRequest) -> dict[str, object]:
    """The user's values as a config. Raises ConfigError if they contradict each other."""
    values = config.overridden(request.overrides)
    section = values.setdefault("model", {})
    name = section.get("name") if isinstance(section, dict) else None
    if request.family and name and name != request.family:
        raise ConfigError(f"--family {request.family} and --set model.name={name}: name one.")
    if request.hours and request.budget_images:
        raise ConfigError("--hours and --budget_images: give one budget.")
    if isinstance(section, dict) and request.family:
        section["name"] = request.family
    family = registry.find(str(request.family or name or registry.DEFAULT))
    if family.needs and not (isinstance(section, dict) and section.get("first_stage")):
        raise ConfigError(
            f"{family.model_fields['name'].default} needs a trained {family.needs}: plan and train "
            f"that first (synthcube plan --goal compress), then add --set model.first_stage=RUN."
        )
    return values


def planned(
    measured: Fingerprint, where: Machine, request: PlanRequest, probe: Probe | None
) -> Plan:
    """The plan for a fingerprint on a machine; without a probe nothing is timed."""
    longest = _longest_side(measured, where)
    draft = _drafted(measured, where, request, longest)
    timed = _timed(draft, probe)
    if request.hours and timed:
        draft, timed = _resized_for_time(draft, timed, longest, probe)
    bare = timed.without_augmentation() if timed else None
    if length.omit_augmentation(draft, _seconds_an_image(draft, bare)):
        timed = bare
    length.choose_length(draft, _seconds_an_image(draft, timed))
    length.choose_average(draft)
    length.choose_autoguidance(draft)
    return _finished(draft, timed)


def _seconds_an_image(draft: Draft, timed: StepTime | None) -> float | None:
    return cost.seconds_an_image(draft.config(), timed) if timed else None


def _longest_side(measured: Fingerprint, where: Machine) -> int | None:
    """The longest side that is worth a start on this machine; None: what the memory holds."""
    if where.is_gpu:
        return rules.PIXEL_SIDE if measured.rank == 2 else None
    return rules.SMALL_SIDE[measured.rank]


def _drafted(
    measured: Fingerprint, where: Machine, request: PlanRequest, longest: int | None
) -> Draft:
    """All choices but the length, so small that they fit the memory."""
    for _ in range(_MOST_SHRINKS):
        draft = Draft(measured, where, request)
        rules.choose_model(draft)
        rules.choose_channels(draft)
        rules.choose_conditions(draft)
        rules.choose_validation(draft)
        length.choose_recipe(draft)
        rules.choose_size(draft, longest)
        rules.choose_depth(draft)
        rules.choose_augmentation(draft)
        rules.choose_batch(draft)
        fits = rules.fit_memory(draft, cost.training_bytes)
        if fits or draft.is_fixed("data.size") or draft.is_fixed("data.patches"):
            break
        side = rules.smaller_side(draft, cost.training_bytes(draft))
        if side is None:
            raise MemoryShortageError(
                f"Nothing fits {where.memory / 1e9:.1f} GB, of which {where.usable / 1e9:.2f} GB "
                "can be used: free some, raise --memory_gb, or choose a smaller model with "
                "--set model.channels=[8,16,32]."
            )
        longest = side
    if not fits:
        draft.warnings.append("with these values it may run out of memory")
    rules.warn_of_data(draft)
    settings = draft.config()
    image = draft.image(settings)
    if cost.draws_images(settings, image):
        mixed = where.precision.endswith("-mixed")
        rules.choose_sampling(
            draft, image, lambda size: cost.sampling_bytes(settings, image, size, mixed)
        )
        rules.choose_evaluation(draft)
    return draft


def _timed(draft: Draft, probe: Probe | None) -> StepTime | None:
    if probe is None:
        return None
    settings = draft.config()
    return probe(settings, draft.image(settings), draft.machine)


def _resized_for_time(
    draft: Draft, timed: StepTime, longest: int | None, probe: Probe | None
) -> tuple[Draft, StepTime]:
    """Larger images on a CPU where the hours allow it.

    Twice the side takes 2^rank times as long an image; there must be time for four times as many
    images as the first good model of this project saw.
    """
    hours = draft.request.hours
    assert hours is not None
    while longest and not draft.machine.is_gpu and not draft.is_fixed("data.size"):
        native = max(draft.along_axes(draft.fingerprint.shape.median))
        size = draft.values["data"]["size"]
        seconds = cost.seconds_an_image(draft.config(), timed) * 2 ** len(size)
        enough = hours * 3600 / seconds >= _ENLARGED_FROM * length.FLOOR_IMAGES
        if native <= longest or not enough:
            break
        longest *= 2
        larger = _drafted(draft.fingerprint, draft.machine, draft.request, longest)
        if larger.values["data"]["size"] == size:
            break
        draft = larger
        timed = _timed(draft, probe) or timed
    return draft, timed


def _finished(draft: Draft, timed: StepTime | None) -> Plan:
    settings = draft.config()
    image = draft.image(settings)
    mixed = draft.machine.precision.endswith("-mixed")
    draws = cost.draws_images(settings, image)
    training = settings.training
    seen = training.max_epochs * draft.num_training_images
    duration = cost.duration(draft, settings, timed) if timed else None
    if timed and seen < length.FLOOR_IMAGES and draft.request.hours:
        draft.warnings.append(
            f"{seen:,} images are seen in this time; the first good pictures of 64 x 64 voxels "
            f"took {length.FLOOR_IMAGES:,}. Give more hours, or a smaller data.size"
        )
    reading_bytes = cost.reading_bytes(draft)
    if not draft.machine.is_gpu and reading_bytes > draft.machine.usable:
        draft.warnings.append(
            f"the largest image takes {reading_bytes / 1e9:.2f} GB while it is read, and "
            f"{draft.machine.usable / 1e9:.2f} GB can be used: crop it, or give more memory"
        )
    total = Cost(
        training_bytes=cost.training_bytes(draft),
        reading_bytes=reading_bytes,
        sampling_bytes=cost.sampling_bytes(settings, image, settings.sampling.batch_size, mixed)
        if draws
        else None,
        steps=length.num_steps(draft),
        weights=sum(weight.numel() for weight in settings.model.build(image).parameters()) * 4,
        timed=timed,
        duration=duration,
        image_seconds=cost.image_seconds(settings, timed) if timed and draws else None,
    )
    values = {name: dict(section) for name, section in draft.values.items()}
    for name, section in draft.fixed.items():
        both = isinstance(section, dict) and name in values
        values[name] = {**values[name], **section} if both else section
    return Plan(
        draft.fingerprint, draft.machine, tuple(draft.choices.values()), settings, values, total,
        tuple(_alternatives(draft, settings)), tuple(draft.warnings),
    )  # fmt: skip


def _alternatives(draft: Draft, settings: RunConfig) -> Iterator[Alternative]:
    """Other ways that a specialist would consider, each with what it changes."""
    size, rank = list(settings.data.size or ()), draft.rank
    ddpm = Alternative("--family ddpm", "the classic process; needs more steps to draw")
    if size:
        native = max(draft.along_axes(draft.fingerprint.shape.median))
        doubled = [side * 2 for side in size]
        halved = [side // 2 for side in size]
        factor = 2**rank
        if max(doubled) <= 1.5 * native:
            reason = f"twice the detail: about {factor} times the time and memory an image"
            yield Alternative(f"--set data.size={doubled}".replace(" ", ""), reason)
        elif min(halved) >= rules.LEAST_SIDE[rank]:
            reason = f"half the detail: about {factor} times as many images in the same time"
            yield Alternative(f"--set data.size={halved}".replace(" ", ""), reason)
    large = rank == 3 or (size and max(size) >= 256)
    model = settings.model
    if large and isinstance(model, PixelConfig) and not model.wavelet_levels:
        yield Alternative(
            "--set model.wavelet_levels=1",
            f"the network sees Haar bands of half the size: a step takes about 1/{2**rank} of the "
            "time, and less memory",
        )
    if draft.request.goal == "compress":
        yield Alternative("--family vqvae", "a codebook, for code_prior in place of diffusion")
    elif draft.request.goal == "generate" and large:
        yield Alternative(
            "--goal compress, then --family latent_diffusion --set model.first_stage=RUN",
            "two trainings; a step of the second takes a fraction of the memory and time",
        )
    elif draft.request.goal == "generate" and draft.num_training_images >= 1000:
        yield Alternative(
            "--family stylegan", "images in one pass, not in 20; harder to train, less varied"
        )
    elif size:
        yield ddpm
    if not size:
        yield ddpm


def write(planned: Plan, path: Path) -> Path:
    """Write a plan as YAML, and its fingerprint beside it; returns the fingerprint's path.

    Raises OutputError rather than overwrite a file that is no plan.
    """
    storage.require_own_file(path, HEADING, "output_path")
    beside = path.with_name(FINGERPRINT)
    storage.require_own_file(beside, _START, "fingerprint")
    storage.make_folder(path.parent, "output_path")
    storage.write_json(beside, planned.fingerprint.model_dump(mode="json"))
    storage.write_text(path, yaml_text(planned))
    return beside


def differences(settings: RunConfig, manifest: Manifest) -> list[str]:
    """One line for each key in which a config differs from the plan, where that has a consequence.

    What the config says of the images is compared with a free plan; the rest with the plan for
    images of the config's own size.
    """
    if settings.model.needs or settings.data.patches:
        return []  # two trainings are one plan each, and patches are a choice of their own
    measured = fingerprint(manifest, environment.cache_folder())
    where = machine(settings.compute, None)
    pinned = [f"model.name={settings.model.name}", f"seed={settings.seed}"]
    if isinstance(settings.model, PixelConfig):
        pinned.append(f"model.wavelet_levels={settings.model.wavelet_levels}")
    if settings.data.slices:
        pinned.append(f"data.slices={settings.data.slices}")
    if settings.data.source_channels:
        pinned.append(f"data.source_channels={[*settings.data.source_channels]}")
    # The recipe of a CPU is a choice, and another one is no fault.
    request = PlanRequest(overrides=tuple(pinned), recipe="default")
    free = _drafted(measured, where, request, _longest_side(measured, where))
    size = settings.data.size or free.along_axes(measured.shape.median)
    pinned.append(f"data.size={[int(side) for side in size]}")
    sized = _drafted(measured, where, replace(request, overrides=tuple(pinned)), None)
    lines = [*_data_differences(free, settings), *_step_differences(sized, settings)]
    seen = settings.training.max_epochs * free.num_training_images
    if seen < length.FLOOR_IMAGES:
        lines.append(
            f"training.max_epochs {settings.training.max_epochs}: {seen:,} images are seen; the "
            f"first good pictures of 64 x 64 voxels took {length.FLOOR_IMAGES:,}"
        )
    return [f"the plan differs: {line}" for line in lines]


def _data_differences(draft: Draft, settings: RunConfig) -> Iterator[str]:
    """Where what is read of the images would be another; a size only if it is far off."""
    data, chosen = settings.data, draft.choices
    planned_size = draft.values["data"]["size"]
    size = data.size or draft.along_axes(draft.fingerprint.shape.median)
    share = max(size) / max(planned_size)
    if not 1 / rules.FAR_OFF < share < rules.FAR_OFF:
        yield _line(chosen["data.size"], [int(side) for side in size])
    stretches = data.size and not data.spacing_mm and data.fit == "resize"
    if stretches and (spacing := chosen.get("data.spacing_mm")):
        yield _line(spacing, None)
    if draft.fingerprint.masks.keys() - data.channels.keys():
        yield _line(chosen["data.channels"], "without them")
    own_ranges = data.intensity_range or data.channels
    if (fixed := chosen.get("data.intensity_range")) and not own_ranges:
        yield _line(fixed, None)
    if (conditions := chosen.get("data.conditions")) and not data.conditions:
        yield _line(conditions, {})


def _step_differences(draft: Draft, settings: RunConfig) -> Iterator[str]:
    """Where a step would take other memory, or another share of the data."""
    chosen, training = draft.choices, settings.training
    batch = chosen["training.batch_size"]
    whole = batch.value * draft.values["training"].get("accumulate", 1)
    if training.batch_size * training.accumulate > rules.FAR_OFF * whole:
        yield _line(batch, training.batch_size)
    recomputed = chosen.get("compute.activation_checkpointing")
    if recomputed and recomputed.value and not settings.compute.activation_checkpointing:
        yield _line(recomputed, False)
    attention = chosen.get("model.attention_from")
    own: int | None = getattr(settings.model, "attention_from", None)
    if attention and own is not None and own < attention.value:
        size = draft.values["data"]["size"]
        if math.prod(size) / 2 ** (len(size) * own) > rules.MOST_TOKENS:
            yield _line(attention, own)


def _line(choice: Choice, own: object) -> str:
    return f"{choice.key} is {own}, the plan takes {choice.value} ({choice.reason})"


def config_of_run(
    data_path: Path, run: Path, request: PlanRequest, show: Callable[[Plan], object]
) -> Path:
    """The config of a training without one: the plan in its run folder, written if there is none.

    A run that has trained keeps its plan, as its config must not change.
    """
    path = run / PLAN
    has_trained = (run / "checkpoints").exists() or (run / "artifact").exists()
    is_first = environment.process_rank() == 0
    if path.is_file() and (has_trained or not is_first):
        return path
    if has_trained:
        raise ConfigError(
            f"output_path {run} was trained with a config of its own: name it with --config "
            f"({run / 'config.yaml'} is a copy)."
        )
    if environment.launched_processes() > 1:
        raise ConfigError(
            "Several processes cannot plan together: run synthcube plan -d DATA -o plan.yaml "
            "first, and give them --config plan.yaml."
        )
    storage.require_separate({"output_path": run}, {"data_path": data_path})
    storage.make_folder(run, "output_path")
    planned = plan(data_path, request)
    show(planned)
    write(planned, path)
    return path
