"""Conditions inside a network: their embedding, and guidance by them.

Classifier-free guidance: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from synthcube.schema import Condition, ConditionSpec, Schema

_FREQUENCIES = 8


class GuidanceFields(Schema):
    """The part of a config that says how strictly a model follows its conditions."""

    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="Share of the images that are learned without their conditions, for guidance.",
    )
    guidance: Annotated[float, Field(ge=0, le=1000)] = Field(
        default=1.0,
        description="How strictly conditions are followed: 1 as learned, more exaggerates them at "
        "twice the cost, 0 ignores them.",
    )


class ConditionEmbedding(nn.Module):
    """K classes and numbers as one vector of length `dim`: the sum of an embedding of each.

    An unknown value, NaN, has an embedding of its own.
    """

    def __init__(self, specs: Sequence[ConditionSpec], dim: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(
            _ClassEmbedding(len(spec.classes), dim) if spec.kind == "class" else _Number(dim)
            for spec in specs
        )

    def forward(self, values: Tensor) -> Tensor:
        """(B, K), NaN where not known, to (B, dim)."""
        columns = values.unbind(dim=1)
        parts = [embed(column) for embed, column in zip(self.embeddings, columns, strict=True)]
        return torch.stack(parts).sum(dim=0)


class _ClassEmbedding(nn.Module):
    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, value: Tensor) -> Tensor:
        known = torch.nan_to_num(value, nan=float(self.num_classes)).long()
        embedded: Tensor = self.table(known)
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

    def forward(self, value: Tensor) -> Tensor:
        number = torch.nan_to_num(value)[:, None]
        angles = number * self.get_buffer("octaves")
        features = torch.cat([number, angles.sin(), angles.cos()], dim=1)
        return torch.where(value.isnan()[:, None], self.unknown, self.layers(features))


def dropped(condition: Condition, probability: float) -> Condition:
    """A condition in which all values of an image are unknown, with that probability."""
    values = condition["values"]
    if not probability or not values.shape[1]:
        return condition
    unknown = torch.rand(len(values), 1, device=values.device) < probability
    return Condition(values=values.masked_fill(unknown, math.nan), source=condition["source"])


def guided(
    predict: Callable[[Tensor, Tensor, Condition], Tensor], condition: Condition, guidance: float,
    num_guided: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """A network as a function of x_t and time alone, under a condition, with guidance.

    It goes `guidance` times as far from the unconditional prediction as the conditional one is, in
    the first `num_guided` channels (None: all), because a variance must not be exaggerated.
    """
    values, source = condition["values"], condition["source"]
    if guidance == 1 or not values.shape[1]:
        return lambda x_t, time: predict(x_t, time, condition)
    unknown = torch.full_like(values, math.nan)
    both = Condition(values=torch.cat([values, unknown]), source=torch.cat([source, source]))

    def prediction(x_t: Tensor, time: Tensor) -> Tensor:
        output = predict(torch.cat([x_t, x_t]), torch.cat([time, time]), both)
        conditional, unconditional = output.chunk(2)
        mixed = unconditional + guidance * (conditional - unconditional)
        if num_guided is None or num_guided == mixed.shape[1]:
            return mixed
        return torch.cat([mixed[:, :num_guided], conditional[:, num_guided:]], dim=1)

    return prediction
