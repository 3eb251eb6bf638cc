"""Write the plan of a federation: all that its sites must have the same, and no path."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from synthcube import config, reading, storage
from synthcube.errors import FederationError
from synthcube.federation.plan import FederationPlan, federated, shared_config
from synthcube.tasks import hub_pins
from synthcube.training import fine_tuning

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

    Raises:
        FederationError: such a training cannot be averaged, or the plan is not possible.
    """
    storage.require_own_file(path, '{\n  "synthcube": ', "output_path")
    settings = config.load_any(config_path, overrides)
    settings = federated(settings, epochs=num_rounds * local_epochs)
    settings = hub_pins.pinned(settings, {})
    training = fine_tuning.resolved(settings.training, {})
    settings = settings.model_copy(update={"training": training})
    least = min(2, len(sites)) if minimum_sites is None else minimum_sites
    faults = []
    if len(set(sites)) < len(sites):
        faults.append(f"--sites {','.join(sites)}: a label is there twice")
    if least > len(sites):
        faults.append(f"--minimum_sites {least}: there are {len(sites)} sites")
    try:
        plan = FederationPlan(
            config=shared_config(settings), sites=tuple(sites), rounds=num_rounds,
            local_epochs=local_epochs, minimum_sites=least, ranges=dict(ranges or {}),
        )  # fmt: skip
    except ValidationError as error:
        faults += reading.faults_of(error)
    if faults:
        raise FederationError("This plan is not possible:", faults)
    storage.make_folder(path.parent)
    storage.write_json(path, plan.model_dump(mode="json"))
    return plan
