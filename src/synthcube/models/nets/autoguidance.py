"""Autoguidance: images are driven away from what the same network made earlier in its training.

Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself" (NeurIPS 2024,
arXiv 2406.02507). The earlier network makes the same mistakes, only larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from synthcube.errors import ConfigError
from synthcube.models.samplers import Predict
from synthcube.schema import Schema


class AutoguidanceFields(Schema):
    """The part of a config that says which weights guide, and how far."""

    autoguidance_from: float = Field(
        default=0.0, ge=0, lt=1,
        description="Share of the training after which the averaged weights are kept beside the "
        "final ones, for autoguidance; 0: none are kept.",
    )  # fmt: skip
    autoguidance: float = Field(
        default=1.0, ge=1, le=100,
        description="How far images are driven away from what the earlier weights would make: 1 "
        "not at all; 1.5 makes fewer odd images, at twice the cost.",
    )  # fmt: skip

    def autoguidance_faults(self) -> list[str]:
        """The reason why nothing can guide, in a sentence; empty if something can."""
        if self.autoguidance == 1 or self.autoguidance_from:
            return []
        return [
            f"model.autoguidance {self.autoguidance:g}: no earlier weights are kept; set "
            "model.autoguidance_from, such as 0.25, too"
        ]

    def require_earlier_weights(self, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError where the section `sampling` asks for weights that are not kept."""
        strength = settings.get("autoguidance") or 1
        if strength > 1 and not self.autoguidance_from:
            raise ConfigError(
                f"sampling.autoguidance {strength:g}: this model kept no earlier weights "
                "(model.autoguidance_from): leave it out."
            )


class EarlierNetwork(nn.Module):
    """A copy of a network that is never trained, nor averaged: its weights are buffers."""

    is_kept: Tensor
    """1 if the weights are those of a trained network, 0 if they are the first ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = deepcopy(network)
        for part in self.network.modules():
            for name, weight in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.register_buffer(name, weight.detach())
        self.register_buffer("is_kept", torch.zeros(()))

    @torch.no_grad()
    def keep(self, network: nn.Module) -> None:
        """Take the weights that a network of the same architecture has now."""
        weights = network.state_dict()
        for name, buffer in self.network.state_dict().items():
            buffer.copy_(weights[name])
        self.is_kept.fill_(1)


def guided(now: Predict, earlier: Predict, strength: float, num_guided: int) -> Predict:
    """`strength` times as far from the earlier prediction as the present one is.

    In the first `num_guided` channels, because a variance must not be exaggerated.
    """

    def prediction(x_t: Tensor, time: Tensor) -> Tensor:
        present = now(x_t, time)
        mixed = torch.lerp(earlier(x_t, time), present, strength)
        if num_guided == mixed.shape[1]:
            return mixed
        return torch.cat([mixed[:, :num_guided], present[:, num_guided:]], dim=1)

    return prediction
