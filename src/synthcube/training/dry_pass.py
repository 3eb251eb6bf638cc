"""What a training step of a family does, seen on a copy of it before the first step."""

from __future__ import annotations

import copy
from typing import Any

import torch

from synthcube.models.adversarial import AdversarialFamily
from synthcube.models.family import Family
from synthcube.schema import Batch


def copy_of(family: Family) -> Any:
    """To be tried on: a loss may move what a family keeps, as codebooks or running statistics."""
    return copy.deepcopy(family).eval()


def trained_terms(trial: Family, batch: Batch) -> list[str]:
    """Names of the scalars that a training step at that batch logs."""
    if not (isinstance(trial, AdversarialFamily) and trial.discriminator is not None):
        with torch.no_grad():
            return list(trial.loss(batch))
    # With gradients: some terms are made of them.
    terms, made = trial.generator_loss(trial.prepared(batch))
    judged = trial.discriminator_loss(batch, made.detach())
    names = list(terms)
    if trial.trains_discriminator():
        names += [f"discriminator_{name}" for name in judged]
    return names


def called_networks(family: Family, batch: Batch) -> list[str]:
    """Names of the modules that a training step calls itself, not through another of them."""
    trial = copy_of(family)
    found: dict[str, None] = {}
    depth = 0

    def enter(name: str) -> None:
        nonlocal depth
        if depth == 0:
            found[name] = None
        depth += 1

    def leave() -> None:
        nonlocal depth
        depth -= 1

    for name, module in trial.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *_, name=name: enter(name))
            module.register_forward_hook(lambda *_: leave(), always_call=True)
    trained_terms(trial, batch)
    return list(found)
