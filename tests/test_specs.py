"""The one table of tasks: the committed files, the command line and the workspace agree with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from synthcube import config
from synthcube.cli import app
from synthcube.data.manifest import read_manifest
from synthcube.errors import OutputError
from synthcube.specs import IMAGE, MLCUBE, TASKS, Task, mlcube_yaml, write_specs

ROOT = Path(__file__).parents[1]
WORKSPACE = ROOT / "workspace"
TASK_NAMES = [task.name for task in TASKS]


def options(command: str) -> dict[str, Any]:
    """The options of a command, by their names without dashes."""
    group: Any = typer.main.get_command(app)
    assert command in group.commands, f"{command} is no command"
    return {name.lstrip("-"): option for option in group.commands[command].params
            for name in option.opts}  # fmt: skip


@pytest.fixture
def written() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "mlcube" / MLCUBE).read_text(encoding="utf-8"))
    return found


def test_the_committed_file_is_what_the_table_says(tmp_path: Path) -> None:
    path, *_ = write_specs(tmp_path / "mlcube")
    assert path.read_text(encoding="utf-8") == mlcube_yaml()
    assert (ROOT / "mlcube" / MLCUBE).read_text(encoding="utf-8") == mlcube_yaml()


def test_every_parameter_of_the_table_is_written(written: dict[str, Any]) -> None:
    expected = {
        task.name: {
            "parameters": {
                title: {
                    each.name: {"type": each.kind, "default": each.default, "opts": mount}
                    for each in parameters
                }
                for title, parameters, mount in (
                    ("inputs", task.inputs, "ro"),
                    ("outputs", task.outputs, "rw"),
                )
            }
        }
        for task in TASKS
    }
    assert written["tasks"] == expected


@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_a_task_is_a_command_and_a_parameter_its_option(task: Task) -> None:
    known = options(task.name)
    given = {each.name for each in (*task.inputs, *task.outputs)}
    assert given <= set(known)
    required = {name for name, option in known.items() if option.required and "_" in name}
    assert required <= given, "MLCube cannot give what the table does not name"


@pytest.mark.parametrize("task", TASKS, ids=TASK_NAMES)
def test_inputs_and_outputs_are_never_the_same_folder(task: Task) -> None:
    for output in task.outputs:
        folder = output.default if output.kind == "directory" else Path(output.default).parent
        assert str(folder) not in {".", *(each.default for each in task.inputs)}


def test_defaults_are_in_the_workspace_or_come_from_an_earlier_task() -> None:
    made: set[str] = set()
    for task in TASKS:
        for each in task.inputs:
            path = WORKSPACE / each.default
            found = path.is_file() if each.kind == "file" else path.is_dir()
            assert found or each.default in made, f"{task.name}: {each.name}"
        made |= {each.default for each in task.outputs}
    config.load(WORKSPACE / "config.yaml")
    assert len(read_manifest(WORKSPACE / "data").rows) > 100


def test_what_the_tasks_write_is_ignored_by_git() -> None:
    made = [f"workspace/{each.default.split('/')[0]}/" for task in TASKS for each in task.outputs]
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert set(made) <= set(ignored)


def test_the_files_that_mlcube_builds_from_are_there(written: dict[str, Any]) -> None:
    root = ROOT / "mlcube"
    docker, singularity = written["docker"], written["singularity"]
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
    assert (tmp_path / "here" / MLCUBE).read_text(encoding="utf-8") == mlcube_yaml()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"Cannot write to --write .*file: it is a file"):
        write_specs(tmp_path / "file")
