"""MedPerf's federated training: the plan, the aggregator and a site, where MedPerf mounts things.

Nothing persists at a site between two runs of its container: a site that is started again goes on
with the average alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from synthcube import config, reading, storage
from synthcube.compute import ComputeConfig
from synthcube.errors import FederationError
from synthcube.federation import identity
from synthcube.federation.client import Client
from synthcube.federation.identity import SiteCertificate, common_name_digest
from synthcube.federation.plan import (
    MAX_SITES,
    FederationPlan,
    ServerOptimizer,
    WhereAveraged,
    checked_plan,
)
from synthcube.medperf.infer import find_model, read_parameters
from synthcube.schema import MAX_COUNT, Pair, Schema, Weight
from synthcube.tasks.federation_plan import write_plan
from synthcube.tasks.join import join
from synthcube.tasks.serve import serve

_RUN, _PLAN, _SITES = "federation", "plan.json", "sites.yaml"


class TrainingConfigFile(Schema):
    """What the model owner decides: training_config.yaml."""

    config: dict[str, Any] = Field(description="YAML of the run, as for synthcube train.")
    sites: int = Field(ge=1, le=MAX_SITES, description="Sites that will take part.")
    rounds: int = Field(ge=1, le=MAX_COUNT, description="How often the weights are averaged.")
    local_epochs: int = Field(default=1, ge=1, le=MAX_COUNT, description="Passes in a round.")
    minimum_sites: int | None = Field(
        default=None, ge=1, le=MAX_SITES, description="Sites that a round needs."
    )
    ranges: dict[str, Pair] = Field(default={}, description="Declared ranges of numbers.")
    proximal: Weight = Field(default=0.0, description="FedProx.")
    server_optimizer: ServerOptimizer | None = Field(default=None, description="FedAvgM, FedAdam.")
    average: WhereAveraged = Field(default="sites", description="sites, or server.")
    average_decay: float = Field(default=0.9, ge=0, lt=1, description="Of the server's average.")
    secure_aggregation: bool = Field(default=False, description="As of federate plan.")
    admin: str = Field(
        default="",
        description="E-mail of the administrator, the common name of the certificate that may ask "
        "for the status. The plan has its SHA-256 alone.",
    )


class AggregatorConfig(Schema):
    """Where the aggregator listens: aggregator_config.yaml, as MedPerf's client writes it."""

    address: str = Field(description="Name or IP address that sites call.")
    port: int = Field(ge=1, lt=1 << 16, description="Port of the aggregator.")
    admin_port: int | None = Field(default=None, ge=1, lt=1 << 16, description="Not used.")


class TrainerConfig(Schema):
    """The container's parameters."""

    round_minutes: float = Field(default=120.0, gt=0, description="As of federate serve.")
    patience_minutes: float = Field(default=60.0, ge=0, description="As of federate join.")
    compute: ComputeConfig = Field(default=ComputeConfig(), description="Where a site computes.")


def generate_plan(
    training_config_path: Path, aggregator_config_path: Path, plan_path: Path, *,
    additional_files: Path | None = None,
) -> str:  # fmt: skip
    """Write the plan that every site consents to; returns its SHA-256."""
    wanted = config.read(training_config_path, TrainingConfigFile)
    optimizer = wanted.server_optimizer
    aggregator = config.read(aggregator_config_path, AggregatorConfig)
    with storage.scratch_folder() as folder:
        plan = write_plan(
            wanted.config, folder / _PLAN,
            sites=[f"site-{number}" for number in range(1, wanted.sites + 1)],
            num_rounds=wanted.rounds, local_epochs=wanted.local_epochs,
            minimum_sites=wanted.minimum_sites, ranges=wanted.ranges, proximal=wanted.proximal,
            server_optimizer=optimizer.model_dump() if optimizer else None,
            average=wanted.average, average_decay=wanted.average_decay,
            secure_aggregation=wanted.secure_aggregation,
            overrides=_first_stage(additional_files),
        )  # fmt: skip
    values = {
        "federation": plan.model_dump(mode="json"),
        "aggregator": aggregator.model_dump(mode="json", include={"address", "port"}),
        **({"admin_sha256": common_name_digest(wanted.admin)} if wanted.admin else {}),
    }
    storage.write_mounted(plan_path, reading.dump(values))
    return plan.sha256


def start_aggregator(
    plan_path: Path, collaborators: Path, node_cert_folder: Path, ca_cert_folder: Path,
    output_logs: Path, output_weights: Path, report_path: Path, *,
    parameters_file: Path | None = None, additional_files: Path | None = None,
) -> Path:  # fmt: skip
    """Lead the sites through all rounds; returns the folder with the trained model."""
    parameters = read_parameters(parameters_file, TrainerConfig)
    plan, aggregator, admin = _read_plan(plan_path)
    storage.make_folder(output_logs, "output_logs")
    storage.write_json(output_logs / _PLAN, plan.model_dump(mode="json"))
    listed = reading.read_yaml(collaborators, FederationError)
    if len(listed) != len(plan.sites):
        raise FederationError(
            f"collaborators {collaborators} lists {len(listed)} sites, and the plan is for "
            f"{len(plan.sites)}."
        )
    # The plan names no people: the sites get its labels in the order of theirs.
    labels = dict(zip(sorted(map(str, listed)), plan.sites, strict=True))
    entries = {
        labels[str(name)]: reading.validated(
            entry, SiteCertificate, f"{collaborators}: {name}", FederationError
        ).model_dump()
        for name, entry in listed.items()
    }
    storage.write_text(output_logs / _SITES, reading.dump(entries))
    folder = serve(
        output_logs / _PLAN, node_cert_folder, output_logs / _SITES, output_logs / _RUN,
        address=f"0.0.0.0:{aggregator.port}", round_minutes=parameters.round_minutes,
        root=ca_cert_folder, admin=admin, overrides=_first_stage(additional_files),
    )  # fmt: skip
    with storage.replaced_folder(output_weights) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True)
    storage.write_mounted(report_path, reading.dump({"IsDone": 1}))
    return output_weights


def train(
    data_path: Path, plan_path: Path, node_cert_folder: Path, ca_cert_folder: Path,
    output_logs: Path, *, parameters_file: Path | None = None,
    additional_files: Path | None = None,
) -> Path:  # fmt: skip
    """Train at a site until the last round; returns the folder of its run."""
    parameters = read_parameters(parameters_file, TrainerConfig)
    plan, aggregator, _ = _read_plan(plan_path)
    storage.make_folder(output_logs, "output_logs")
    storage.write_json(output_logs / _PLAN, plan.model_dump(mode="json"))
    compute = json.dumps(parameters.compute.model_dump(mode="json"))
    join(
        output_logs / _PLAN, data_path, node_cert_folder, output_logs / _RUN,
        address=f"{aggregator.address}:{aggregator.port}", root=ca_cert_folder,
        patience_minutes=parameters.patience_minutes,
        overrides=[f"compute={compute}", *_first_stage(additional_files)],
    )  # fmt: skip
    return output_logs / _RUN


def get_experiment_status(
    plan_path: Path, node_cert_folder: Path, ca_cert_folder: Path, output_status_file: Path
) -> str:
    """Write where a federation stands, as its aggregator tells the administrator; returns it."""
    plan, aggregator, _ = _read_plan(plan_path)
    tls = identity.client_context(node_cert_folder, ca_cert_folder)
    address = f"{aggregator.address}:{aggregator.port}"
    status = Client(address, tls, None, plan.sha256, patience_minutes=0).status()
    text = reading.dump(status.model_dump(mode="json"))
    storage.write_mounted(output_status_file, text)
    return text


def _read_plan(path: Path) -> tuple[FederationPlan, AggregatorConfig, str]:
    """The plan, where the aggregator is, and the SHA-256 of the administrator's common name."""
    values = reading.read_yaml(path, FederationError, name="plan_path")
    if values.keys() - {"admin_sha256"} != {"federation", "aggregator"}:
        raise FederationError(f"plan_path {path} is not a plan that generate_plan wrote.")
    aggregator = reading.validated(values["aggregator"], AggregatorConfig, path, FederationError)
    admin = str(values.get("admin_sha256", ""))
    return checked_plan(values["federation"], path), aggregator, admin


def _first_stage(additional_files: Path | None) -> list[str]:
    """The override that names a trained first stage, if the container comes with one."""
    if not additional_files or not any(additional_files.iterdir()):
        return []
    return [f"model.first_stage={json.dumps(str(find_model(additional_files)))}"]
