"""Federate: several sites train one model together, here all of them on one machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from synthcube import config, environment, storage
from synthcube.config import RunConfig
from synthcube.data.manifest import Manifest, read_manifest, require_outside
from synthcube.data.module import TRAIN, split_subjects
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError, FederationError
from synthcube.federation import averaging
from synthcube.federation.aggregation import aggregated
from synthcube.federation.agreement import Agreement, agree
from synthcube.federation.plan import FederationPlan, WhereAveraged, federated, possible_plan
from synthcube.federation.update import read_header, read_update, write_update
from synthcube.tasks import federated_model, hub_pins, run_folder
from synthcube.tasks.federated_model import AGREEMENT, ARTIFACT, AVERAGE
from synthcube.tasks.federated_site import Site
from synthcube.training import checkpoints

log = logging.getLogger("synthcube")

SITES, DEMO = "sites", "demo-data"
_DEMO_IMAGES, _DEMO_SIZE = 48, (32, 32)
_DEMO_CONFIG: Mapping[str, Any] = {
    "model": {
        "name": "rectified_flow", "channels": [16, 32, 64], "num_res_blocks": 1,
        "attention_from": 2, "optimizer": {"lr": 2e-3, "betas": [0.9, 0.99]},
        "scheduler": {"warmup_steps": 20},
    },
    "training": {"batch_size": 8, "sample_every_n_epochs": 0},
}  # fmt: skip


def simulate(
    config_path: Path | Mapping[str, Any] | None,
    data_path: Path | None,
    run: Path,
    *,
    sites: int | None = None,
    site_column: str | None = None,
    num_rounds: int = 2,
    local_epochs: int = 1,
    minimum_sites: int | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    proximal: float = 0.0,
    server_optimizer: Mapping[str, Any] | None = None,
    average: WhereAveraged = "sites",
    average_decay: float = 0.9,
    secure_aggregation: bool = False,
    overrides: Sequence[str] = (),
) -> Path:
    """Train on data that is divided among sites, as a federation would; returns the artifact.

    The same call continues what a kill or a signal has stopped.

    Args:
        config_path: a YAML, or its content; None, together with `data_path`: a demonstration.
        run: folder of the federation; each site has a subfolder of it.
        sites: how many share the subjects, none of which is at two of them (2).
        site_column: a column of the manifest in place of a number: each of its values is a site.
        num_rounds: how often the weights are averaged.
        local_epochs: passes of each site over its images in a round.
        minimum_sites: a round with fewer updates is refused; None: all sites are needed.
        ranges: declared lowest and highest value of columns of numbers.
        proximal: FedProx, weight of the term that holds a site near the weights of its round.
        server_optimizer: FedAvgM or FedAdam, as {"name": "sgd", "lr": 1.0, "momentum": 0.9}.
        average: where the moving average of the weights is: at the sites, or at the server over
            the rounds.
        average_decay: of the server's.
        secure_aggregation: sites mask their weights, so that the average alone is seen.

    Raises:
        FederationError: the sites cannot train together, or an update is refused.
        PreemptedError: a signal stopped it.
    """
    if (config_path is None) != (data_path is None):
        raise ConfigError("Give both a config and data, or none of them for the demonstration.")
    if site_column and (sites or not data_path):
        raise ConfigError("--site_column takes the sites from the data: give data, and no --sites.")
    settings = config.load_any(_DEMO_CONFIG if config_path is None else config_path, overrides)
    settings = federated(settings, epochs=num_rounds * local_epochs, average=average)
    storage.require_separate({"output_path": run}, {"data_path": data_path})
    manifest = read_manifest(data_path) if data_path else None
    if manifest:
        require_outside({"output_path": run}, manifest)
    by_value = divide_by_column(manifest, site_column) if manifest and site_column else None
    federated_model.claim(run, "simulate")
    settings = hub_pins.resolved(settings)
    labels = [f"site-{number + 1}" for number in range(len(by_value) if by_value else sites or 2)]
    least = len(labels) if minimum_sites is None else minimum_sites
    plan = possible_plan(
        settings, labels, num_rounds, local_epochs, least,
        ranges=dict(ranges or {}), proximal=proximal, server_optimizer=server_optimizer,
        average=average, average_decay=average_decay, secure_aggregation=secure_aggregation,
    )  # fmt: skip
    storage.make_folder(run, "output_path")
    with ExitStack() as locks:
        locks.enter_context(run_folder.locked(run))
        storage.settle(run / ARTIFACT)
        federated_model.record_plan(run, plan)
        manifest = manifest or _demo_data(run / DEMO)
        if by_value:
            shares = dict(zip(labels, by_value.values(), strict=True))
            log.info(
                "Sites: %s.",
                ", ".join(
                    f"{label} is {value}, {len(shares[label])} images"
                    for label, value in zip(labels, by_value, strict=True)
                ),
            )
        else:
            shares = divide(manifest, labels, settings.seed)
        members = [Site(label, run / SITES / label, plan, settings) for label in labels]
        for member in members:
            member.record_images(shares[member.label])
        agreement = _agree(run, plan, settings, members)
        _train_rounds(run, plan, agreement, settings, members)
        largest = averaging.largest_site(agreement)
        (checkpoint,) = (member.checkpoint for member in members if member.label == largest)
        return federated_model.save(run, plan, agreement, settings, checkpoints.weights(checkpoint))


def _demo_data(folder: Path) -> Manifest:
    """The drawn shapes of the demonstration, written where they are missing."""
    if not (folder / "manifest.csv").exists():
        write_phantoms(folder, num=_DEMO_IMAGES, size=_DEMO_SIZE)
    return read_manifest(folder)


def divide_by_column(manifest: Manifest, column: str) -> dict[str, list[dict[str, str]]]:
    """Rows of the manifest by the value that they have in a column, in the order of the values.

    Raises FederationError if a row has none, or a subject is at two sites, which no split undoes.
    """
    shares: dict[str, list[dict[str, str]]] = {}
    places: dict[str, set[str]] = {}
    for row in manifest.rows:
        is_class = column == "Label" and row.label >= 0
        value = row.label_name if is_class else row.known_cells.get(column, "")
        shares.setdefault(value, []).append(row.cells)
        places.setdefault(row.subject, set()).add(value)
    if "" in shares:
        raise FederationError(
            f"--site_column {column}: {len(shares[''])} of {len(manifest.rows)} rows have no value."
        )
    if shared := sum(len(values) > 1 for values in places.values()):
        raise FederationError(
            f"--site_column {column}: {shared} subjects have more than one value; a subject must "
            "be at one site alone."
        )
    return dict(sorted(shares.items()))


def divide(manifest: Manifest, labels: Sequence[str], seed: int) -> dict[str, list[dict[str, str]]]:
    """Rows of the manifest for each site; the same every time, and no subject is at two sites.

    Classes are spread evenly. Raises FederationError if a site would get nobody.
    """
    rows = manifest.rows
    first, *others = labels
    splits = split_subjects(
        [row.subject for row in rows], [row.label for row in rows],
        {label: 1 / len(labels) for label in others}, environment.derived_seed(seed, "sites"),
    )  # fmt: skip
    place = {TRAIN: first, **{label: label for label in others}}
    shares: dict[str, list[dict[str, str]]] = {label: [] for label in labels}
    for row in rows:
        shares[place[splits[row.subject]]].append(row.cells)
    if empty := [label for label, share in shares.items() if not share]:
        raise FederationError(
            f"{len(splits)} subjects are too few for {len(labels)} sites: {', '.join(empty)} would "
            "have none. Take fewer sites."
        )
    return shares


def _agree(
    run: Path, plan: FederationPlan, settings: RunConfig, members: Sequence[Site]
) -> Agreement:
    """The agreement of all sites, which each of them has checked."""
    facts = {member.label: member.facts() for member in members}
    agreement = agree(plan, settings.data.conditions, facts)
    if before := federated_model.recorded_agreement(run):
        if before != agreement:
            raise ConfigError(
                f"output_path {run} was begun on other data: the sites agree on something else "
                "now. Give another output_path, or the same data."
            )
        return agreement
    for member in members:
        member.log_facts(facts[member.label])
        member.accept(agreement, facts[member.label])
    storage.write_json(run / AGREEMENT, agreement.model_dump(mode="json"))
    return agreement


def _train_rounds(
    run: Path, plan: FederationPlan, agreement: Agreement, settings: RunConfig,
    members: Sequence[Site],
) -> None:  # fmt: skip
    """Do the rounds that are still to do."""
    path = run / AVERAGE
    done = read_header(path).round if path.exists() else 0
    model = federated_model.expected(settings, agreement)
    for number in range(done + 1, plan.rounds + 1):
        before = path if number > 1 else None
        updates = {}
        for member in members:
            log.info("Round %d of %d at %s.", number, plan.rounds, member.label)
            member.require_budget(has_sent=number > 1)
            updates[member.label] = read_update(member.train_round(agreement, number, before))
        earlier = read_update(path) if before else None
        write_update(path, aggregated(plan, agreement, number, updates, model, run, earlier))
        shares = averaging.image_weights(agreement, updates)
        shown = ", ".join(f"{label} {share:.0%}" for label, share in sorted(shares.items()))
        log.info("Round %d of %d is averaged: %s.", number, plan.rounds, shown)
