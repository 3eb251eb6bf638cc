"""Optimizers, schedules and losses of GaNDLF-Synth, with its defaults written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from synthcube.migration.project import Path, Project, is_number
from synthcube.plugins import did_you_mean

# What GaNDLF set where nothing was written, and torch or MONAI would not.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "adam": {"weight_decay": 5e-5},
    "adamax": {"weight_decay": 5e-5},
    "adamw": {"weight_decay": 5e-5},
    "sgd": {"momentum": 0.99, "nesterov": True, "weight_decay": 3e-5},
    "asgd": {"weight_decay": 3e-5},
    "adadelta": {"weight_decay": 3e-5},
    "rmsprop": {"weight_decay": 3e-5},
    "radam": {"weight_decay": 3e-5},
    "nadam": {"weight_decay": 3e-5},
    "adagrad": {"eps": 1e-6, "weight_decay": 3e-5},
    "rprop": {"step_sizes": [1e-7, 50.0]},
    "novograd": {"betas": [0.9, 0.999], "weight_decay": 3e-5},
    "ademamix": {},
}
# The arguments that it passed on; it ignored all others.
_ARGUMENTS = {
    "sgd": "momentum dampening nesterov weight_decay",
    "asgd": "alpha t0 lambd weight_decay",
    "adam": "betas eps amsgrad weight_decay",
    "adamw": "betas eps amsgrad weight_decay",
    "adamax": "betas eps weight_decay",
    "rprop": "etas step_sizes",
    "adadelta": "rho eps weight_decay",
    "adagrad": "lr_decay eps weight_decay",
    "rmsprop": "alpha eps centered momentum weight_decay",
    "radam": "betas eps weight_decay foreach",
    "nadam": "betas eps weight_decay foreach",
    "novograd": "betas eps amsgrad weight_decay",
    "ademamix": "betas alpha eps weight_decay",
}
OPTIMIZERS = tuple(_DEFAULTS)
_PAIRS = ("etas", "betas", "step_sizes")  # of which torch takes floats alone

_BROKEN_SCHEDULES = (
    "triangular", "exp_range", "reduce_on_plateau", "reduce-on-plateau", "reduceonplateau",
    "plateau", "warmupcosineschedule", "wcs",
)  # fmt: skip
# The arguments of each, with the defaults of there; None: it must be given.
_OF_SCHEDULE: Mapping[str, Mapping[str, Any]] = {
    "triangle": {"step_size": None, "min_lr": 1e-3, "max_lr": 1.0},
    "triangle_modified": {"step_size": None, "min_lr": 1e-6, "max_lr": 1e-3},
    "exp": {"gamma": 0.1},
    "exponential": {"gamma": 0.1},
    "step": {"step_size": None, "gamma": 0.1},
    "cosineannealing": {"T_0": 5, "T_mult": 1, "min_lr": 1e-3},
}
SCHEDULES = tuple(_OF_SCHEDULE)

LOSSES = ("cel", "l1", "bce", "bcelogits", "mse")
_ADVERSARIAL = {
    "bce": (
        "non_saturating", "the discriminator's loss was halved there: with sgd, halve its lr"
    ),
    "bcelogits": (
        "non_saturating", "GaNDLF-Synth applied a sigmoid twice, a fault that is not repeated"
    ),
    "mse": ("least_squares", "on logits here, on a sigmoid's output there"),
}  # fmt: skip


def optimizer(project: Project, path: Path, target: str) -> float:
    """Write the optimizer of the section at `path` as `target`; its learning rate."""
    section = project.section(*path)
    name, lr = section.get("name"), section.get("lr")
    if lr is None or not is_number(lr):
        project.refuse((*path, "lr"), f"a learning rate is needed, not {lr!r}")
        lr = 1.0
    if name not in OPTIMIZERS:
        hint = did_you_mean(str(name), OPTIMIZERS)
        project.refuse((*path, "name"), f"{name!r} is none of {', '.join(OPTIMIZERS)}{hint}")
        return float(lr)
    taken = _ARGUMENTS[name].split()
    arguments: dict[str, Any] = {}
    for key, value in section.items():
        if key in ("name", "lr"):
            continue
        if key not in taken:
            project.drop((*path, key), f"ignored there: {name} takes {', '.join(taken)}")
            continue
        arguments[key] = value
        if key in _PAIRS and isinstance(value, list) and all(map(is_number, value)):
            arguments[key] = [float(number) for number in value]
    defaults = {key: value for key, value in _DEFAULTS[name].items() if key not in arguments}
    values = {"name": name, "lr": float(lr), **arguments}
    comment = ".".join(path)
    if project.is_modern or not defaults:
        project.state(target, values, comment)
        for key, value in defaults.items():
            project.imply(f"{target}.{key}", value, f"GaNDLF's default of {name}")
    else:
        shown = ", ".join(defaults)
        project.state(target, values | defaults, f"{comment}; {shown}: the default of GaNDLF")
    return float(lr)


def schedule(project: Project, lr: float) -> None:
    """Write the learning-rate schedule of a model with one optimizer."""
    path = ("model_config", "schedulers")
    section = project.get(*path)
    if section in (None, {}):
        project.imply("model.scheduler", None, "no schedule was asked for; the default is cosine")
        return
    if isinstance(section, str):
        section = {"type": section}
        project.note(path, "model.scheduler: stepped once an epoch")
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        at = (*path, "name") if isinstance(section, Mapping) and "name" in section else path
        project.refuse(at, "GaNDLF-Synth reads `type`, and stops with a KeyError without it")
        return
    name = section["type"]
    if name not in SCHEDULES:
        broken = "GaNDLF-Synth stops at it with a KeyError" if name in _BROKEN_SCHEDULES else ""
        hint = broken or f"it is none of {', '.join(SCHEDULES)}"
        project.refuse((*path, "type"), f"{name}: {hint}")
        return
    arguments = {}
    for key, default in _OF_SCHEDULE[name].items():
        arguments[key] = section.get(key, default)
        value, is_rate = arguments[key], key == "min_lr"
        if not is_number(value) or value < 0 or (value == 0 and not is_rate):
            text = f"{name} needs a number {'of 0 or more' if is_rate else 'above 0'}"
            project.refuse((*path, key), f"{text}, not {value!r}")
            return
    for key in section:
        if key not in ("type", *arguments):
            project.drop((*path, key), f"ignored there: {name} takes {', '.join(arguments)}")
    text = "stepped once an epoch, with the meaning that its arguments had there"
    project.state(
        "model.scheduler", translated_schedule(name, lr, arguments), f"schedulers; {text}"
    )


def translated_schedule(name: str, lr: float, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule that gives the learning rates of there, epoch by epoch."""
    if name == "triangle":
        return {
            "name": name, "interval": "epoch", "step_size_up": float(arguments["step_size"]),
            "base_lr": lr * arguments["max_lr"], "max_lr": lr * arguments["min_lr"],
        }  # fmt: skip
    if name == "triangle_modified":
        return {
            "name": name, "interval": "epoch", "step_size_up": arguments["step_size"] / 2,
            "base_lr": lr, "max_lr": lr * arguments["min_lr"] / arguments["max_lr"],
        }  # fmt: skip
    if name == "cosineannealing":
        return {"name": name, "T_0": arguments["T_0"], "T_mult": arguments["T_mult"],
                "eta_min": arguments["min_lr"]}  # fmt: skip
    return {"name": name, **arguments}


def loss(project: Project) -> None:
    """Write the loss of ddpm or vqvae."""
    path = ("model_config", "losses")
    section = project.section(*path)
    name = str(section.get("name", "")).lower()
    if name not in LOSSES:
        reason = "plain_mean takes one argument, and cannot work there either"
        known = reason if name == "plain_mean" else f"one of {', '.join(LOSSES)} is needed"
        project.refuse((*path, "name"), f"{section.get('name')!r}: {known}")
        return
    arguments = {
        "class_weights" if key == "weight" else key: value
        for key, value in section.items()
        if key != "name"
    }
    project.state("model.losses", [{"name": name, **arguments}], "losses")


def adversarial_loss(project: Project) -> None:
    """Write the loss of a GAN, which is one for both networks here."""
    names = {}
    for part in ("generator", "discriminator"):
        path = ("model_config", "losses", part, "name")
        name = names[part] = str(project.get(*path, default="")).lower()
        if name not in _ADVERSARIAL:
            project.refuse(path, f"{name!r} has no counterpart; {', '.join(_ADVERSARIAL)} have")
        else:
            project.note(path, ", ".join(_ADVERSARIAL[name]))
    if len({*names.values()}) > 1:
        path = ("model_config", "losses", "discriminator", "name")
        project.refuse(path, "both networks have one loss here: give both the same")
    elif names["generator"] in _ADVERSARIAL:
        value, text = _ADVERSARIAL[names["generator"]]
        project.state("model.adversarial_loss", value, f"losses: {text}")
