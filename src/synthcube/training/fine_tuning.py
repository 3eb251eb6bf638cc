"""Fine-tuning: a training that starts from the weights of another, of which some may stay."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from synthcube.errors import ConfigError
from synthcube.models import artifact
from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.artifact import Artifact
from synthcube.models.family import Family
from synthcube.models.nets.conditioning import ConditionEmbedding
from synthcube.storage import sha256
from synthcube.training.config import TrainingConfig

log = logging.getLogger("synthcube")

# Keys of a model that say how it is trained, or where it lies: they may well be others.
_FREE = ("optimizer", "scheduler", "discriminator_optimizer", "discriminator_scheduler",
         "first_stage")  # fmt: skip


def resolved(training: TrainingConfig, recorded: Mapping[str, Any]) -> TrainingConfig:
    """The same with the hash of the weights that it starts from.

    Args:
        recorded: section `training` of the run that is continued, which needs its start no more;
            empty for a new one.

    Raises:
        SynthCubeError: the start is missing or damaged, or has another hash than is asked for.
    """
    if training.start_from is None:
        return training
    asked = training.start_from_sha256
    if digest := str(recorded.get("start_from_sha256") or ""):
        return training if asked else training.model_copy(update={"start_from_sha256": digest})
    digest = sha256(_found(training).weights)
    if asked not in ("", digest):
        raise ConfigError(
            f"training.start_from {training.start_from}: the SHA-256 of its weights is {digest}, "
            f"and training.start_from_sha256 is {asked}."
        )
    return training.model_copy(update={"start_from_sha256": digest})


def take_weights(family: Family, training: TrainingConfig) -> None:
    """Give `family` the weights that `training` starts from, if any.

    All of them must fit by name and shape, but for those that are to start anew.

    Raises:
        ConfigError: they do not, or are of another family; every misfit has a line.
        ArtifactError: there is no trained model, or it is damaged.
    """
    if training.start_from is None:
        return
    found = _found(training)
    weights = load_file(found.weights)
    own = family.state_dict()
    kept = {name: each for name, each in weights.items() if not _any(name, training.start_anew)}
    wanted = [name for name in own if not _any(name, training.start_anew)]
    faults = [
        *_unmatched("start_anew", training.start_anew, [*own, *weights]),
        *_misfits(family, found, training.start_anew),
        *(f"{name}: only in the model" for name in wanted if name not in kept),
        *(f"{name}: only in the start" for name in kept if name not in own),
        *(
            f"{name}: shape {list(kept[name].shape)} in the start, {list(own[name].shape)} here"
            for name in wanted
            if name in kept and kept[name].shape != own[name].shape
        ),
    ]
    if faults:
        raise ConfigError(
            f"training.start_from {training.start_from} does not fit this model; name what is to "
            "start anew in training.start_anew, or mend:",
            faults,
        )
    # Not strict, because the names were compared above.
    family.load_state_dict(kept, strict=False)
    log.info(
        "Starting from %s (SHA-256 %s...): %d of %d weights taken.",
        training.start_from, training.start_from_sha256[:12], len(wanted), len(own),
    )  # fmt: skip
    if changed := _changed(family, found):
        log.info("Other than in the start: %s.", ", ".join(changed))


def freeze(family: Family, training: TrainingConfig) -> list[torch.nn.Module]:
    """Exclude the weights from training that `training.freeze` names.

    Returns:
        Modules that are frozen as a whole, without those inside them: their running statistics
        and codebooks must stay as well; see Frozen.

    Raises:
        ConfigError: a pattern matches none, or one that starts anew; or nothing is left to train.
    """
    patterns = training.freeze
    named = dict(family.named_parameters())
    frozen = {name for name in named if _any(name, patterns)}
    faults = _unmatched("freeze", patterns, named)
    faults += [
        f"training.freeze matches {name}, which starts anew"
        for name in sorted(frozen)
        if _any(name, training.start_anew)
    ]
    if not faults:
        for name in frozen:
            named[name].requires_grad_(False)
        faults = _idle(family) if frozen else []
    if faults:
        raise ConfigError("training.freeze cannot be followed:", faults)
    return _frozen_modules(family, "", frozen)


class Frozen(Callback):
    """Holds modules in evaluation mode, as what they keep beside weights changes in training."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.modules = modules

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        for module in self.modules:
            if module.training:
                module.eval()


def _found(training: TrainingConfig) -> Artifact:
    return artifact.load(str(training.start_from))


def _misfits(family: Family, found: Artifact, anew: Sequence[str]) -> list[str]:
    """What names and shapes do not show."""
    model = found.config["model"]
    if model["name"] != family.config.name:
        return [f"model.name: the start is a {model['name']}, this is a {family.config.name}"]
    faults = []
    stage = str(getattr(family.config, "first_stage_sha256", ""))
    if stage and stage != model.get("first_stage_sha256"):
        faults.append("model.first_stage: the start was trained on another one; give that one")
    before = [(each.name, each.kind, each.classes) for each in found.image.conditions]
    now = [(each.name, each.kind, each.classes) for each in family.image.conditions]
    if before != now:
        # Their weights may fit by shape, and would mean another class.
        faults += [
            f"{name}: the conditions were {_shown(before)}, and are {_shown(now)}"
            for name in _embedding_names(family)
            if not _any(name, anew)
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


def _changed(family: Family, found: Artifact) -> list[str]:
    before, now = found.config["model"], family.config.model_dump(mode="json")
    return [
        f"model.{key} ({before[key]}, now {now[key]})"
        for key in now
        if key not in _FREE and key in before and before[key] != now[key]
    ]


def _idle(family: Family) -> list[str]:
    """Optimizers that would have nothing to do."""
    trained = {name for name, each in family.named_parameters() if each.requires_grad}
    if not trained:
        return ["nothing is left to train"]
    if not isinstance(family, AdversarialFamily) or family.discriminator is None:
        return []
    judging = {name for name in trained if name.startswith("discriminator.")}
    parts = {
        "the discriminator": judging,
        "what plays against the discriminator": trained - judging,
    }
    return [f"of {part} nothing is left to train" for part, names in parts.items() if not names]


def _frozen_modules(module: torch.nn.Module, prefix: str, frozen: set[str]) -> list[Any]:
    names = {f"{prefix}{name}" for name, _ in module.named_parameters()}
    if names and names <= frozen:
        return [module]
    return [
        each
        for name, child in module.named_children()
        for each in _frozen_modules(child, f"{prefix}{name}.", frozen)
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
