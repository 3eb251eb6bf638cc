"""The files of MedPerf's roles are what MedPerf takes; and the checker that says so sees faults."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from synthcube import config
from synthcube.cli import app
from synthcube.containers import CONTAINER_CONFIG, ROLES, description, mounts
from synthcube.medperf.infer import ModelConfig, PreparatorConfig, read_parameters
from synthcube.medperf.run_script import ScriptConfig
from synthcube.medperf.training import TrainerConfig

ROOT = Path(__file__).parents[2]
TEXTS = {role: description(f"{role}/{CONTAINER_CONFIG}") for role in ROLES}
TASKS = {
    (role, name): task
    for role, text in TEXTS.items()
    for name, task in yaml.safe_load(text)["tasks"].items()
}
by_role = pytest.mark.parametrize("role", ROLES)
by_task = pytest.mark.parametrize(("role", "task"), TASKS, ids=[task for _, task in TASKS])


def volumes_of(role: str, task: str) -> dict[str, dict[str, str]]:
    """Every volume of a task, by its name."""
    return {**TASKS[role, task]["input_volumes"], **TASKS[role, task]["output_volumes"]}


def test_the_parameters_that_they_come_with_are_valid() -> None:
    folders = {role: ROOT / "mlcube" / role / "workspace" for role in ROLES}
    read_parameters(folders["preparator"] / "parameters.yaml", PreparatorConfig)
    read_parameters(folders["model"] / "parameters.yaml", ModelConfig)
    read_parameters(folders["trainer"] / "parameters.yaml", TrainerConfig)
    evaluation = config.load(folders["evaluator"] / "parameters.yaml").evaluation
    assert evaluation.extractor.name == "efficientnet-lite0"
    script = read_parameters(folders["script"] / "parameters.yaml", ScriptConfig)
    assert script.evaluation.extractor.name == "efficientnet-lite0"


@by_role
def test_medperf_takes_them(role: str, medperf_contract) -> None:
    assert medperf_contract.faults_of(TEXTS[role], role) == []
    name = f"{role}/{CONTAINER_CONFIG}"
    pulled = description(name, "docker.io/some/image:1.0", builds=False)
    assert medperf_contract.faults_of(pulled, role) == []
    assert yaml.safe_load(pulled)["image"] == "docker.io/some/image:1.0"


@by_task
def test_mlcube_finds_every_parameter_and_the_same_command(role: str, task: str) -> None:
    """MLCube adds --name=path to its entrypoint, whose first word is the program."""
    described, written = yaml.safe_load(TEXTS[role]), TASKS[role, task]
    assert written["run_args"]["command"] == f"medperf {task}"
    assert written["entrypoint"] == f"/app/bin/synthcube medperf {task}"
    for side, opts in (("inputs", "ro"), ("outputs", "rw")):
        volumes = written[f"{side[:-1]}_volumes"]
        assert written["parameters"][side].keys() == volumes.keys()
        for name, parameter in written["parameters"][side].items():
            assert parameter.keys() == {"type", "default", "opts"}
            assert parameter["opts"] == opts
            assert parameter["type"] == volumes[name]["type"]
    assert described["docker"]["image"] == described["image"]
    known = {"image", "build_context", "build_file", "build_strategy", "cpu_args", "gpu_args"}
    assert set(described["docker"]) <= known | {"--network"}, "MLCube's runner takes no other keys"
    top = ROOT / "mlcube" / role / described["docker"]["build_context"]
    assert (top / described["docker"]["build_file"]).is_file()
    assert (ROOT / "mlcube" / role / described["singularity"]["build_file"]).is_file()


@by_task
def test_a_volume_is_an_option_that_defaults_to_its_mount(role: str, task: str) -> None:
    group: Any = typer.main.get_command(app)
    options = {option.name: option for option in group.commands["medperf"].commands[task].params}
    volumes, text = volumes_of(role, task), TEXTS[role].partition(f"\n  {task}:")[2]
    assert options.keys() - {"plugins", "trust"} == volumes.keys() == mounts()[task].keys()
    for name, volume in volumes.items():
        assert mounts()[task][name] == Path(volume["mount_path"])
        (line, *_) = re.findall(rf"^        {name}: .*", text, re.MULTILINE)
        assert not options[name].required
        optional = line.endswith(" (optional)")
        assert options[name].default == (None if optional else Path(volume["mount_path"]))


@by_task
def test_the_readme_lists_every_volume(role: str, task: str) -> None:
    page = (ROOT / "mlcube" / role / "README.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {task}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (reads|writes) \| `(\S+)` \|", section, re.MULTILINE)
    written = TASKS[role, task]
    assert rows == [
        (name, verb, volume["mount_path"])
        for side, verb in (("input_volumes", "reads"), ("output_volumes", "writes"))
        for name, volume in written[side].items()
    ]


def test_optional_volumes_are_those_that_are_mounted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from synthcube.cli import medperf

    there = tmp_path / "there"
    there.mkdir()
    assert medperf._mounted(None, there) == there
    assert medperf._mounted(None, tmp_path / "nowhere") is None
    assert medperf._mounted(tmp_path / "own", there) == tmp_path / "own"


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
    config = copy.deepcopy(yaml.safe_load(TEXTS["model"]))
    change(config)
    faults = medperf_contract.faults_of(yaml.safe_dump(config), "model")
    assert any(expected in fault for fault in faults), faults


def test_the_checker_sees_what_the_server_would_not_store(medperf_contract) -> None:
    text = TEXTS["model"]
    faults = medperf_contract.faults_of(
        text, "model", image_hash="0" * 101, name="n" * 129, url="u" * 257
    )
    assert len(faults) == 3
    assert medperf_contract.faults_of("- a list", "model") == ["a mapping is needed"]
    assert medperf_contract.faults_of("a: [", "model")[0].startswith("no YAML")


def test_metadata_is_handed_on_only_where_prepare_writes_it(medperf_contract) -> None:
    config = yaml.safe_load(TEXTS["preparator"])
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
    commands = medperf_contract.commands_in(f"Then `{command}`.\n\n    {command}\n")
    assert commands == [command, command]
    assert expected in medperf_contract.command_fault(command)
