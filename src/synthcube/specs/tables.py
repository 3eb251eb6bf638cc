"""What a task reads and writes, and the tasks that MLCube knows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from synthcube.errors import ConfigError

IMAGE = "synthcube:latest"  # what `make image` and `make sif` make
SIF = "synthcube.sif"
VOLUMES = "/mlcommons/volumes"


_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?"
_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:{_HOST}/)?{_NAME}(?:/{_NAME})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
    r"(?:@sha256:[0-9a-f]{64})?"
)


def image_name(text: str) -> str:
    """`text`, where it is the name of a container's image.

    Raises:
        ConfigError: it is none.
    """
    if len(text) > 255 or not _REFERENCE.fullmatch(text):
        raise ConfigError(
            f"--image {text!r:.120} is no name of a container's image: registry/name:tag, such as "
            "docker.io/group/synthcube:1.0, in small letters."
        )
    return text


@dataclass(frozen=True, slots=True)
class Parameter:
    """One path that a task is given, by the name that all who give it share."""

    name: str
    kind: Literal["file", "directory"]
    default: str  # relative to the workspace
    help: str
    place: str = ""
    """Where MedPerf mounts it, below VOLUMES; empty for a task that MedPerf does not know."""
    optional: bool = False
    """Whether the task does without it where nothing is mounted."""

    @property
    def mount(self) -> str:
        """The path within MedPerf's container."""
        return f"{VOLUMES}/{self.place}"


@dataclass(frozen=True, slots=True)
class Task:
    """One command of the container: what it reads, never writes to; and what it writes."""

    name: str
    help: str
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True)
class Role:
    """One of MedPerf's containers."""

    name: str
    help: str
    tasks: tuple[Task, ...]
    parameters: str
    """The parameters.yaml that it is delivered with."""


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
        "Verify a trained model and write a folder to share; publish it, if the YAML says where.",
        inputs=(
            _MODEL,
            _CONFIG,
            Parameter(
                "evaluation",
                "file",
                "evaluation/results.yaml",
                "what evaluate wrote",
                optional=True,
            ),
        ),
        outputs=(Parameter("output_path", "directory", "model", "the folder to share"),),
    ),
)
