"""Write the plan of a federation: all that its sites must have the same, and no path."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthcube import config, storage
from synthcube.federation.plan import FederationPlan, WhereAveraged, federated, possible_plan
from synthcube.tasks import hub_pins

log = logging.getLogger("synthcube")


def write_plan(
    config_path: Path | Mapping[str, Any],
    path: Path,
    *,
    sites: Sequence[str],
    num_rounds: int,
    local_epochs: int = 1,
    minimum_sites: int | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    proximal: float = 0.0,
    server_optimizer: Mapping[str, Any] | None = None,
    average: WhereAveraged = "sites",
    average_decay: float = 0.9,
    secure_aggregation: bool = False,
    overrides: Sequence[str] = (),
) -> FederationPlan:
    """Write the plan of a federation as JSON; returns it.

    Args:
        config_path: a YAML, or its content.
        path: file to write.
        sites: labels of the sites: small letters, digits and hyphens.
        num_rounds: how often the weights are averaged.
        local_epochs: passes of each site over its images in a round.
        minimum_sites: a round with fewer updates is not averaged; None: two, or one of one site.
        ranges: declared lowest and highest value of columns of numbers.
        proximal: FedProx, weight of the term that holds a site near the weights of its round.
        server_optimizer: FedAvgM or FedAdam, as {"name": "sgd", "lr": 1.0, "momentum": 0.9}.
        average: where the moving average of the weights is: at the sites, or at the server over
            the rounds.
        average_decay: of the server's.
        secure_aggregation: sites mask their weights; then `minimum_sites` is all of them.

    Raises:
        FederationError: such a training cannot be averaged, or the plan is not possible.
    """
    storage.require_own_file(path, '{\n  "synthcube": ', "output_path")
    settings = config.load_any(config_path, overrides)
    settings = federated(settings, epochs=num_rounds * local_epochs, average=average)
    settings = hub_pins.resolved(settings)
    least = len(sites) if secure_aggregation else min(2, len(sites))
    if minimum_sites is not None:
        least = minimum_sites
    plan = possible_plan(
        settings, sites, num_rounds, local_epochs, least, ranges=dict(ranges or {}),
        proximal=proximal, server_optimizer=server_optimizer, average=average,
        average_decay=average_decay, secure_aggregation=secure_aggregation,
    )  # fmt: skip
    storage.make_folder(path.parent)
    storage.write_json(path, plan.model_dump(mode="json"))
    return plan
