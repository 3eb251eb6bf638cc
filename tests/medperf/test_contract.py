"""The files of MedPerf's roles are what MedPerf takes; and the checker that says so sees faults."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from synthcube import config
from synthcube.cli import app
from synthcube.medperf.infer import ModelConfig, PreparatorConfig, read_parameters
from synthcube.specs import (
    CONTAINER_CONFIG,
    MODEL,
    ROLES,
    Role,
    container_config,
    parameters_yaml,
    readme,
)

ROOT = Path(__file__).parents[2]
NAMES = [role.name for role in ROLES]
PAIRS = [(role, task) for role in ROLES for task in role.tasks]
by_role = pytest.mark.parametrize("role", ROLES, ids=NAMES)
by_task = pytest.mark.parametrize(("role", "task"), PAIRS, ids=[task.name for _, task in PAIRS])


@by_role
def test_the_committed_files_are_what_the_table_says(role: Role) -> None:
    folder = ROOT / "mlcube" / role.name
    assert (folder / CONTAINER_CONFIG).read_text(encoding="utf-8") == container_config(role)
    parameters = folder / "workspace" / "parameters.yaml"
    assert parameters.read_text(encoding="utf-8") == parameters_yaml(role)
    assert (folder / "README.md").read_text(encoding="utf-8") == readme(role)


def test_the_parameters_that_they_come_with_are_valid() -> None:
    folders = {role.name: ROOT / "mlcube" / role.name / "workspace" for role in ROLES}
    read_parameters(folders["preparator"] / "parameters.yaml", PreparatorConfig)
    read_parameters(folders["model"] / "parameters.yaml", ModelConfig)
    evaluation = config.load(folders["evaluator"] / "parameters.yaml").evaluation
    assert evaluation.extractor.name == "efficientnet-lite0"


@by_role
def test_medperf_takes_them(role: Role, medperf_contract) -> None:
    assert medperf_contract.faults_of(container_config(role), role.name) == []
    pulled = container_config(role, "docker.io/some/image:1.0", top=None)
    assert medperf_contract.faults_of(pulled, role.name) == []
    assert yaml.safe_load(pulled)["image"] == "docker.io/some/image:1.0"


@by_task
def test_mlcube_finds_every_parameter_and_the_same_command(role: Role, task) -> None:
    """MLCube adds --name=path to its entrypoint, whose first word is the program."""
    described = yaml.safe_load(container_config(role))
    written = described["tasks"][task.name]
    assert written["entrypoint"].split() == [
        "/app/bin/synthcube", *written["run_args"]["command"].split()
    ]  # fmt: skip
    for side, opts in (("inputs", "ro"), ("outputs", "rw")):
        given = written["parameters"][side]
        volumes = written[f"{side[:-1]}_volumes"]
        assert given.keys() == volumes.keys()
        for name, each in given.items():
            assert each.keys() == {"type", "default", "opts"}
            assert each["opts"] == opts
            assert each["type"] == volumes[name]["type"]
    assert described["docker"]["image"] == described["image"]
    known = {"image", "build_context", "build_file", "build_strategy", "cpu_args", "gpu_args"}
    assert set(described["docker"]) <= known | {"--network"}, "MLCube's runner takes no other keys"
    top = ROOT / "mlcube" / role.name / described["docker"]["build_context"]
    assert (top / described["docker"]["build_file"]).is_file()
    assert (ROOT / "mlcube" / role.name / described["singularity"]["build_file"]).is_file()


@by_task
def test_a_volume_is_an_option_that_defaults_to_its_mount(role: Role, task) -> None:
    group: Any = typer.main.get_command(app)
    options = {each.name: each for each in group.commands["medperf"].commands[task.name].params}
    volumes = {each.name: each for each in (*task.inputs, *task.outputs)}
    assert options.keys() == {*volumes, "plugins", "trust"}
    for name, volume in volumes.items():
        assert not options[name].required
        assert options[name].default == (None if volume.optional else Path(volume.mount))


def test_optional_volumes_are_those_that_are_mounted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from synthcube.cli import medperf

    there = tmp_path / "there"
    there.mkdir()
    assert medperf._given(None, str(there)) == there
    assert medperf._given(None, str(tmp_path / "nowhere")) is None
    assert medperf._given(tmp_path / "own", str(there)) == tmp_path / "own"


Break = Callable[[dict[str, Any]], object]
BREAKS: dict[str, tuple[Break, str]] = {
    "no type": (lambda c: c.pop("container_type"), "container_type is missing"),
    "old type": (lambda c: c.update(container_type="mlcube"), "container_type 'mlcube'"),
    "no image": (lambda c: c.pop("image"), "image is missing"),
    "image path": (lambda c: c.update(image="./image.tar"), "a name in a registry"),
    "archive path": (
        lambda c: c.update(container_type="DockerArchive", image="image.tar"), "is a URL"
    ),
    "no tasks": (lambda c: c.pop("tasks"), "tasks is missing"),
    "another role": (lambda c: c["tasks"].update(evaluate=c["tasks"].pop("infer")),
                     "takes this model for a evaluator"),
    "strange task": (lambda c: c["tasks"].update(train=c["tasks"]["infer"]), "train: no task"),
    "forbidden": (lambda c: c["tasks"]["infer"]["run_args"].update(network="host"),
                  "run_args: 'network' is forbidden"),
    "user": (lambda c: c["tasks"]["infer"]["run_args"].update(user="0"), "'user' is forbidden"),
    "command": (lambda c: c["tasks"]["infer"]["run_args"].pop("command"), "command is missing"),
    "gpus": (lambda c: c["tasks"]["infer"]["run_args"].update(gpus=1), "gpus 1"),
    "shm": (lambda c: c["tasks"]["infer"]["run_args"].update(shm_size=64), "shm_size 64"),
    "environment": (lambda c: c["tasks"]["infer"]["run_args"].update(environment={"A": 1}),
                    "environment holds"),
    "unknown volume": (
        lambda c: c["tasks"]["infer"]["input_volumes"].update(
            labels_path={"mount_path": "/mlcommons/volumes/labels", "type": "directory"}
        ),
        "does not supply 'labels_path'",
    ),
    "missing volume": (lambda c: c["tasks"]["infer"]["input_volumes"].pop("data_path"),
                       "data_path is missing"),
    "relative": (lambda c: _mount(c, "data_path", mount_path="data"), "is not absolute"),
    "dots": (lambda c: _mount(c, "data_path", mount_path="/a/../b"), "not written plainly"),
    "hidden": (lambda c: _mount(c, "data_path", mount_path="/app/data"), "hides a folder"),
    "nested": (lambda c: _mount(c, "data_path", mount_path="/mlcommons/volumes/predictions/in"),
               "is in, or holds"),
    "kind": (lambda c: _mount(c, "parameters_file", type="directory"), "mounts a file"),
    "extra key": (lambda c: _mount(c, "data_path", opts="ro"), "exactly mount_path and type"),
}  # fmt: skip


def _mount(config: dict[str, Any], name: str, **changes: str) -> None:
    config["tasks"]["infer"]["input_volumes"][name].update(changes)


@pytest.mark.parametrize("case", BREAKS)
def test_the_checker_sees_what_is_broken(case: str, medperf_contract) -> None:
    change, expected = BREAKS[case]
    config = copy.deepcopy(yaml.safe_load(container_config(MODEL)))
    change(config)
    faults = medperf_contract.faults_of(yaml.safe_dump(config), "model")
    assert any(expected in fault for fault in faults), faults


def test_the_checker_sees_what_the_server_would_not_store(medperf_contract) -> None:
    text = container_config(MODEL)
    faults = medperf_contract.faults_of(
        text, "model", image_hash="0" * 101, name="n" * 129, url="u" * 257
    )
    assert len(faults) == 3
    assert medperf_contract.faults_of("- a list", "model") == ["a mapping is needed"]
    assert medperf_contract.faults_of("a: [", "model")[0].startswith("no YAML")


def test_metadata_is_handed_on_only_where_prepare_writes_it(medperf_contract) -> None:
    config = yaml.safe_load(container_config(ROLES[0]))
    volume = config["tasks"]["prepare"]["output_volumes"].pop("metadata_path")
    config["tasks"]["statistics"]["input_volumes"]["metadata_path"] = volume
    faults = medperf_contract.faults_of(yaml.safe_dump(config), "preparator")
    assert faults == ["statistics: metadata_path, which prepare does not write"]


PAGES = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("mlcube/*/README.md"), ROOT / "README.md"]


def test_the_client_takes_every_command_of_the_pages(medperf_contract) -> None:
    """Those of a package's README are tested in test_package.py."""
    commands = {
        command: page
        for page in PAGES
        for command in medperf_contract.commands_in(page.read_text(encoding="utf-8"))
    }
    assert len(commands) >= 6
    faults = {
        f"{page.name}: {command}": medperf_contract.command_fault(command)
        for command, page in commands.items()
    }
    assert {where: fault for where, fault in faults.items() if fault} == {}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("medperf run -b BENCHMARK_UID -d DATASET_UID", "'--model_uid'"),
        ("medperf run -b mine -d 1 -m 2", "Invalid value for '--benchmark'"),
        ("medperf run --gpus=all -b 1 -d 2 -m 3", "--gpus"),
        ("medperf --gpu=all run -b 1 -d 2 -m 3", "--gpu"),
        ("medperf test run --model MODEL_UID", "'--benchmark'"),
        ("medperf container submit --name a", "'--container-config-file'"),
        ("medperf mlcube-submit", "mlcube-submit"),
        ("medperf run ...", "Missing option"),
    ],
)
def test_the_checker_sees_a_command_that_the_client_refuses(
    medperf_contract, command: str, expected: str
) -> None:
    found = medperf_contract.commands_in(f"Then `{command}`.\n\n    {command}\n")
    assert found == [command, command]
    assert expected in medperf_contract.command_fault(command)
