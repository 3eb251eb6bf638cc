"""The tasks of the container and their parameters: the one table that its descriptions are made of.

``synthcube specs --write mlcube`` writes what MLCube reads; the command line is held to the same
table by a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from synthcube import __version__
from synthcube.storage import make_folder, write_text

MLCUBE = "mlcube.yaml"
IMAGE = "synthcube:latest"  # what `make image` and `make sif` make
SIF = "synthcube.sif"

# Shared memory is for data workers; Docker would give 64 MB. The shell fills in who calls.
_RUN_ARGS = "--rm --user=$(id -u):$(id -g) --shm-size=1g"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One path that a task is given, by the name that MLCube and the command line share."""

    name: str
    kind: Literal["file", "directory"]
    default: str  # relative to the workspace
    help: str


@dataclass(frozen=True, slots=True)
class Task:
    """One command of the container: what it reads, never writes to; and what it writes."""

    name: str
    help: str
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]


_CONFIG = Parameter("parameters_file", "file", "config.yaml", "YAML of the run")
_DATA = Parameter("data_path", "directory", "data", "images, with or without a manifest.csv")
_MODEL = Parameter("model_path", "directory", "run", "what train wrote, or an exported model")

TASKS = (
    Task(
        "train",
        "Train a model, or continue its training.",
        inputs=(_DATA, _CONFIG),
        outputs=(Parameter("output_path", "directory", "run", "the run, with the trained model"),),
    ),
    Task(
        "infer",
        "Generate as many images as sampling.num_images says.",
        inputs=(_MODEL, _CONFIG),
        outputs=(Parameter("output_path", "directory", "images", "images and their manifest"),),
    ),
    Task(
        "evaluate",
        "Judge the images by held-out real ones.",
        inputs=(
            Parameter("predictions", "directory", "images", "what infer wrote"),
            Parameter("labels", "directory", "data", "real images: the test rows of its manifest"),
            Parameter("train_data", "directory", "data", "those of the training: its train rows"),
            _CONFIG,
        ),
        outputs=(
            Parameter("output_path", "file", "evaluation/results.yaml", "the numbers"),
            Parameter("report", "directory", "report", "a page with plots and pictures"),
        ),
    ),
    Task(
        "export",
        "Verify a trained model and write a folder to share.",
        inputs=(_MODEL,),
        outputs=(Parameter("output_path", "directory", "model", "the folder to share"),),
    ),
)


def write_specs(folder: Path) -> Path:
    """Write mlcube.yaml into `folder`, which is one below the top of the repository.

    Raises:
        OutputError: `folder` cannot be written.
    """
    path = make_folder(folder, "--write") / MLCUBE
    write_text(path, mlcube_yaml())
    return path


def mlcube_yaml() -> str:
    """The text of mlcube.yaml."""
    tasks = "".join(_task_text(task) for task in TASKS)
    return f"""# Written by `synthcube specs --write mlcube` from src/synthcube/specs.py: edit that.
name: synthcube
description: Train, sample and share generative models of medical images.
version: {__version__}
authors:
  - name: The synthcube contributors

platform:
  accelerator_count: 0  # 1 or more: gpu_args take the place of cpu_args

docker:
  image: {IMAGE}
  build_context: ..
  build_file: Dockerfile
  build_strategy: auto  # built from source where the image is not there
  cpu_args: {_RUN_ARGS}
  gpu_args: {_RUN_ARGS} --gpus=all
  --network: none

singularity:
  image: {SIF}
  image_dir: ${{runtime.root}}/..
  build_file: ../Singularity.def
  build_args: --build-arg FROM=../synthcube.tar
  run_args: --cleanenv --no-home --nv

tasks:
{tasks}"""


def _task_text(task: Task) -> str:
    return (
        f"  {task.name}:  # {task.help}\n    parameters:\n"
        + _parameters_text("inputs", task.inputs, "ro")
        + _parameters_text("outputs", task.outputs, "rw")
    )


def _parameters_text(title: str, parameters: Sequence[Parameter], mount: str) -> str:
    lines = [
        f"        {each.name}: {{type: {each.kind}, default: {each.default}, opts: {mount}}}"
        f"  # {each.help}\n"
        for each in parameters
    ]
    return f"      {title}:\n" + "".join(lines)
