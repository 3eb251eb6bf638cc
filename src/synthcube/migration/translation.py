"""A config of GaNDLF-Synth as one of ours, with a comment for each line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synthcube import config
from synthcube.errors import ConfigError
from synthcube.escapes import visible
from synthcube.migration import families, optimizers, transforms
from synthcube.migration.project import Entry, Outcome, Project, outcomes

_MODELS = {"ddpm": families.ddpm, "vqvae": families.vqvae, "dcgan": families.dcgan}
_METRICS = {
    "loss": "train/loss",
    "reconstruction_loss": "train/reconstruction",
    "quantization_loss": "train/commitment",
    "gen_loss": "train/loss",
    "disc_loss": "train/discriminator_loss",
}
_MODEL = "model_config"


@dataclass(frozen=True)
class Translation:
    """The new file, and what became of every key of the old one."""

    values: dict[str, Any]
    text: str
    outcomes: tuple[Outcome, ...]
    left: tuple[str, ...]
    """A line for each default of ours that differs from that of there, with ``modern``."""


def translated(
    values: Mapping[Any, Any],
    lines: Mapping[tuple[Any, ...], int],
    where: str,
    *,
    dims: int | None = None,
    modern: bool = False,
) -> Translation:
    """The config that trains what `values`, an old one, trained. Raises ConfigError.

    Args:
        lines: of the keys of `values` in the file.
        where: name of the file.
        dims: spatial axes of the images, where the file does not say it.
        modern: leave our defaults where the file says nothing.
    """
    if _MODEL not in values:
        raise ConfigError(
            f"{where} is no config of GaNDLF-Synth: that has the key {_MODEL} at its top level."
        )
    project = Project(dict(values), lines, is_modern=modern)
    if project.model == "stylegan":
        project.refuse((_MODEL, "model_name"), families.STYLEGAN)
    elif project.model in _MODELS:
        _translate(project, _num_dimensions(project, dims))
    else:
        known = ", ".join([*_MODELS, "stylegan"])
        project.refuse((_MODEL, "model_name"), f"{project.model!r} is none of {known}")
    told = tuple(outcomes(project))
    refused = [f"{outcome.key}: {outcome.text}" for outcome in told if outcome.kind == "refused"]
    new = _nested(project.new)
    refused += _faults_here(project, new)
    if refused:
        counts = _summary(told)
        raise ConfigError(f"{where} cannot be migrated ({counts}):", map(visible, refused))
    left = tuple(_left(project, config.build(_copied(new)).dump()))
    return Translation(new, _text(project, where, told, left), told, left)


def _left(project: Project, ours: Any) -> Iterator[str]:
    for target, entry in project.left.items():
        value = ours
        for name in target.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value != entry.value:
            here = _inline(value) if value is not None else "none"
            yield f"{target}: {here} here, {_inline(entry.value)} there: {entry.comment}"


def _summary(told: Sequence[Outcome]) -> str:
    numbers = Counter(outcome.kind for outcome in told)
    kinds = {"same": "the same", "changed": "changed", "no effect": "without effect there",
             "refused": "refused"}  # fmt: skip
    return ", ".join(f"{numbers[kind]} {text}" for kind, text in kinds.items())


def _faults_here(project: Project, new: dict[str, Any]) -> list[str]:
    """What our own config refuses, where the old keys alone had no fault."""
    if project.model not in _MODELS:
        return []
    try:
        config.build(_copied(new))
    except ConfigError as error:
        return [f"it would become {fault}" for fault in error.faults or (error.headline,)]
    return []


def _copied(values: Any) -> Any:
    return json.loads(json.dumps(values))


def _num_dimensions(project: Project, dims: int | None) -> int:
    path = (_MODEL, "n_dimensions")
    said = project.get(*path)
    if said is None:
        shape = project.get(_MODEL, "tensor_shape")
        said = dims or (len(shape) if isinstance(shape, list) else None)
    if said not in (2, 3) or isinstance(said, bool):
        project.refuse(path, f"2 or 3 is needed, not {said!r}; --dims gives it as well")
        return 2
    if dims not in (None, said):
        project.refuse(path, f"it is {said}, and --dims says {dims}")
    return int(said)


def _translate(project: Project, dims: int) -> None:
    comment = "model_config.model_name"
    if project.model == "dcgan":
        text = "the same generator; weights start from N(0, 0.02) here, from torch's default there"
        project.note((_MODEL, "model_name"), text)
        comment += f": {text}"
    project.state("model.name", project.model, comment)
    _MODELS[project.model](project)
    _optimizers_and_losses(project)
    stage = transforms.preprocessing(project, dims)
    _size(project, stage.size, dims)
    transforms.augmentation(project, stage)
    _data(project)
    _training(project)
    _pictures(project, dims)
    _early_stop(project)
    _sampling(project)
    _compute(project)
    _values_that_count(project)


def _optimizers_and_losses(project: Project) -> None:
    path = (_MODEL, "optimizers")
    if project.is_gan:
        optimizers.optimizer(project, (*path, "generator"), "model.optimizer")
        optimizers.optimizer(project, (*path, "discriminator"), "model.discriminator_optimizer")
        optimizers.adversarial_loss(project)
        return
    rate = optimizers.optimizer(project, path, "model.optimizer")
    optimizers.schedule(project, rate)
    optimizers.loss(project)


def _size(project: Project, output_shape: list[int] | None, dims: int) -> None:
    path = (_MODEL, "tensor_shape")
    shape = project.get(*path)
    is_shape = isinstance(shape, list) and all(type(side) is int for side in shape)
    if shape is not None and not (is_shape and len(shape) == dims):
        project.refuse(path, f"{dims} whole numbers are needed, not {shape!r}")
        return
    size = output_shape or shape
    if size is None:
        return
    if shape is not None and size != shape:
        if project.model == "dcgan":
            project.refuse(path, f"images are brought to {size}: the discriminator stops there")
        project.note(path, f"images are trained at the size of the preprocessing, {size}, and are "
                     "made at that size here")  # fmt: skip
    comment = "data_preprocessing.train" if output_shape else "model_config.tensor_shape"
    if dims == 3:
        comment += "; along the axes of RAS+, to which volumes are turned here"
    project.state("data.size", list(size), comment)
    if project.model == "dcgan" and any(side % 16 or side < 32 for side in size):
        project.refuse(path, f"sides of {size}: here they are multiples of 16, 32 or more")


def _data(project: Project) -> None:
    text = "everything was trained on; `-vr 0.1` of there is validation_fraction: 0.1"
    project.imply("data.validation_fraction", 0.0, text)
    project.keep(("dataloader_config", "train", "num_workers"), "data.num_workers")


def _training(project: Project) -> None:
    project.take(("num_epochs",), "training.max_epochs", 100)
    _batch_size(project)
    project.imply("training.ema", None, "there was no moving average of the weights")
    clip = (_MODEL, "gradient_clip_val")
    project.take(clip, "training.gradient_clip_norm", None)
    accumulate = (_MODEL, "accumulate_grad_batches")
    project.keep(accumulate, "training.accumulate")
    if project.is_gan:
        for path, harmless in ((clip, (None,)), (accumulate, (None, 1))):
            if project.get(*path) not in harmless:
                project.refuse(path, "GaNDLF-Synth itself stops at it with a GAN: remove it")
    every = project.get("save_model_every_n_epochs", default=-1)
    if every != -1:
        number = project.whole(("save_model_every_n_epochs",), 1)
        comment = "save_model_every_n_epochs: the best and the last are kept"
        project.state("training.validate_every_n_epochs", number, comment)


def _batch_size(project: Project) -> None:
    path = ("batch_size",)
    size = project.whole(path, 1)
    devices, nodes = _num_devices(project), project.get("compute", "num_nodes", default=1)
    total = size * (devices or 1) * (nodes if isinstance(nodes, int) else 1)
    text = f"batch_size: {size} of each process"
    if devices is None:
        text += "; with several GPUs write that number times theirs"
    elif total != size:
        text += f" times {devices} device(s) and {nodes} node(s)"
    if project.get(*path) is None:
        project.imply("training.batch_size", total, f"the default of {text}")
    else:
        project.note(path, f"{total}: {text.partition(': ')[2]}; an incomplete last batch is left "
                     "out")  # fmt: skip
        project.state("training.batch_size", total, text)


def _num_devices(project: Project) -> int | None:
    """Devices of a node; None: as many as there are."""
    path = ("compute", "num_devices")
    value = project.get(*path, default="auto")
    if value in ("auto", -1, "-1"):
        return None
    if isinstance(value, list) and value:
        return len(value)
    if isinstance(value, str):
        parts = [part for part in value.split(",") if part.strip()]
        if parts and all(part.strip().isdecimal() for part in parts):
            return len(parts) if "," in value else int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    project.refused.setdefault(path, [f"{value!r} is no number of devices"])
    return None


def _pictures(project: Project, dims: int) -> None:
    every = (_MODEL, "save_eval_images_every_n_epochs")
    number = project.get(*every, default=-1)
    if not project.is_gan or dims == 3 or number == -1:
        project.imply("training.sample_every_n_epochs", 0, "no pictures were made while training")
        if number != -1:
            project.drop(every, f"{dims}D images of {project.model} were never pictured")
    else:
        wanted = project.whole(every, 1)
        project.state("training.sample_every_n_epochs", wanted, ".".join(every))
    project.keep((_MODEL, "n_fixed_images_to_generate"), "training.num_sample_images")


def _early_stop(project: Project) -> None:
    section = ("early_stopping_config",)
    stated = project.section(*section)
    if not stated:
        return
    monitored = str(stated.get("monitor_value"))
    if monitored not in _METRICS:
        known = ", ".join(_METRICS)
        project.refuse(
            (*section, "monitor_value"), f"{monitored!r} is not logged here; {known} are"
        )
        return
    every = project.get("save_model_every_n_epochs", default=1)
    every = every if isinstance(every, int) and every > 0 else 1
    patience = project.whole((*section, "patience"), 1)
    stop = {
        "metric": _METRICS[monitored], "mode": stated.get("monitor_mode", "min"),
        "patience": -(-patience // every),
    }  # fmt: skip
    text = "early_stopping_config; with validation, validation/... in place of train/..."
    project.state("training.early_stop", stop, text)


def _sampling(project: Project) -> None:
    section = ("inference_parameters",)
    stated = project.section(*section)
    if stated.get("batch_size") is not None:
        number = project.whole((*section, "batch_size"), 1)
        project.state("sampling.batch_size", number, "inference_parameters.batch_size")
    wanted = stated.get("n_images_to_generate")
    if isinstance(wanted, Mapping):
        text = "a number for each class is for models with classes, which did not exist there"
        project.refuse((*section, "n_images_to_generate"), f"{text}: write one number")
    elif wanted is not None:
        number = project.whole((*section, "n_images_to_generate"), 1)
        text = "inference_parameters.n_images_to_generate"
        project.state("sampling.num_images", number, text)


def _compute(project: Project) -> None:
    section = project.section("compute")
    if section.get("num_devices") is not None:
        devices = _num_devices(project)
        project.state("compute.num_devices", devices, "compute.num_devices; null: all")
        if isinstance(section["num_devices"], list):
            text = "the number of them: choose which with CUDA_VISIBLE_DEVICES"
            project.note(("compute", "num_devices"), text)
    for name in ("num_nodes", "strategy", "strategy_config"):
        project.keep(("compute", name), f"compute.{name}")
    if section.get("precision") is None:
        project.imply("compute.precision", "32", "float32 was the default")
    else:
        project.state("compute.precision", str(section["precision"]), "compute.precision")


def _values_that_count(project: Project) -> None:
    """Refuse what has no counterpart, and say what follows from single values."""
    algorithm = project.get(_MODEL, "gradient_clip_algorithm", default="norm")
    clips = project.get(_MODEL, "gradient_clip_val") is not None
    if algorithm != "norm" and clips:
        path = (_MODEL, "gradient_clip_algorithm")
        project.refuse(path, f"{algorithm!r}: gradients are clipped by their norm alone here")
    if project.get("modality", default="rad") not in ("rad", "histo"):
        text = "GaNDLF-Synth knows rad and histo, and stops at the first image that it writes"
        project.refuse(("modality",), text)
    out = (_MODEL, "architecture", "out_channels")
    if project.get(*out) is not None and project.get(*out) == project.get(_MODEL, "n_channels"):
        project.drop(out, "as many as the images have")
    channels = project.get(_MODEL, "n_channels")
    if channels == 4:
        project.note((_MODEL, "n_channels"), "alpha is dropped here: RGBA has 3 channels")


def _nested(entries: Mapping[str, Entry]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for target, entry in entries.items():
        section, _, key = target.partition(".")
        values.setdefault(section, {})[key] = entry.value
    return values


def _text(project: Project, where: str, told: Sequence[Outcome], left: Sequence[str]) -> str:
    lines = [
        f"# What {_line(where)} trained, for SynthCube.",
        "# synthcube check -c THIS_FILE -d DATA, then train -c THIS_FILE -d DATA -o RUN",
        "",
        "# there was no seed",
        "seed: 0",
    ]
    for section in ("model", "data", "training", "sampling", "compute"):
        entries = {
            target.partition(".")[2]: entry
            for target, entry in project.new.items()
            if target.startswith(f"{section}.")
        }
        if entries:
            lines += ["", f"{section}:"]
        for key, entry in entries.items():
            lines += [f"  # {_line(entry.comment)}", f"  {key}: {_inline(entry.value)}"]
    if left:
        lines += ["", "# Left at the defaults of SynthCube, which were otherwise there:"]
        lines += [f"# {_line(text)}" for text in left]
    dropped = [f"# {_line(outcome.key)}: {_line(outcome.text)}"
               for outcome in told if outcome.kind == "no effect"]  # fmt: skip
    if dropped:
        lines += ["", "# Without effect in GaNDLF-Synth, and left out:", *dropped]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return visible(" ".join(text.split()))


def _inline(value: Any) -> str:
    """JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)
