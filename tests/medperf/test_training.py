"""MedPerf's federated training on trees of folders, as its client mounts them."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from synthcube import reading
from synthcube.data.phantom import write_phantoms
from synthcube.errors import ConfigError, FederationError
from synthcube.medperf.training import (
    generate_plan,
    get_experiment_status,
    start_aggregator,
    train,
)
from synthcube.tasks import join as joining
from synthcube.tasks.federated_site import Site
from synthcube.tasks.infer import InferRequest, infer

PEOPLE = ("erika@b.example", "max@a.example")
ADMIN = "Otto@c.example"


@pytest.fixture
def tree(tmp_path: Path, tiny_config, certificates: ModuleType) -> Path:
    """Folders like those that the client mounts, by the owner."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = reading.read_yaml(tiny_config(), ConfigError)
    compute = run.pop("compute")
    training = {"config": run, "sites": 2, "rounds": 2, "admin": ADMIN.lower()}
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump(training))
    place = {"address": "127.0.0.1", "port": port, "admin_port": port}
    (tmp_path / "aggregator_config.yaml").write_text(yaml.safe_dump(place))
    (tmp_path / "parameters.yaml").write_text(
        yaml.safe_dump({"round_minutes": 3, "patience_minutes": 1, "compute": compute})
    )
    authority = certificates.Authority(tmp_path / "authority")
    folders = []
    for name in ("aggregator", *PEOPLE, ADMIN):
        issued = authority.issue(name)
        (issued / "root.crt").unlink()  # which is in ca_cert_folder
        folders.append(shutil.move(issued, tmp_path / name / "node_cert"))
    (tmp_path / "ca").mkdir()
    shutil.copy(authority.root, tmp_path / "ca")
    certificates.site_list(tmp_path / "cols.yaml", folders[1:3], PEOPLE)
    for name in PEOPLE:
        write_phantoms(tmp_path / name / "data", num=6, size=(16, 16))
        (tmp_path / name / "labels").mkdir()
    return tmp_path


def planned(tree: Path) -> Path:
    path = tree / "plan" / "plan.yaml"
    path.parent.mkdir()
    path.touch()  # the client mounts an empty file
    generate_plan(tree / "training_config.yaml", tree / "aggregator_config.yaml", path)
    return path


@pytest.mark.slow
def test_an_aggregator_and_two_sites_end_in_a_model(
    tree: Path, forks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(joining, "_POLL_S", 0.1)
    plan, report = planned(tree), tree / "report.yaml"
    report.touch()
    common = [f"--plan_path={plan}", f"--ca_cert_folder={tree / 'ca'}",
              f"--parameters_file={tree / 'parameters.yaml'}"]  # fmt: skip

    def start(task: str, owner: str, **volumes: Path) -> Any:
        folder = tree / owner
        volumes |= {"node_cert_folder": folder / "node_cert", "output_logs": folder / "logs"}
        words = [f"--{name}={path}" for name, path in volumes.items()]
        return forks._command(["medperf", task, *common, *words], None, {})

    running = [
        start("start_aggregator", "aggregator", collaborators=tree / "cols.yaml",
              output_weights=tree / "weights", report_path=report),
        *(start("train", name, data_path=tree / name / "data", labels_path=tree / name / "labels")
          for name in PEOPLE),
    ]  # fmt: skip
    results = [process.ended() for process in running]
    assert [result.returncode for result in results] == [0, 0, 0], results
    assert yaml.safe_load(report.read_text()) == {"IsDone": 1}
    infer(InferRequest(tree / "weights", tmp_path / "images", num_images="1"))
    text = (tree / "aggregator" / "logs" / "federation" / "rounds.json").read_text()
    assert text.count("site-1") == text.count("site-2") == 2
    assert "example" not in text


@pytest.mark.slow
def test_a_private_site_that_starts_over_is_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing persists at a site, so that its budget is gone with its container."""
    monkeypatch.setattr(joining, "_POLL_S", 0.1)
    path = tree / "training_config.yaml"
    values = yaml.safe_load(path.read_text()) | {"sites": 1}
    values["config"]["data"] = {"intensity_range": [0, 255], "validation_fraction": 0}
    values["config"]["training"]["privacy"] = {"epsilon": 8, "delta": 1e-3, "draws": 1}
    path.write_text(yaml.safe_dump(values))
    listed = yaml.safe_load((tree / "cols.yaml").read_text())
    (tree / "cols.yaml").write_text(yaml.safe_dump({PEOPLE[0]: listed[PEOPLE[0]]}))
    plan, parameters = planned(tree), {"parameters_file": tree / "parameters.yaml"}
    owner, site = tree / "aggregator", tree / PEOPLE[0]
    folders = (owner / "logs", tree / "weights", tree / "report.yaml")
    aggregating = threading.Thread(
        target=start_aggregator, kwargs=parameters, daemon=True,
        args=(plan, tree / "cols.yaml", owner / "node_cert", tree / "ca", *folders),
    )  # fmt: skip
    aggregating.start()
    trained = Site.train_round

    def killed(site: Site, agreement: Any, number: int, average: Path | None) -> Path:
        if number == 2:
            raise KeyboardInterrupt
        return trained(site, agreement, number, average)

    def run(logs: str) -> None:
        train(site / "data", plan, site / "node_cert", tree / "ca", site / logs, **parameters)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "train_round", killed)
        with pytest.raises(KeyboardInterrupt):
            run("logs-1")
    with pytest.raises(FederationError, match="the privacy budget would start over"):
        run("logs-2")
    status = tree / "status.yaml"
    status.touch()
    asked = (plan, tree / ADMIN / "node_cert", tree / "ca", status)
    get_experiment_status(*asked)
    told = yaml.safe_load(status.read_text())
    assert (told["phase"], told["round"], told["failed"]) == (
        "rounds", 2, {"site-1": "FederationError"},
    )  # fmt: skip
    with pytest.raises(FederationError, match="there is no such address"):
        get_experiment_status(plan, site / "node_cert", *asked[2:])
    run("logs-1")  # which MedPerf does not keep
    aggregating.join(60)
    assert yaml.safe_load((tree / "report.yaml").read_text()) == {"IsDone": 1}
    assert json.loads((tree / "weights" / "privacy.json").read_text())["sites"].keys() == {"site-1"}


def test_the_plan_names_no_people_and_no_path(tree: Path) -> None:
    text = planned(tree).read_text()
    values = yaml.safe_load(text)
    assert values.keys() == {"federation", "aggregator", "admin_sha256"}
    assert values["aggregator"].keys() == {"address", "port"}
    assert values["federation"]["sites"] == ["site-1", "site-2"]
    assert "example" not in text
    assert str(tree) not in text


def test_a_list_of_other_sites_is_refused(tree: Path) -> None:
    plan, short = planned(tree), tree / "short.yaml"
    short.write_text((tree / "cols.yaml").read_text().splitlines()[0])
    node, ca = tree / "aggregator" / "node_cert", tree / "ca"
    outputs = (tree / "logs", tree / "weights", tree / "report.yaml")
    with pytest.raises(FederationError, match=r"lists 1 sites, and the plan is for 2"):
        start_aggregator(plan, short, node, ca, *outputs)
    plan.write_text("config: {}")
    with pytest.raises(FederationError, match="is not a plan that generate_plan wrote"):
        start_aggregator(plan, short, node, ca, *outputs)
