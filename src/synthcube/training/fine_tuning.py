"""Fine-tuning: start from the weights of a trained model, reinitialize or freeze some of them.

The YAML keys are training.start_from, start_anew (here: reinitialize) and freeze.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from synthcube.errors import ConfigError, first_faults
from synthcube.models import artifact, registry
from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.artifact import Artifact
from synthcube.models.family import SAMPLING_KEYS, Family, FamilyConfig
from synthcube.models.nets.conditioning import ConditionEmbedding
from synthcube.storage import sha256
from synthcube.training.config import TrainingConfig

log = logging.getLogger("synthcube")

# Model keys that may differ from the trained model: how it is trained, or where a file is.
_IGNORED_KEYS = ("optimizer", "scheduler", "discriminator_optimizer", "discriminator_scheduler",
         "first_stage")  # fmt: skip


def resolved(training: TrainingConfig, recorded: Mapping[str, Any]) -> TrainingConfig:
    """A copy of `training` with the hash of the weights that it starts from.

    Args:
        recorded: section `training` of the resumed run, whose hash is used without reading the
            trained model again; empty for a new run.
    """
    if training.start_from is None:
        return training
    expected = training.start_from_sha256
    if digest := str(recorded.get("start_from_sha256") or ""):
        return training if expected else training.model_copy(update={"start_from_sha256": digest})
    digest = sha256(artifact.load(training.start_from).weights)
    if expected not in ("", digest):
        raise ConfigError(
            f"training.start_from {training.start_from}: the SHA-256 of its weights is {digest}, "
            f"and training.start_from_sha256 is {expected}."
        )
    return training.model_copy(update={"start_from_sha256": digest})


def start_model(
    model: FamilyConfig, stated: Collection[str], before: Mapping[str, Any]
) -> dict[str, Any]:
    """The section `model` of a training: its stated keys, the others as the start model has them.

    How it is trained and its first stage do not come from the start, nor another family's keys.

    Args:
        model: the section that was read, filled up with defaults.
        stated: the keys that the user wrote.
        before: section `model` of the start model.
    """
    here = model.model_dump(mode="json")
    if "name" in stated and before["name"] != here["name"]:
        return here
    fields = registry.find(str(before["name"])).model_fields
    taken = {
        key: value
        for key, value in before.items()
        if key in fields and key not in _IGNORED_KEYS and not key.startswith("first_stage")
    }
    left = {key: here[key] for key in here if key in stated or key in _IGNORED_KEYS}
    return taken | {key: value for key, value in left.items() if key in stated or key in fields}


def take_weights(family: Family, training: TrainingConfig) -> None:
    """Load the weights that `training` starts from, if any, into `family`.

    All weights must match in name and shape, except those to reinitialize.

    Raises ConfigError with one line for each differing key of the model or, where none differs,
    for each weight.
    """
    if training.start_from is None:
        return
    reinitialize = training.start_anew
    trained = artifact.load(training.start_from)
    weights = load_file(trained.weights)
    state = family.state_dict()
    loaded = {name: value for name, value in weights.items() if not _any(name, reinitialize)}
    needed = [name for name in state if not _any(name, reinitialize)]
    unfitting = [
        *(f"{name}: only in the model" for name in needed if name not in loaded),
        *(f"{name}: only in the start" for name in loaded if name not in state),
        *(
            f"{name}: shape {list(loaded[name].shape)} in the start, {list(state[name].shape)} here"
            for name in needed
            if name in loaded and loaded[name].shape != state[name].shape
        ),
    ]
    changed = _changed(family, trained)
    faults = [
        *_unmatched("start_anew", reinitialize, [*state, *weights]),
        *_misfits(family, trained, reinitialize),
    ]
    if unfitting and not (faults or changed):
        faults = first_faults(unfitting)
    elif unfitting:
        faults += [text for key, text in changed.items() if key not in SAMPLING_KEYS]
    if faults:
        names = ", ".join(fault.split(":")[0] for fault in unfitting[:3])
        extent = f" in {len(unfitting)} weights ({names} ...)" if unfitting else ""
        raise ConfigError(
            f"training.start_from {training.start_from} does not fit this model{extent}; name "
            "the weights to reinitialize in training.start_anew, or correct:",
            faults,
        )
    # Not strict, because the names were compared above.
    family.load_state_dict(loaded, strict=False)
    log.info(
        "Starting from %s (SHA-256 %s...): %d of %d weights taken.",
        training.start_from, training.start_from_sha256[:12], len(needed), len(state),
    )  # fmt: skip
    if changed:
        log.info("Settings that differ from the start: %s.", "; ".join(changed.values()))


def freeze(family: Family, training: TrainingConfig) -> list[torch.nn.Module]:
    """Exclude the weights that `training.freeze` names from training.

    Returns:
        The outermost modules whose weights are all frozen: their running statistics and codebooks
        must not change either; see FreezeCallback.
    """
    patterns = training.freeze
    named = dict(family.named_parameters())
    frozen = {name for name in named if _any(name, patterns)}
    faults = _unmatched("freeze", patterns, named)
    faults += [
        f"training.freeze matches {name}, which training.start_anew reinitializes"
        for name in sorted(frozen)
        if _any(name, training.start_anew)
    ]
    if not faults:
        for name in frozen:
            named[name].requires_grad_(False)
        faults = _idle(family) if frozen else []
    if faults:
        raise ConfigError("training.freeze cannot be used:", faults)
    return _frozen_modules(family, "", frozen)


class FreezeCallback(Callback):
    """Keeps frozen modules in evaluation mode, so that running statistics do not change."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.modules = modules

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for module in self.modules:
            if module.training:
                module.eval()


def _misfits(family: Family, trained: Artifact, reinitialize: Sequence[str]) -> list[str]:
    """Faults that names and shapes do not show: family, first stage, classes."""
    model = trained.config["model"]
    if model["name"] != family.config.name:
        return [f"model.name: the start is a {model['name']}, this is a {family.config.name}"]
    faults = []
    stage = str(getattr(family.config, "first_stage_sha256", ""))
    if stage and stage != model.get("first_stage_sha256"):
        faults.append("model.first_stage: the start was trained with another one; use that one")
    before, now = (
        [(condition.name, condition.kind, condition.classes) for condition in image.conditions]
        for image in (trained.image.encoded, family.image)
    )
    if before != now:
        # The shapes may match although each row belongs to another class.
        faults += [
            f"{name}: the conditions were {_shown(before)}, and are {_shown(now)}"
            for name in _embedding_names(family)
            if not _any(name, reinitialize)
        ]
    return faults


def _shown(conditions: Iterable[tuple[str, str, tuple[str, ...]]]) -> str:
    shown = [f"{name} ({', '.join(classes) or kind})" for name, kind, classes in conditions]
    return "; ".join(shown) or "none"


def _embedding_names(family: Family) -> list[str]:
    return [
        f"{prefix}.{name}"
        for prefix, module in family.named_modules()
        if isinstance(module, ConditionEmbedding)
        for name in module.state_dict()
    ]


def _changed(family: Family, trained: Artifact) -> dict[str, str]:
    """A sentence for each key in which the model differs from the start, by the key."""
    before, now = trained.config["model"], family.config.model_dump(mode="json")
    changed = {
        key: f"model.{key}: {before[key]} in the start model, {now[key]} here"
        for key in now
        if key not in _IGNORED_KEYS and key in before and before[key] != now[key]
    }
    if trained.image.encoded.channels != family.image.channels:
        changed["channels of images"] = (
            f"channels of the images: {trained.image.encoded.channels} in the start model, "
            f"{family.image.channels} here"
        )
    return changed


def _idle(family: Family) -> list[str]:
    """Faults of optimizers that would have no weights to train."""
    trained = {name for name, weight in family.named_parameters() if weight.requires_grad}
    if not trained:
        return ["no weight is left to train"]
    if not isinstance(family, AdversarialFamily) or family.discriminator is None:
        return []
    discriminator = {name for name in trained if name.startswith("discriminator.")}
    parts = {"the discriminator": discriminator, "the generator": trained - discriminator}
    return [f"no weight of {part} is left to train" for part, names in parts.items() if not names]


def _frozen_modules(module: torch.nn.Module, prefix: str, frozen: set[str]) -> list[Any]:
    names = {f"{prefix}{name}" for name, _ in module.named_parameters()}
    if names and names <= frozen:
        return [module]
    return [
        inner
        for name, child in module.named_children()
        for inner in _frozen_modules(child, f"{prefix}{name}.", frozen)
    ]


def _any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmatched(key: str, patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    faults = []
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        near = get_close_matches(pattern.rstrip(".*"), names, n=3, cutoff=0.3) or names[:3]
        faults.append(
            f"training.{key}: {pattern!r} matches no weight; there are {', '.join(near)} and others"
        )
    return faults
