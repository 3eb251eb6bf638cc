"""The DCGAN of GaNDLF-Synth: its weights under our names, and what it computes with them.

Four doublings to 64 voxels a side, then the image is enlarged and smoothed by two convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from synthcube.models import gandlf

_Weights = Mapping[str, Tensor]
_GENERATOR, _FEATURES = "generator.feature_extractor", "discriminator.feature_extractor"
_LINEAR = "discriminator.classifier.linear1"
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


def converted(weights: _Weights, size: Sequence[int]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of our DCGAN for images of `size`, and names in the checkpoint that are strange."""
    old = gandlf.without_prefix(weights, "dcgan")
    names = {
        **{f"{_GENERATOR}.norm{i + 1}": f"generator.norms.{i}" for i in range(4)},
        **{f"{_GENERATOR}.conv{i + 2}t": f"generator.doublings.{i}" for i in range(4)},
        **{f"{_FEATURES}.conv{i + 1}": f"discriminator.halvings.{i}" for i in range(4)},
        **{f"{_FEATURES}.norm{i + 2}": f"discriminator.norms.{i}" for i in range(3)},
        f"{_GENERATOR}.conv1_smooth": "generator.smooth.1",
        f"{_GENERATOR}.norm1_smooth": "generator.smooth.2",
        f"{_GENERATOR}.conv2_smooth": "generator.smooth.4",
    }
    state: dict[str, Tensor] = {}
    strange: list[str] = []
    composed = (f"{_GENERATOR}.conv1t", f"{_FEATURES}.conv5", _LINEAR)
    for name, value in old.items():
        layer, _, rest = name.rpartition(".")
        if layer in names:
            state[f"{names[layer]}.{rest}"] = value
        elif layer not in composed:
            strange.append(name)
    # Our discriminator is never evaluated, so it keeps no statistics.
    state = {
        name: value
        for name, value in state.items()
        if not (name.startswith("discriminator.") and name.endswith(_STATISTICS))
    }
    project = old[f"{_GENERATOR}.conv1t.weight"]
    state["generator.project.weight"] = project.flatten(1).T.contiguous()
    for first, weight in (("generator.doublings.3", 1), ("discriminator.halvings.0", 0)):
        if f"{first}.weight" in state:
            state[f"{first}.bias"] = torch.zeros(state[f"{first}.weight"].shape[weight])
    if f"{_LINEAR}.weight" in old and f"{_FEATURES}.conv5.weight" in old:
        state["discriminator.head.weight"] = _head(old, size)
        state["discriminator.head.bias"] = old[f"{_LINEAR}.bias"]
    return state, strange


def outputs(
    weights: _Weights, latent: Tensor, image: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """Images (B, C, *spatial) in [-1, 1] of latents (B, Z), evaluated, with the size of `image`;
    and logits (B,) of `image` (B, C, *spatial), with the statistics of this batch.

    `slope` is that of the discriminator's leaky ReLU below 0.
    """
    old, rank = gandlf.without_prefix(weights, "dcgan"), image.ndim - 2
    convolve: Any = getattr(functional, f"conv{rank}d")
    transposed: Any = getattr(functional, f"conv_transpose{rank}d")

    def norm(x: Tensor, layer: str) -> Tensor:
        mean, variance, _ = (old.get(layer + suffix) for suffix in _STATISTICS)
        training = layer.startswith("discriminator.")
        statistics = (None, None) if training else (mean, variance)
        scale, shift = old[f"{layer}.weight"], old[f"{layer}.bias"]
        return functional.batch_norm(x, *statistics, scale, shift, training=training)

    x = transposed(latent.view(*latent.shape, *[1] * rank), old[f"{_GENERATOR}.conv1t.weight"])
    for number in range(1, 5):
        x = norm(x, f"{_GENERATOR}.norm{number}").relu()
        x = transposed(x, old[f"{_GENERATOR}.conv{number + 1}t.weight"], stride=2, padding=1)
    if f"{_GENERATOR}.conv1_smooth.weight" in old:
        mode = "bilinear" if rank == 2 else "trilinear"
        x = functional.interpolate(x, image.shape[2:], mode=mode, align_corners=True)
        # What padding "same" is for an even kernel.
        x = convolve(functional.pad(x, (1, 2) * rank), old[f"{_GENERATOR}.conv1_smooth.weight"])
        x = norm(x, f"{_GENERATOR}.norm1_smooth").relu()
        x = convolve(x, old[f"{_GENERATOR}.conv2_smooth.weight"], padding=1)
    return x.tanh(), _logits(old, image, slope, convolve, norm)


def _logits(old: _Weights, image: Tensor, slope: float, convolve: Any, norm: Any) -> Tensor:
    x = convolve(image, old[f"{_FEATURES}.conv1.weight"], stride=2, padding=1)
    for number in range(2, 5):
        x = convolve(
            functional.leaky_relu(x, slope),
            old[f"{_FEATURES}.conv{number}.weight"], stride=2, padding=1,
        )  # fmt: skip
        x = norm(x, f"{_FEATURES}.norm{number}")
    x = convolve(functional.leaky_relu(x, slope), old[f"{_FEATURES}.conv5.weight"])
    return functional.linear(
        x.flatten(1), old[f"{_LINEAR}.weight"], old[f"{_LINEAR}.bias"]
    ).squeeze(1)


def _head(old: _Weights, size: Sequence[int]) -> Tensor:
    """Its last convolution and the linear layer after it, as one linear layer."""
    kernel = old[f"{_FEATURES}.conv5.weight"]
    places = [side // 16 - 3 for side in size]
    weight = old[f"{_LINEAR}.weight"]
    if weight.numel() != math.prod(places):
        return weight  # of images of another size, which is refused later
    weight = weight.view(1, 1, *places)
    transposed: Any = getattr(functional, f"conv_transpose{len(size)}d")
    head: Tensor = transposed(weight, kernel)
    return head.flatten(1)
