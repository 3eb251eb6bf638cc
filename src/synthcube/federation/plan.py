"""The plan of a federation: what all sites have in common before the first round, and its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field

from synthcube import __version__
from synthcube.config import RunConfig
from synthcube.errors import FederationError
from synthcube.schema import MAX_COUNT, List, Pair, Schema, flattened

MAX_SITES = 1000
SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""A label that the federation gives to a site; it goes into logs."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

# What a site may choose: where it computes, and where its files are. The hashes of the files stay.
_OF_THE_SITE = (
    "compute.", "data.num_workers.", "data.cache_gb.", "training.loggers.",
    "training.stop_signals.", "training.checkpoint_every_n_minutes.", "training.start_from.",
    "training.log_every_n_steps.", "model.first_stage.", "sampling.", "evaluation.", "export.",
)  # fmt: skip


class FederationPlan(Schema):
    """What every site must have the same: a message under another plan is refused."""

    synthcube: str = Field(default=__version__, description="Version of the package.")
    config: dict[str, Any] = Field(description="Keys of the config that affect the weights.")
    sites: Annotated[List[SiteName], Field(min_length=1, max_length=MAX_SITES)] = Field(
        description="Labels of the sites that may take part."
    )
    rounds: int = Field(ge=1, le=MAX_COUNT, description="How often the weights are averaged.")
    local_epochs: int = Field(
        default=1, ge=1, le=MAX_COUNT, description="Passes of each site over its images in a round."
    )
    minimum_sites: int = Field(
        default=2, ge=1, le=MAX_SITES, description="A round with fewer updates is refused."
    )
    ranges: dict[str, Pair] = Field(
        default={},
        description="Declared lowest and highest value of a column of numbers: {Age: [0, 100]}. "
        "Of a column that is not declared, each site tells its own extremes.",
    )

    @property
    def sha256(self) -> str:
        """The hash that every message carries."""
        return digest_of(self)

    @property
    def epochs(self) -> int:
        """Passes over the images in all rounds together."""
        return self.rounds * self.local_epochs


def digest_of(values: Schema) -> str:
    """SHA-256 of the values of a schema, the same on every machine."""
    text = json.dumps(values.model_dump(mode="json"), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def federated(settings: RunConfig, *, epochs: int) -> RunConfig:
    """The config of a site's run: it trains for so many epochs, however long that takes.

    Raises FederationError, with all reasons why such a training cannot be averaged.
    """
    training, compute, model = settings.training, settings.compute, settings.model
    faults = [f"model.name {model.name}: {model.not_averaged}"] if model.not_averaged else []
    if training.privacy:
        faults.append("training.privacy: a site cannot train privately in a federation yet")
    if training.early_stop:
        faults.append("training.early_stop: a site must not stop alone; leave it out")
    if compute.num_devices not in (None, 1) or compute.num_nodes != 1:
        faults.append("compute.num_devices and num_nodes: a site trains in one process; use 1")
    if compute.strategy not in ("auto", "ddp"):
        faults.append(f"compute.strategy {compute.strategy}: leave it out")
    if faults:
        raise FederationError("This config cannot be trained by several sites:", faults)
    changes = {"max_epochs": epochs, "max_minutes": None, "best": None}
    changed = training.model_copy(update=changes)
    one = compute.model_copy(update={"num_devices": 1})
    return settings.model_copy(update={"training": changed, "compute": one})


def shared_config(settings: RunConfig) -> dict[str, Any]:
    """The keys of a config, with dots, that must be the same at all sites."""
    flat = flattened(settings.dump())
    return {key: value for key, value in flat.items() if not f"{key}.".startswith(_OF_THE_SITE)}
