"""The plan of a federation: what all sites have in common before the first round, and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from synthcube import __version__, config, reading
from synthcube.config import RunConfig
from synthcube.errors import ConfigError, FederationError, first_faults
from synthcube.schema import MAX_COUNT, List, Pair, Schema, Weight, flattened
from synthcube.training.config import PrivacyConfig

MAX_SITES = 1000
SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""A label that the federation gives to a site; it goes into logs."""
WhereAveraged = Literal["sites", "server"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

# What a site may choose: where it computes, and where its files are. The hashes of the files stay.
_OF_THE_SITE = (
    "compute.", "data.num_workers.", "data.cache_gb.", "training.loggers.",
    "training.stop_signals.", "training.checkpoint_every_n_minutes.", "training.start_from.",
    "training.log_every_n_steps.", "training.privacy.images_at_once.", "model.first_stage.",
    "sampling.", "evaluation.", "export.",
)  # fmt: skip


class ServerOptimizer(Schema):
    """How the average of a round moves the weights; without one they become the average."""

    name: Literal["sgd", "adam"] = Field(description="sgd: FedAvgM; adam: FedAdam.")
    lr: float = Field(default=1.0, gt=0, le=1e3, description="Learning rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of the direction.")
    second_momentum: float = Field(default=0.99, ge=0, lt=1, description="adam: of its square.")
    epsilon: float = Field(default=1e-3, gt=0, le=1, description="adam: added to its root.")


class FederationPlan(Schema):
    """What every site must have the same: a message under another plan is refused."""

    synthcube: str = Field(default=__version__, description="Version of the package.")
    config: dict[str, Any] = Field(
        description="The config of all sites: the keys that affect the weights, and no path."
    )
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
    proximal: Weight = Field(
        default=0.0,
        description="FedProx: weight mu of the term mu / 2 * |w - w0|^2, which holds a site near "
        "the weights w0 that the round began with.",
    )
    server_optimizer: ServerOptimizer | None = Field(
        default=None, description="Moves the weights along the average: FedAvgM, FedAdam."
    )
    average: WhereAveraged = Field(
        default="sites",
        description="Where the moving average of the weights is: at each site, which sends it with "
        "its weights, or at the server, over the rounds; then the sites send half as much.",
    )
    average_decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Decay of the server's moving average; ramped up as (1 + n) / (10 + n) after n "
        "rounds.",
    )
    secure_aggregation: bool = Field(
        default=False,
        description="Sites mask their weights, so that the coordinator sees their average alone; "
        "each round needs all sites.",
    )

    @property
    def sha256(self) -> str:
        """The hash that every message carries."""
        return digest_of(self)

    @property
    def epochs(self) -> int:
        """Passes over the images in all rounds together."""
        return self.rounds * self.local_epochs

    @property
    def privacy(self) -> PrivacyConfig | None:
        """How each site trains privately, of a config that is valid; None: not at all."""
        chosen = self.config.get("training", {}).get("privacy")
        return PrivacyConfig.model_validate(chosen) if chosen else None

    @property
    def batch_size(self) -> int:
        """Subjects in a private step, on average."""
        return int(self.config["training"]["batch_size"])


def digest_of(values: Schema) -> str:
    """SHA-256 of the values of a schema, the same on every machine."""
    text = json.dumps(values.model_dump(mode="json"), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def federated(settings: RunConfig, *, epochs: int, average: WhereAveraged = "sites") -> RunConfig:
    """The config of a site's run: it trains for so many epochs, however long that takes.

    Where the server keeps a moving average, the sites keep none.

    Raises FederationError, with all reasons why such a training cannot be averaged.
    """
    training, compute, model = settings.training, settings.compute, settings.model
    faults = [f"model.name {model.name}: {model.not_averaged}"] if model.not_averaged else []
    if model.earlier_share():
        faults.append("model.autoguidance_from: sites keep no earlier weights; leave it out")
    if training.privacy and training.privacy.delta is None:
        faults.append(
            "training.privacy.delta: state it, such as 1e-5; without it each site would take "
            "another one, a tenth of one over its own subjects"
        )
    if training.early_stop:
        faults.append("training.early_stop: a site must not stop alone; leave it out")
    if compute.num_devices not in (None, 1) or compute.num_nodes != 1:
        faults.append("compute.num_devices and num_nodes: a site trains in one process; use 1")
    if compute.strategy not in ("auto", "ddp"):
        faults.append(f"compute.strategy {compute.strategy}: leave it out")
    if faults:
        raise FederationError("This config cannot be trained by several sites:", faults)
    changes = {"max_epochs": epochs, "max_minutes": None, "best": None}
    if average == "server":
        changes["ema"] = None
    changed = training.model_copy(update=changes)
    one = compute.model_copy(update={"num_devices": 1})
    return settings.model_copy(update={"training": changed, "compute": one})


def possible_plan(
    settings: RunConfig, sites: Sequence[str], num_rounds: int, local_epochs: int,
    minimum_sites: int, *, ranges: Mapping[str, tuple[float, float]], **others: Any,
) -> FederationPlan:  # fmt: skip
    """A plan of these values; `others` are further fields of it.

    Args:
        ranges: declared beside those of the config.

    Raises FederationError, with all reasons why it is not possible.
    """
    faults = []
    if len(set(sites)) < len(sites):
        faults.append(f"--sites {','.join(sites)}: a label is there twice")
    if minimum_sites > len(sites):
        faults.append(f"--minimum_sites {minimum_sites}: there are {len(sites)} sites")
    if others.get("secure_aggregation") and minimum_sites < len(sites):
        faults.append(
            f"--minimum_sites {minimum_sites}: masks cancel in the sum of all {len(sites)} sites; "
            "leave it out"
        )
    faults += [
        f"--range {name}={low:g},{high:g}: data.ranges says another one"
        for name, (low, high) in ranges.items()
        if settings.data.ranges.get(name, (low, high)) != (low, high)
    ]
    try:
        plan = FederationPlan(
            config=shared_config(settings), sites=tuple(sites), rounds=num_rounds,
            local_epochs=local_epochs, minimum_sites=minimum_sites,
            ranges={**settings.data.ranges, **ranges}, **others,
        )  # fmt: skip
    except ValidationError as error:
        faults += reading.faults_of(error)
    if faults:
        raise FederationError("This plan is not possible:", faults)
    return plan


def shared_config(settings: RunConfig) -> dict[str, Any]:
    """The part of a config that must be the same at all sites: no path, nothing of a machine."""
    return _shared(settings.dump(), "")


def _shared(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key: _shared(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if not f"{prefix}{key}.".startswith(_OF_THE_SITE)
    }


def read_plan(path: Path) -> FederationPlan:
    """The plan in a file, which is only data.

    Raises FederationError if it is damaged, of another version of the package, or sets what a site
    chooses itself.
    """
    return checked_plan(reading.read_object(path, FederationError), path)


def checked_plan(values: Any, path: Path) -> FederationPlan:
    """The plan that plain values hold; errors as in :func:`read_plan`."""
    plan = reading.validated(values, FederationPlan, path, FederationError)
    if plan.synthcube != __version__:
        raise FederationError(
            f"{path} was made with SynthCube {plan.synthcube}, and this is {__version__}: all "
            "sites need the version of the plan."
        )
    faults = [
        f"{key}: a site chooses this itself"
        for key in flattened(plan.config)
        if f"{key}.".startswith(_OF_THE_SITE)
    ]
    if faults:
        raise FederationError(f"{path} is refused:", first_faults(faults))
    return plan


def site_settings(plan: FederationPlan, overrides: Iterable[str] = ()) -> RunConfig:
    """The config of a run under a plan, with what a site chooses itself.

    Raises ConfigError if an override changes what all sites must have the same.
    """
    settings = config.build(deepcopy(plan.config), overrides, where="The config of the plan")
    now, expected = flattened(shared_config(settings)), flattened(plan.config)
    faults = [
        f"{key}: {expected.get(key)!r} in the plan, {now.get(key)!r} here"
        for key in sorted({*now, *expected})
        if now.get(key) != expected.get(key)
    ]
    if faults:
        raise ConfigError("All sites must train with the values of the plan:", first_faults(faults))
    return federated(settings, epochs=plan.epochs, average=plan.average)
