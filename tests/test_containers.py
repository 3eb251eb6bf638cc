"""The container files: copies in the repository, the command line, the workspace, the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import synthcube
from synthcube import config, containers
from synthcube.cli import app
from synthcube.containers import IMAGE, MLCUBE, ROLES, description, write_specs
from synthcube.data.manifest import read_manifest
from synthcube.errors import OutputError

ROOT = Path(__file__).parents[1]
WORKSPACE = ROOT / "workspace"
CUBE: dict[str, Any] = yaml.safe_load(description(MLCUBE))
TASKS: dict[str, dict[str, dict[str, dict[str, str]]]] = {
    name: task["parameters"] for name, task in CUBE["tasks"].items()
}
SOURCES = [MLCUBE, *(f"{role}/container_config.yaml" for role in ROLES)]


def options(command: str) -> dict[str, Any]:
    """The options of a command, by their names without dashes."""
    group: Any = typer.main.get_command(app)
    assert command in group.commands, f"{command} is no command"
    return {name.lstrip("-"): option for option in group.commands[command].params
            for name in option.opts}  # fmt: skip


def test_the_repository_holds_exact_copies(tmp_path: Path) -> None:
    write_specs(tmp_path / "mlcube")
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(written) == 16
    assert {path: (ROOT / path).read_bytes() for path in written} == written


@pytest.mark.parametrize("name", SOURCES)
def test_the_files_state_the_version_of_the_package(name: str) -> None:
    assert yaml.safe_load(description(name))["version"] == synthcube.__version__


def test_the_package_holds_every_file_and_no_other() -> None:
    folder = Path(containers.__file__).parent
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {f"{role}/{name}" for role in ROLES
                for name in ("container_config.yaml", "parameters.yaml", "README.md")}  # fmt: skip
    assert {name for name in files if ".py" not in name} == {MLCUBE} | expected


@pytest.mark.parametrize("name", SOURCES)
def test_another_image_is_pulled_and_nothing_else_changes(name: str) -> None:
    built = yaml.safe_load(description(name))
    pulled = yaml.safe_load(description(name, "docker.io/some/image:1.0", builds=False))
    assert built.pop("singularity")["image"] == "synthcube.sif"
    for key in ("build_context", "build_file", "build_strategy"):
        del built["docker"][key]
    for mapping in (built, built["docker"]):
        if "image" in mapping:
            assert mapping["image"] == IMAGE
            mapping["image"] = "docker.io/some/image:1.0"
    assert pulled == built


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_has_a_type_a_default_and_its_access(task: str) -> None:
    assert TASKS[task].keys() == {"inputs", "outputs"}
    for side, access in (("inputs", "ro"), ("outputs", "rw")):
        for parameter in TASKS[task][side].values():
            assert parameter.keys() == {"type", "default", "opts"}
            assert parameter["type"] in {"file", "directory"}
            assert parameter["opts"] == access


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_command_and_a_parameter_its_option(task: str) -> None:
    known = options(task)
    parameters = {*TASKS[task]["inputs"], *TASKS[task]["outputs"]}
    assert parameters <= set(known)
    required = {name for name, option in known.items() if option.required and "_" in name}
    assert required <= parameters, "MLCube cannot give what the YAML does not name"


@pytest.mark.parametrize("task", TASKS)
def test_inputs_and_outputs_are_never_the_same_folder(task: str) -> None:
    inputs = {parameter["default"] for parameter in TASKS[task]["inputs"].values()}
    for output in TASKS[task]["outputs"].values():
        path = Path(output["default"])
        assert str(path if output["type"] == "directory" else path.parent) not in {".", *inputs}


def test_defaults_are_in_the_workspace_or_come_from_an_earlier_task() -> None:
    written: set[str] = set()
    for task, parameters in TASKS.items():
        for name, parameter in parameters["inputs"].items():
            path = WORKSPACE / parameter["default"]
            exists = path.is_file() if parameter["type"] == "file" else path.is_dir()
            assert exists or parameter["default"] in written, f"{task}: {name}"
        written |= {parameter["default"] for parameter in parameters["outputs"].values()}
    config.load(WORKSPACE / "config.yaml")
    assert len(read_manifest(WORKSPACE / "data").rows) > 100


def test_what_the_tasks_write_is_ignored_by_git() -> None:
    outputs = [output["default"] for task in TASKS.values() for output in task["outputs"].values()]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"workspace/{Path(output).parts[0]}/" for output in outputs} <= set(ignored)


def test_the_files_that_mlcube_builds_from_are_there() -> None:
    root = ROOT / "mlcube"
    docker, singularity = CUBE["docker"], CUBE["singularity"]
    assert docker["image"] == IMAGE
    assert (root / docker["build_context"] / docker["build_file"]).is_file()
    assert (root / singularity["build_file"]).is_file()
    assert docker["build_strategy"] == "auto"
    assert docker["gpu_args"] == f"{docker['cpu_args']} --gpus=all"


def test_both_tools_find_one_workspace() -> None:
    link = ROOT / "mlcube" / "workspace"
    assert os.readlink(link) == "../workspace"  # noqa: PTH115  # as it stands, not resolved
    assert link.resolve() == WORKSPACE


def test_the_command_writes_the_file_without_importing_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.argv = ['synthcube', 'specs', '--write', 'here']\n"
        "from synthcube.cli import app\napp(standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'lightning'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "Written: here/mlcube.yaml"
    assert (tmp_path / "here" / MLCUBE).read_text(encoding="utf-8") == description(MLCUBE)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"Cannot write to --write .*file: it is a file"):
        write_specs(tmp_path / "file")
