"""A workspace of OpenFL that holds no code: it names classes of the installed package alone.

OpenFL puts the workspace in front of all places that Python imports from, and builds whatever
class plan/plan.yaml names. So a site compares a workspace that it was sent with what its own
version of SynthCube would write, before it runs any command of OpenFL there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from synthcube import reading, storage
from synthcube.errors import FederationError, first_faults
from synthcube.federation.identity import parsed_address
from synthcube.federation.plan import FederationPlan, read_plan
from synthcube.schema import List, Schema
from synthcube.tasks.federation_plan import write_plan

PLAN, AGGREGATOR = "plan.json", "AGGREGATOR"
_PLAN, _SITES, _CHOICES = "plan/plan.yaml", "plan/cols.yaml", "plan/data.yaml"
_FILES = {PLAN, _PLAN, _SITES, _CHOICES}
_FOLDERS = {"plan", "cert", "save", "logs"}
_HEAD = "# Written by `synthcube federate plan`; it must be the same everywhere.\n"
_CHOICES_HEAD = """\
# What each party chooses itself: nothing here is taken from others. A line for each party on this
# machine, whose images are a list or a folder:
# site-1,/data/images
# site-1,{data: /data/images, run: /data/run, overrides: [compute.accelerator=cuda]}
# AGGREGATOR,{run: /data/run, round_minutes: 120}
"""


class Choices(Schema):
    """What a party of a federation chooses itself."""

    data: str = Field(default="", description="Images of a site: CSV or folder.")
    run: str = Field(default="", description="Folder of its run; empty: save/PARTY.")
    overrides: List[str] = Field(default=(), description="As --set of federate join and serve.")
    round_minutes: Annotated[float, Field(ge=0.01)] = Field(
        default=120.0, description="AGGREGATOR: how long a round waits for all sites."
    )
    patience_minutes: Annotated[float, Field(ge=0)] = Field(
        default=60.0, description="A site: how long the aggregator may be away."
    )


def write_workspace(
    config_path: Path | Mapping[str, Any], folder: Path, *, address: str, sites: Sequence[str],
    **others: Any,
) -> FederationPlan:  # fmt: skip
    """Write the plan of a federation and a workspace for it; returns the plan.

    Args:
        address: HOST:PORT of the aggregator, by the name in its certificate.
        others: as :func:`synthcube.tasks.federation_plan.write_plan`, whose errors are raised.
    """
    host, port = parsed_address(address)
    for name in (_PLAN, _SITES):
        storage.require_own_file(folder / name, _HEAD, "output_path")
    plan = write_plan(config_path, folder / PLAN, sites=sites, **others)
    for name in _FOLDERS:
        storage.make_folder(folder / name)
    for name, values in _expected(plan, host, port).items():
        storage.write_text(folder / name, _HEAD + reading.dump(values))
    if not (folder / _CHOICES).exists():
        storage.write_text(folder / _CHOICES, _CHOICES_HEAD)
    return plan


def guard(folder: Path) -> FederationPlan:
    """The plan of a workspace with nothing in it but what its plan and OpenFL write.

    Raises FederationError with all that is there beside it: Python could import it.
    """
    plan = read_plan(folder / PLAN)
    faults = [text for path in sorted(folder.rglob("*")) if (text := _fault(folder, path))]
    if not faults:  # else it may be a pipe, or a link
        written = reading.read_yaml(folder / _PLAN, FederationError)
        try:
            network = written["network"]["settings"]
            host, port = parsed_address(f"{network['agg_addr']}:{network['agg_port']}", _PLAN)
        except (KeyError, TypeError) as error:
            raise FederationError(f"{folder / _PLAN} names no aggregator.") from error
        faults = [
            f"{name}: is not what this version of SynthCube writes for {PLAN}"
            for name, values in _expected(plan, host, port).items()
            if reading.read_yaml(folder / name, FederationError) != values
        ]
    if faults:
        raise FederationError(
            f"{folder} is no workspace of SynthCube alone: OpenFL may run what is in it.",
            first_faults(faults),
        )
    return plan


def chosen(text: str) -> Choices:
    """What a line of plan/data.yaml says after the name of the party: a path, or a mapping."""
    values, _ = reading.parse(text, _CHOICES)
    if isinstance(values, str):
        values = {"data": values}
    return reading.validated(values, Choices, _CHOICES, FederationError)


def aggregator_choices(folder: Path) -> Choices:
    """What the aggregator chooses itself; OpenFL reads the lines of the sites alone."""
    text = reading.read_text(folder / _CHOICES, FederationError)
    lines = [line.partition(",") for line in text.splitlines()]
    return chosen(next((rest for name, _, rest in lines if name == AGGREGATOR), "{}"))


def _fault(folder: Path, path: Path) -> str:
    """What is wrong with something in a workspace; empty if nothing."""
    name = path.relative_to(folder)
    top = name.parts[0]
    if path.is_symlink():
        return f"{name}: is a link"
    if path.suffix in all_suffixes():
        return f"{name}: is code"
    if path.is_dir():
        is_known = top in _FOLDERS and (top != "plan" or len(name.parts) == 1)
    elif top == "plan" or len(name.parts) == 1:  # fx packs requests for certificates
        is_known = str(name) in _FILES or (len(name.parts) == 1 and path.suffix == ".zip")
    else:
        is_known = top in _FOLDERS
    return "" if is_known else f"{name}: does not belong here"


def _expected(plan: FederationPlan, host: str, port: int) -> dict[str, dict[str, Any]]:
    """What the files of a plan hold, as OpenFL reads them."""

    def part(name: str, **settings: Any) -> dict[str, Any]:
        return {"template": f"synthcube.federation_openfl.parties.{name}", "settings": settings}

    network = {
        "agg_addr": host, "agg_port": port, "use_tls": True, "require_client_auth": True,
        "transport_protocol": "grpc", "resend_data_on_reconnection": False,
    }  # fmt: skip
    return {
        _PLAN: {
            "aggregator": part("Aggregator", rounds_to_train=plan.rounds),
            "assigner": part("Part"),
            "collaborator": part("Collaborator"),
            "data_loader": part("Part"),
            "task_runner": part("Part"),
            "network": {"settings": network},
        },
        _SITES: {"collaborators": [*plan.sites]},
    }
