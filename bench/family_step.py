"""A training step of every family, as a user gets it, over a bare loop of the same model.

Measured as in bench.train_step: every loop in a process of its own, in turns. The bare loop calls
the family's own loss, so that the ratio is what the framework around it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.process import apart
from bench.report import Options, Row
from bench.sizes import BATCH_SIZE, SIDE, WARM_UP
from bench.train_step import between, our_steps, row


def measure(options: Options) -> list[Row]:
    from synthcube.models import registry

    num_rounds, num_steps = (1, 2) if options.quick else (3, 8)
    rows = []
    for name in registry.names():
        model = defaults(name)
        ours, bare = [], []
        for _ in range(num_rounds):
            ours.append(median(apart(our_steps, model, "32-true", num_steps)))
            bare.append(median(apart(bare_steps, model, num_steps)))
        title = f"training step of {name} over a bare loop of its loss, 32-true"
        rows.append(row(title, ours, bare, at_most=1.05))
    return rows


def bare_steps(model: dict[str, Any], num_steps: int) -> list[float]:
    """CPU-seconds of a step in which there is nothing but the losses, clipping and optimizers."""
    take = bare_step(model, (SIDE, SIDE), BATCH_SIZE)
    starts = []
    for _ in range(WARM_UP + num_steps + 1):
        starts.append(time.process_time())
        take()
    return between(starts)


def bare_step(model: dict[str, Any], size: tuple[int, ...], batch_size: int) -> Callable[[], None]:
    """Takes one step with grey images of that size, every time it is called."""
    import torch

    from bench.sampling import image_spec
    from synthcube.models import registry

    config: Any = registry.find(model["name"]).model_validate(model)
    image = image_spec(SIDE).model_copy(update={"size": size})
    family: Any = config.build(image).train()
    judge = getattr(family, "discriminator", None)
    judging = {id(weight) for weight in judge.parameters()} if judge else set()
    made_by = [
        weight
        for weight in family.parameters()
        if weight.requires_grad and id(weight) not in judging
    ]
    groups = [(made_by, config.optimizer)]
    if judge:
        groups.append((list(judge.parameters()), config.discriminator_optimizer))
    optimizers = [described.build(weights) for weights, described in groups]
    batch = _batch(size, batch_size)
    family.log_terms = family.log = family.log_dict = lambda *_, **__: None

    def learn(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        loss.backward()
        if not judge:
            torch.nn.utils.clip_grad_norm_(made_by, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def take() -> None:
        if not judge:
            learn(optimizers[0], family.loss(batch)["loss"])
            return
        judge.requires_grad_(False)
        terms, generated = family.generator_loss(batch)
        learn(optimizers[0], terms["loss"])
        judge.requires_grad_(True)
        learn(optimizers[1], family.discriminator_loss(batch, generated.detach())["loss"])

    return take


def defaults(name: str) -> dict[str, Any]:
    """The family's defaults; one with two stages gets an untrained first one of defaults too."""
    from synthcube.models import registry

    kind = registry.find(name)
    model: dict[str, Any] = {"name": name}
    if kind.needs:
        model["first_stage_config"] = registry.find(kind.needs)(name=kind.needs).model_dump(
            mode="json"
        )
    return model


def _batch(size: tuple[int, ...], batch_size: int) -> Any:
    import torch

    return {
        "image": torch.rand(batch_size, 1, *size) * 2 - 1,
        "label": torch.zeros(batch_size, dtype=torch.int64),
        "index": torch.arange(batch_size),
        "augmented": False,
        "condition": {
            "values": torch.zeros(batch_size, 0),
            "source": torch.zeros(batch_size, 0, *size),
        },
    }
