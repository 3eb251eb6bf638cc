"""What MLCube reads: mlcube.yaml, and the sections that every file for it shares."""

from __future__ import annotations

from collections.abc import Sequence

from synthcube import __version__
from synthcube.specs.tables import IMAGE, SIF, TASKS, Parameter, Task

MLCUBE = "mlcube.yaml"
ORIGIN = "`synthcube specs --write mlcube` from src/synthcube/specs: edit that"

# Shared memory is for data workers; Docker would give 64 MB. The shell fills in who calls.
_RUN_ARGS = "--rm --user=$(id -u):$(id -g) --shm-size=1g"


def mlcube_yaml(image: str = IMAGE) -> str:
    """The text of mlcube.yaml."""
    head = heading("synthcube", "Train, sample and share generative models of medical images.")
    tasks = "".join(task_head(task) + parameters_text(task) for task in TASKS)
    platform = platforms(".." if image == IMAGE else None, image)
    return f"{head}\n{platform}\ntasks:\n{tasks}"


def heading(name: str, description: str, origin: str = ORIGIN) -> str:
    """What comes first: whose file it is, and what it describes."""
    return f"""# Written by {origin}.
name: {name}
description: {description}
version: {__version__}
authors:
  - name: The synthcube contributors
"""


def platforms(top: str | None, image: str) -> str:
    """How the container is run by Docker and Singularity.

    Args:
        top: the way to the repository, to build from; None where the image can only be pulled.
    """
    building = f"""  build_context: {top}
  build_file: Dockerfile
  build_strategy: auto  # built from source where the image is not there
"""
    singularity = f"""
singularity:
  image: {SIF}
  image_dir: ${{runtime.root}}/{top}
  build_file: {top}/Singularity.def
  build_args: --build-arg FROM={top}/synthcube.tar
  run_args: --cleanenv --no-home --nv
"""
    return f"""platform:
  accelerator_count: 0  # 1 or more: gpu_args take the place of cpu_args

docker:
  {image_line(image)}{building if top else ""}  cpu_args: {_RUN_ARGS}
  gpu_args: {_RUN_ARGS} --gpus=all
  --network: none
{singularity if top else ""}"""


def image_line(image: str) -> str:
    """The key `image`, written as YAML reads it back: 1:30 would be a number."""
    from synthcube import reading  # not needed by other commands, which start the faster

    return reading.dump({"image": image})


def task_head(task: Task) -> str:
    return f"  {task.name}:  # {task.help}\n"


def parameters_text(task: Task) -> str:
    return (
        "    parameters:\n"
        + _parameters_text("inputs", task.inputs, "ro")
        + _parameters_text("outputs", task.outputs, "rw")
    )


def _parameters_text(title: str, parameters: Sequence[Parameter], mount: str) -> str:
    lines = [
        f"        {each.name}: {{type: {each.kind}, default: {each.default}, opts: {mount}}}"
        f"  # {each.help}{' (optional)' if each.optional else ''}\n"
        for each in parameters
    ]
    return f"      {title}:{'' if lines else ' {}'}\n" + "".join(lines)
