"""Weights of monai-generative 0.2.3, and of GaNDLF-Synth, whose networks compute the same.

Strict, because a loader that is not makes wrong images without a word: every weight of the
checkpoint is used or named as dropped, every weight of our network is filled, and both networks
must give the same output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from synthcube import reading
from synthcube.errors import ArtifactError, first_faults
from synthcube.models import gandlf

TOLERANCE = 1e-5
_Weights = Mapping[str, torch.Tensor]
_RENAMED = (
    (re.compile(r"\.to_(q|k|v)\."), r".attn.to_\1."),
    (re.compile(r"\.upsampler\.conv\."), ".upsampler.postconv."),
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
    (re.compile(r"^class_embedding\.weight$"), "class_embedding.embeddings.0.table.weight"),
)
# monai-generative creates this layer and never calls it: its weights are untrained.
_NEVER_USED = re.compile(r"\.proj_attn\.")
# Ours is called there, so it must pass on what it gets.
_IDENTITY = re.compile(r"\.attn\.out_proj\.(weight|bias)$")


@runtime_checkable
class Imports(Protocol):
    """A family whose network monai-generative has as well."""

    network: torch.nn.Module

    def legacy_network(self) -> torch.nn.Module:
        """The same network, untrained, as monai-generative builds it."""

    def outputs_of(
        self, legacy: torch.nn.Module, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What this network and the `legacy` one make of one random input."""


@runtime_checkable
class ImportsDiscriminator(Imports, Protocol):
    """One that trains against a discriminator which monai-generative has as well."""

    def discriminator_import(self) -> Imports | None:
        """The discriminator, to fill and to compare; null where the config trains without one."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Weights for our network, those of the checkpoint without the prefix, and what was dropped."""

    state: dict[str, torch.Tensor]
    source: dict[str, torch.Tensor]
    dropped: tuple[str, ...]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name: .safetensors, a state dict, or one of Lightning's.

    Raises ArtifactError where it cannot be read without running code from it, or has no weights.
    """
    reading.check_checkpoint(path, ArtifactError)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch raises many kinds
        raise ArtifactError(
            f"{path} cannot be read as plain weights ({type(error).__name__}): SynthCube runs no "
            "code from a checkpoint. Where it was made, save its state dict alone: "
            "torch.save(network.state_dict(), 'weights.pt')."
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    weights = {str(k): v for k, v in content.items()} if isinstance(content, dict) else {}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ArtifactError(f"{path} holds no weights: a state dict of tensors is needed.")
    return weights


def converted(weights: _Weights, network: torch.nn.Module) -> Converted:
    """Weights of monai-generative or GaNDLF-Synth under the names of `network`.

    Raises ArtifactError where weights are left over, missing, or of another shape, which names all;
    or where they are of a network that we do not have.
    """
    _refuse_control(weights)
    weights, dropped = gandlf.as_monai_generative(weights)
    wanted = network.state_dict()
    prefix = _prefix(weights, wanted)
    source: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    strange: list[str] = []
    for key, value in weights.items():
        name = key.removeprefix(prefix)
        target = _renamed(name)
        if not key.startswith(prefix):
            twin = next((k for k in weights if k.startswith(prefix) and k.endswith(key)), "")
            known = twin and torch.equal(weights[twin], value)
            (dropped if known else strange).append(key)
            continue
        source[name] = value
        if _NEVER_USED.search(name):
            dropped.append(key)
        elif target in wanted:
            state[target] = value
        else:
            strange.append(key)
    for name, value in wanted.items():
        if name not in state and (match := _IDENTITY.search(name)):
            state[name] = torch.eye(len(value)) if match[1] == "weight" else torch.zeros_like(value)
    check(state, wanted, strange)
    return Converted(state, source, tuple(dropped))


def largest_difference(family: Imports, weights: Converted) -> float:
    """The largest difference between the outputs of our network and of monai-generative's, both
    with these weights; ArtifactError if the latter does not take them."""
    legacy = family.legacy_network().eval()
    try:
        legacy.load_state_dict(weights.source, strict=True)
    except RuntimeError as error:
        message = f"monai-generative itself does not take these weights: {error}"
        raise ArtifactError(message) from error
    family.network.eval()
    with torch.inference_mode():
        ours, theirs = family.outputs_of(legacy, torch.Generator().manual_seed(0))
    return float((ours - theirs).abs().max())


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _prefix(weights: _Weights, wanted: _Weights) -> str:
    """What a wrapper wrote before every name; "" where there is none."""
    candidates = {""}
    for key in weights:
        parts = key.split(".")
        candidates |= {".".join(parts[:n]) + "." for n in range(1, min(4, len(parts)))}

    def matches(prefix: str) -> int:
        names = [key.removeprefix(prefix) for key in weights if key.startswith(prefix)]
        return sum(_renamed(name) in wanted for name in names)

    return max(sorted(candidates, key=lambda prefix: (len(prefix), prefix)), key=matches)


def _refuse_control(weights: Mapping[str, torch.Tensor]) -> None:
    if any(part.startswith("controlnet_") for key in weights for part in key.split(".")):
        raise ArtifactError(
            "These are weights of a ControlNet, a network that SynthCube does not have. Its "
            "DiffusionModelUNet alone can be imported (--family ddpm), without what steered it. To "
            "make images that follow other images, train ddpm or rectified_flow with "
            "data.source_channels."
        )


def check(state: _Weights, wanted: _Weights, strange: list[str]) -> None:
    """ArtifactError where weights are left over (`strange`), missing, or of another shape."""
    faults = [f"{name}: our network has no such weight" for name in strange]
    faults += [f"{name}: not in the checkpoint" for name in wanted if name not in state]
    faults += [
        f"{name}: {tuple(value.shape)} in the checkpoint, {tuple(wanted[name].shape)} in the config"
        for name, value in state.items()
        if value.shape != wanted[name].shape
    ]
    if faults:
        raise ArtifactError(
            "The checkpoint does not fit the config: it must describe the network that was "
            "trained.",
            first_faults(faults),
        )
