"""Checkpoints of GaNDLF-Synth: what they are of, and their weights under other names.

Its networks compute what monai-generative's do, but are built of plain convolutions, and list
activations and dropouts among the blocks, so that names and numbers differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from synthcube.errors import ArtifactError, first_faults

_Weights = Mapping[str, torch.Tensor]
# A weight that every model of a kind has, and no network of monai-generative.
_MARKS = {
    "ddpm": "conv_in.weight",
    "vqvae": "encoder.encoder_blocks.0.weight",
    "dcgan": "generator.feature_extractor.conv1t.weight",
    "stylegan": "generator.starting_cte",
}
_CONVOLUTIONS = (
    (
        re.compile(r"(^|\.)(conv_in|conv1|conv2|skip_connection|op)\.(weight|bias)$"),
        r"\1\2.conv.\3",
    ),
    (re.compile(r"\.upsampler\.conv\.(weight|bias)$"), r".upsampler.conv.conv.\1"),
    (re.compile(r"^out\.2\.(weight|bias)$"), r"out.2.conv.\1"),
)
_BLOCK = re.compile(r"^(encoder|decoder)\.\1_blocks\.(\d+)\.(.+)$")
_IN_BLOCK = {"residual_block.0.": "conv1.conv.", "residual_block.3.": "conv2.conv."}
# Encoder, quantizer and decoder of the VQVAE once more, in this order.
_REPEATED = re.compile(r"^full_module\.([012])\.(.+)$")
_PARTS = ("encoder", "quantizer", "decoder")

DIFFUSION: Mapping[str, Any] = {
    "schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction": "epsilon",
    "variance": "fixed_small",
}
"""How every DDPM of GaNDLF-Synth was trained and sampled: it has no keys for these."""

REFUSED = {
    "stylegan": "GaNDLF-Synth's StyleGAN is another network than SynthCube's: it has adaptive "
    "instance norms and adds noise at full strength. Its weights cannot be imported; train "
    "--family stylegan on the same images instead.",
}
"""Models of GaNDLF-Synth that are not imported, with the reason."""


def kind_of(weights: _Weights) -> str | None:
    """The name of the model that GaNDLF-Synth saved; None for a checkpoint of another program."""
    return next((kind for kind, mark in _MARKS.items() if _prefix(weights, mark) is not None), None)


def without_prefix(weights: _Weights, kind: str) -> dict[str, torch.Tensor]:
    """The weights of that kind of model without the "model." before their names."""
    prefix = _prefix(weights, _MARKS[kind]) or ""
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def as_monai_generative(weights: _Weights) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights of a DDPM or VQVAE under monai-generative's names, and what was left out.

    Weights of another program stay as they are. Raises ArtifactError where the two copies of a
    weight differ.
    """
    kind = kind_of(weights)
    if kind not in ("ddpm", "vqvae"):
        return dict(weights), []
    inner = without_prefix(weights, kind)
    if kind == "ddpm":
        return {_with_convolution(name): value for name, value in inner.items()}, []
    places = _places(inner)
    renamed: dict[str, torch.Tensor] = {}
    differing: list[str] = []
    for name, value in inner.items():
        if again := _REPEATED.match(name):
            twin = inner.get(f"{_PARTS[int(again[1])]}.{again[2]}")
            if twin is None or not torch.equal(twin, value):
                differing.append(f"{name}: not the same as in {_PARTS[int(again[1])]}")
        else:
            renamed[_block_renamed(name, places)] = value
    if differing:
        raise ArtifactError(
            "The checkpoint has two copies of its weights, and they differ: it is damaged.",
            first_faults(differing),
        )
    num_repeated = len(inner) - len(renamed)
    return renamed, [f"full_module ({num_repeated} weights, listed twice)"] if num_repeated else []


def _prefix(weights: _Weights, mark: str) -> str | None:
    """What stands before a weight's name, as "model."; None where there is no such weight."""
    places = [key.removesuffix(mark) for key in weights if f".{key}".endswith(f".{mark}")]
    return min(places, key=len, default=None)


def _with_convolution(name: str) -> str:
    for pattern, replacement in _CONVOLUTIONS:
        name = pattern.sub(replacement, name)
    return name


def _places(names: Mapping[str, Any]) -> dict[tuple[str, int], int]:
    """Number of a block, among those of its part that have weights, by part and number there."""
    blocks = {(match[1], int(match[2])) for name in names if (match := _BLOCK.match(name))}
    return {
        (part, number): place
        for part in ("encoder", "decoder")
        for place, number in enumerate(sorted(n for p, n in blocks if p == part))
    }


def _block_renamed(name: str, places: Mapping[tuple[str, int], int]) -> str:
    match = _BLOCK.match(name)
    if match is None:
        return name
    part, number, rest = match[1], int(match[2]), match[3]
    for ours, theirs in _IN_BLOCK.items():
        rest = rest.replace(ours, theirs) if rest.startswith(ours) else rest
    if rest in ("weight", "bias"):
        rest = f"conv.{rest}"
    return f"{part}.blocks.{places[part, number]}.{rest}"
