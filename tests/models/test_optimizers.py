"""Our own optimizers against the formulas of their papers, written out for one number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from synthcube.models.optimizers import ADOPT, AdEMAMix, Lion

GRADIENTS = [0.5, -2.0, 0.25, 3.0, -0.75]
LR = 0.1


def walked(optimizer: type[Any], **settings: Any) -> list[float]:
    """Where two weights that start at 1 go; the second must go the same way as the first."""
    weights = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    built = optimizer(weights, lr=LR, **settings)
    path = []
    for gradient in GRADIENTS:
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        built.step()
        assert torch.equal(weights[0], weights[1])
        path.append(weights[0][0].item())
    return path


def lion(beta_1: float, beta_2: float, decay: float) -> Iterator[float]:
    x, m = 1.0, 0.0
    for g in GRADIENTS:
        x -= LR * (math.copysign(1, beta_1 * m + (1 - beta_1) * g) + decay * x)
        m = beta_2 * m + (1 - beta_2) * g
        yield x


def ademamix(
    beta_1: float, beta_2: float, beta_3: float, alpha: float, decay: float, length: int = 0
) -> Iterator[float]:
    x, m_1, m_2, v = 1.0, 0.0, 0.0, 0.0
    for t, g in enumerate(GRADIENTS, start=1):
        a, b = alpha, beta_3
        if t < length:
            a = t * alpha / length
            top = math.log(beta_1) * math.log(beta_3)
            below = (1 - t / length) * math.log(beta_3) + t / length * math.log(beta_1)
            b = min(math.exp(top / below), beta_3)
        m_1 = beta_1 * m_1 + (1 - beta_1) * g
        m_2 = b * m_2 + (1 - b) * g
        v = beta_2 * v + (1 - beta_2) * g * g
        root = math.sqrt(v / (1 - beta_2**t)) + 1e-8
        x -= LR * ((m_1 / (1 - beta_1**t) + a * m_2) / root + decay * x)
        yield x


def adopt(beta_1: float, beta_2: float, decay: float, decouple: bool) -> Iterator[float]:
    x, m, v = 1.0, 0.0, 0.0
    for t, raw in enumerate(GRADIENTS):
        g = raw if decouple else raw + decay * x
        if t == 0:
            v = g * g
        else:
            c = t**0.25
            m = beta_1 * m + (1 - beta_1) * min(max(g / max(math.sqrt(v), 1e-6), -c), c)
            x -= LR * (m + (decay * x if decouple else 0))
            v = beta_2 * v + (1 - beta_2) * g * g
        yield x


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion(decay: float) -> None:
    expected = list(lion(0.9, 0.99, decay))
    assert walked(Lion, weight_decay=decay) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("length", [0, 4])
def test_ademamix(decay: float, length: int) -> None:
    expected = list(ademamix(0.9, 0.99, 0.999, 5, decay, length))
    path = walked(AdEMAMix, betas=(0.9, 0.99, 0.999), weight_decay=decay, num_warmup_steps=length)
    assert path == pytest.approx(expected, rel=1e-9)


def test_ademamix_without_its_slow_mean_is_adamw() -> None:
    path = walked(AdEMAMix, alpha=0.0, weight_decay=0.1)
    assert path == pytest.approx(walked(torch.optim.AdamW, weight_decay=0.1), rel=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("decouple", [False, True])
def test_adopt(decay: float, decouple: bool) -> None:
    expected = list(adopt(0.9, 0.99, decay, decouple))
    path = walked(ADOPT, betas=(0.9, 0.99), weight_decay=decay, decouple=decouple)
    assert path == pytest.approx(expected, rel=1e-9)
    assert path[0] == 1


@pytest.mark.parametrize("kind", [ADOPT, AdEMAMix, Lion])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr": -1.0}, "lr -1.0: must not be negative"),
        ({"betas": (0.9,)}, r"betas \[0.9\]: [23] numbers from 0 to below 1 are needed"),
        ({"betas": (0.9, 1.0, 0.9)}, "numbers from 0 to below 1 are needed"),
        ({"weight_decay": -0.1}, "weight_decay -0.1: must not be negative"),
    ],
)
def test_wrong_values_are_refused(kind: type[Any], settings: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        kind([torch.nn.Parameter(torch.ones(1))], **settings)


@pytest.mark.parametrize("kind", [ADOPT, AdEMAMix, Lion])
def test_a_closure_gives_the_loss_and_weights_without_gradient_stay(kind: type[Any]) -> None:
    moved, still = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = kind([moved, still], lr=LR)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = moved.square().sum()
        value.backward()
        return value

    values = [optimizer.step(loss).item() for _ in range(3)]
    assert values[0] == 1
    assert moved < 1
    assert still == 1
