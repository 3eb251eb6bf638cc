"""The folder of a federation: its plan, its agreement, its average, and the model they end in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from synthcube import environment, reading, storage
from synthcube.config import RunConfig
from synthcube.errors import ConfigError, FederationError, OutputError, first_faults
from synthcube.federation import privacy, rounds
from synthcube.federation.aggregation import ExpectedModel
from synthcube.federation.agreement import Agreement
from synthcube.federation.plan import FederationPlan
from synthcube.federation.update import read_average
from synthcube.models import artifact
from synthcube.models.family import Family
from synthcube.models.first_stage import TwoStageFamily
from synthcube.schema import flattened
from synthcube.training import fine_tuning

PLAN, AGREEMENT, AVERAGE = "federation.json", "agreement.json", "average.safetensors"
ARTIFACT = "artifact"
_WRITTEN = {
    "simulate": ("sites", "demo-data"),
    "serve": ("facts", "updates", "rounds.json"),
    "join": ("data.csv", "progress.json", "run", "update.safetensors"),
}
"""What each command alone writes into the folder of a federation."""


def claim(run: Path, command: str) -> None:
    """Refuse a folder that something else would be overwritten in. Raises OutputError.

    Args:
        command: "simulate", "serve" or "join".
    """
    storage.require_own(run, PLAN, "output_path")
    for other, names in _WRITTEN.items():
        if other != command and any((run / name).exists() for name in names):
            raise OutputError(
                f"output_path {run} belongs to synthcube federate {other}: give another one."
            )
    if (run / PLAN).exists():
        return
    names = (AGREEMENT, AVERAGE, *_WRITTEN[command], "audit.jsonl", ARTIFACT)
    if existing := [name for name in names if (run / name).exists()]:
        raise OutputError(
            f"output_path {run} is no federation, and files in it would be overwritten "
            f"({', '.join(existing)}): give another one."
        )


def record_plan(run: Path, plan: FederationPlan) -> None:
    """Write the plan, or refuse another one than the folder was begun with."""
    path = run / PLAN
    now = plan.model_dump(mode="json")
    if not path.exists():
        storage.write_json(path, now)
        return
    before, flat = flattened(reading.read_object(path, FederationError)), flattened(now)
    faults = [
        f"{key}: was {before.get(key)!r}, is {flat.get(key)!r}"
        for key in sorted({*before, *flat})
        if before.get(key) != flat.get(key)
    ]
    if faults:
        raise ConfigError(
            f"output_path {run} was begun with another plan; give another one, or the same values:",
            first_faults(faults),
        )


def recorded_agreement(run: Path) -> Agreement | None:
    """The agreement in the folder of a federation; None before the sites agreed."""
    path = run / AGREEMENT
    return reading.read_record(path, Agreement, FederationError) if path.exists() else None


def shapes(settings: RunConfig, agreement: Agreement) -> dict[str, Tensor]:
    """Names, shapes and types of the weights that a site sends, on the meta device."""
    with torch.device("meta"):
        family = settings.model.build(agreement.image.encoded)
    return rounds.blank_weights(family, ema=settings.training.ema is not None)


def initial_model(settings: RunConfig, agreement: Agreement) -> Family:
    """The model before any training, with its trained first stage if it has one."""
    with torch.random.fork_rng():
        torch.manual_seed(environment.derived_seed(settings.seed, "weights"))
        family = settings.model.build(agreement.image.encoded)
    if isinstance(family, TwoStageFamily):
        family.first_stage.load(family.config.first_stage, family.config.first_stage_sha256)
    fine_tuning.take_weights(family, settings.training)
    return family


def expected(settings: RunConfig, agreement: Agreement) -> ExpectedModel:
    """What every update must have. Raises FederationError if the images do not fit the model."""
    if faults := settings.model.faults(agreement.image.encoded):
        raise FederationError("The images do not fit the model:", faults)
    family, ema = initial_model(settings, agreement), settings.training.ema is not None
    state = family.state_dict()
    sent = rounds.exchanged_weights(state)
    trained = frozenset(name for name, _ in family.named_parameters() if name in sent)
    return ExpectedModel(
        rounds.blank_weights(family, ema=ema), rounds.constants_digest(state),
        rounds.initial_weights(state, ema=ema), trained,
    )  # fmt: skip


def save(
    run: Path, plan: FederationPlan, agreement: Agreement, settings: RunConfig,
    own: Mapping[str, Tensor],
) -> Path:  # fmt: skip
    """Write the last average in `run` as an artifact; returns its folder.

    Args:
        own: state of a site's model, or the initial one: what is not averaged is taken from it.
    """
    path = run / AVERAGE
    average = read_average(path, plan.sha256, agreement.sha256, plan.rounds)
    artifact.save(
        run / ARTIFACT,
        config=settings.dump(),
        image=agreement.image,
        weights=rounds.final_weights(own, average),
        metrics={
            "rounds": plan.rounds,
            "sites": len(agreement.images),
            "images": sum(agreement.images.values()),
            "epochs": plan.epochs,
        },
        checkpoint=storage.sha256(path),
        privacy=privacy.statement(settings, average.header.privacy),
    )
    return run / ARTIFACT
