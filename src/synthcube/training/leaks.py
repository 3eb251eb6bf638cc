"""What would tell of private images beside the gradients, or cannot be trained privately."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from synthcube.compute import ComputeConfig, devices_used
from synthcube.data.preprocessing import DataConfig
from synthcube.data.unmeasured import undeclared
from synthcube.errors import ConfigError
from synthcube.models.family import Family, FamilyConfig
from synthcube.training.config import TrainingConfig

_PRECISIONS = ("auto", "32", "32-true", "64", "64-true", "bf16", "bf16-mixed")
_OURS = "synthcube."


def faults(
    model: FamilyConfig, data: DataConfig, training: TrainingConfig, compute: ComputeConfig
) -> Iterator[str]:
    """Yield the reasons why a config cannot be trained with privacy, one sentence each."""
    if training.privacy is None:
        return

    def kept(name: str) -> bool:
        is_new = any(fnmatchcase(name, pattern) for pattern in training.start_anew)
        return training.start_from is not None and not is_new

    yield from model.private_faults(kept)
    yield from undeclared(data)
    yield from _choices(model, training)
    if training.accumulate > 1:
        yield (
            f"training.accumulate is {training.accumulate}: with privacy a step is one batch, "
            "which images_at_once keeps within the memory; raise training.batch_size instead"
        )
    if isinstance(training.gradient_clip_norm, float):
        yield (
            "training.gradient_clip_norm: with privacy the gradient of each subject is clipped, "
            "to training.privacy.clip_norm; leave it out"
        )
    yield from _computing(compute)


def require_one_process(
    training: TrainingConfig, compute: ComputeConfig, device: torch.device
) -> None:
    """Raise ConfigError where several devices would train privately."""
    number = devices_used(compute, device)
    if training.privacy and number > 1:
        raise ConfigError(
            f"training.privacy: one process trains, and there are {number} devices; set "
            "compute.num_devices to 1."
        )


def require_private(family: Family) -> None:
    """Raise ConfigError where a built model tells of its images beside its gradients."""
    norms = [
        name
        for name, module in family.named_modules()
        if isinstance(module, _BatchNorm) and module.training and _is_trained(module)
    ]
    reasons = []
    if norms:
        reasons.append(
            f"{norms[0]} and {len(norms)} batch norm(s) in all mix the images of a batch; use "
            "group norm"
        )
    if _is_own(family, "training_step") or not family.automatic_optimization:
        reasons.append("it trains in steps of its own; privacy needs those of `loss`")
    reasons += [
        f"its {hook} measures the images, and nothing bounds what it keeps"
        for hook in ("fit_statistics", "measure")
        if _is_own(family, hook)
    ]
    if reasons:
        name = family.config.name
        raise ConfigError(f"model.name {name} cannot be trained with privacy:", reasons)


def _choices(model: FamilyConfig, training: TrainingConfig) -> Iterator[str]:
    """Yield what would be chosen by a loss of private images."""
    if training.early_stop:
        yield (
            "training.early_stop: a loss of private images would say when to stop; leave it out, "
            "max_epochs and max_minutes end the training"
        )
    if training.best:
        yield (
            "training.best: a loss of private images would choose the model; leave it out, the "
            "last one is kept"
        )
    scheduler = model.scheduler
    if scheduler and scheduler.follows_loss:
        yield (
            f"model.scheduler {scheduler.name} follows a loss of private images; use cosine or "
            "constant_with_warmup"
        )


def _computing(compute: ComputeConfig) -> Iterator[str]:
    """Yield the settings with which gradients of single images cannot be computed."""
    if compute.num_devices not in (None, 1) or compute.num_nodes != 1:
        yield "compute.num_devices and num_nodes: with privacy one process trains; use 1"
    if compute.strategy in ("fsdp", "deepspeed"):
        yield f"compute.strategy {compute.strategy}: with privacy one process trains; leave it out"
    if compute.precision not in _PRECISIONS:
        yield (
            f"compute.precision {compute.precision}: noise needs weights in 32 bits, and float16 "
            "loses small gradients; use auto, bf16 or 32"
        )
    for key in ("compile", "activation_checkpointing"):
        if getattr(compute, key):
            yield f"compute.{key} does not work with gradients of single images; leave it out"


def _is_own(family: Family, method: str) -> bool:
    """Whether a user's family has its own version of a method."""
    function = getattr(type(family), method, None)
    return function is not None and not str(function.__module__).startswith(_OURS)


def _is_trained(module: torch.nn.Module) -> bool:
    weights = list(module.parameters())
    return not weights or any(weight.requires_grad for weight in weights)
