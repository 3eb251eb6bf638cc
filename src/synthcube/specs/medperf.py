"""What MedPerf reads: for each role a container_config.yaml, which MLCube reads as well."""

from __future__ import annotations

from collections.abc import Sequence

from synthcube.specs.mlcube import (
    ORIGIN,
    heading,
    image_line,
    parameters_text,
    platforms,
    task_head,
)
from synthcube.specs.tables import IMAGE, Parameter, Role, Task

CONTAINER_CONFIG = "container_config.yaml"

# MedPerf gives a task no arguments: each finds everything where it is mounted.
_COMMAND = "medperf"
_TABLE = "| name | | mounted at | |\n| --- | --- | --- | --- |\n"


def container_config(role: Role, image: str = IMAGE, *, top: str | None = "../..") -> str:
    """The text of a role's container_config.yaml.

    MedPerf reads container_type, image, run_args and the volumes; MLCube reads docker, singularity,
    entrypoint and the parameters; each passes over what is the other's.

    Args:
        image: name in a registry that the sites can pull from.
        top: the way from the file's folder to the repository, for MLCube to build from; None where
            it can only pull.
    """
    tasks = "".join(_task_text(task) for task in role.tasks)
    origin = ORIGIN if top else "`synthcube package`"
    return f"""{heading(f"synthcube-{role.name}", role.help, origin)}
container_type: DockerImage
{image_line(image)}
{platforms(top, image)}
tasks:
{tasks}"""


def parameters_yaml(role: Role) -> str:
    """The text of a role's workspace/parameters.yaml."""
    return role.parameters


def readme(role: Role) -> str:
    """The text of a role's README.md."""
    parts = [
        f"# The {role.name} of a MedPerf benchmark\n\n{role.help} Written by `synthcube specs`; "
        "what to do with it is in SynthCube's documentation, docs/how-to/medperf.md.\n\n"
        "`container_config.yaml` is for MedPerf and for MLCube alike; "
        "`workspace/parameters.yaml` holds all that may be changed.\n"
    ]
    for task in role.tasks:
        parts.append(f"\n## {task.name}\n\n{task.help}\n\n{_TABLE}")
        for title, parameters in (("reads", task.inputs), ("writes", task.outputs)):
            parts += [
                f"| `{each.name}` | {title} | `{each.mount}` | {each.help}"
                f"{' (optional)' if each.optional else ''} |\n"
                for each in parameters
            ]
    return "".join(parts)


def _task_text(task: Task) -> str:
    return (
        task_head(task)
        + "    run_args:\n"
        + f"      command: {_COMMAND} {task.name}\n      shm_size: 1g\n"
        + _volumes_text("input_volumes", task.inputs)
        + _volumes_text("output_volumes", task.outputs)
        + f"    entrypoint: /app/bin/synthcube {_COMMAND} {task.name}  # MLCube adds --name=path\n"
        + parameters_text(task)
    )


def _volumes_text(title: str, parameters: Sequence[Parameter]) -> str:
    lines = [
        f"      {each.name}: {{mount_path: {each.mount}, type: {each.kind}}}\n"
        for each in parameters
    ]
    return f"    {title}:{'' if lines else ' {}'}\n" + "".join(lines)
