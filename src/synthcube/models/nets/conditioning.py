"""What conditions become inside a network, and guidance by them.

Classifier-free guidance: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import nn

from synthcube.schema import Condition, ConditionSpec, Schema

_FREQUENCIES = 8


class GuidanceFields(Schema):
    """The part of a config that says how strictly a model follows its conditions."""

    condition_dropout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the images that are learned without their conditions, for guidance.",
    )
    guidance: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        description="How strictly conditions are followed: 1 as learned, more exaggerates them at "
        "twice the cost, 0 ignores them.",
    )


class ConditionEmbedding(nn.Module):
    """Classes and numbers as one vector: the sum of an embedding of each; NaN has its own.

    Args:
        specs: the conditions, K of them.
        dim: length of the vector.
    """

    def __init__(self, specs: Sequence[ConditionSpec], dim: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            _ClassEmbedding(len(spec.classes), dim) if spec.kind == "class" else _Number(dim)
            for spec in specs
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, K), NaN where not known, to (B, dim)."""
        parts = [each(values[:, i]) for i, each in enumerate(self.embeddings)]
        return torch.stack(parts).sum(dim=0)


class _ClassEmbedding(nn.Module):
    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        known = torch.nan_to_num(value, nan=float(self.num_classes)).long()
        embedded: torch.Tensor = self.table(known)
        return embedded


class _Number(nn.Module):
    """Sines and cosines of the number through two layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        octaves = 2.0 ** torch.arange(_FREQUENCIES) * math.pi / 4
        self.register_buffer("octaves", octaves, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES + 1, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.unknown = nn.Parameter(torch.zeros(dim))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        number = torch.nan_to_num(value)[:, None]
        angles = number * self.get_buffer("octaves")
        features = torch.cat([number, angles.sin(), angles.cos()], dim=1)
        return torch.where(value.isnan()[:, None], self.unknown, self.layers(features))


def without(condition: Condition) -> Condition:
    """The same with no value known."""
    values = torch.full_like(condition["values"], math.nan)
    return Condition(values=values, source=condition["source"])


def dropped(condition: Condition, probability: float) -> Condition:
    """The same, where each image's values are unknown with that probability."""
    values = condition["values"]
    if not probability or not values.shape[1]:
        return condition
    gone = torch.rand(len(values), 1, device=values.device) < probability
    return Condition(values=values.masked_fill(gone, math.nan), source=condition["source"])


def guided(
    predict: Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor],
    condition: Condition,
    guidance: float,
    num_guided: int | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`predict(x_t, time, condition)` as a function of x_t and time, with guidance.

    Follows the conditions `guidance` times as far from the unconditional prediction; only the
    first `num_guided` channels of it, because a variance must not be exaggerated.
    """
    if guidance == 1 or not condition["values"].shape[1]:
        return lambda x_t, time: predict(x_t, time, condition)
    free = without(condition)
    both = Condition(
        values=torch.cat([condition["values"], free["values"]]),
        source=torch.cat([condition["source"]] * 2),
    )

    def prediction(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        followed, ignored = predict(torch.cat([x_t, x_t]), torch.cat([time, time]), both).chunk(2)
        mixed = ignored + guidance * (followed - ignored)
        if num_guided is None or num_guided == mixed.shape[1]:
            return mixed
        return torch.cat([mixed[:, :num_guided], followed[:, num_guided:]], dim=1)

    return prediction
