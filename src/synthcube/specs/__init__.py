"""The tasks of the container and their parameters: one table, and the files made from it.

``synthcube specs --write mlcube`` writes what MLCube and MedPerf read; the command line is held to
the same table by a test.
"""

from __future__ import annotations

from pathlib import Path

from synthcube.specs.medperf import CONTAINER_CONFIG, container_config, parameters_yaml, readme
from synthcube.specs.mlcube import MLCUBE, mlcube_yaml
from synthcube.specs.roles import MODEL, ROLES, mounts
from synthcube.specs.tables import IMAGE, SIF, TASKS, Parameter, Role, Task, image_name
from synthcube.storage import make_folder, write_text

__all__ = [
    "CONTAINER_CONFIG", "IMAGE", "MLCUBE", "MODEL", "ROLES", "SIF", "TASKS", "Parameter", "Role",
    "Task", "container_config", "image_name", "mlcube_yaml", "mounts", "parameters_yaml", "readme",
    "write_role", "write_specs",
]  # fmt: skip


def write_specs(folder: Path, image: str = IMAGE) -> list[Path]:
    """Write mlcube.yaml, and a folder for each role of MedPerf, into `folder`.

    Args:
        image: another name than IMAGE is that of an image in a registry; IMAGE is built, from the
            repository that `folder` is at the top of.

    Raises:
        ConfigError: `image` is no name of one.
        OutputError: `folder` cannot be written.
    """
    image = image_name(image)
    path = make_folder(folder, "--write") / MLCUBE
    write_text(path, mlcube_yaml(image))
    return [path, *(write_role(folder / role.name, role, image) for role in ROLES)]


def write_role(folder: Path, role: Role, image: str = IMAGE) -> Path:
    """Write the files of one role of MedPerf; returns its container_config.yaml.

    Raises:
        OutputError: `folder` cannot be written.
    """
    make_folder(folder / "workspace")
    top = "../.." if image == IMAGE else None
    write_text(folder / CONTAINER_CONFIG, container_config(role, image, top=top))
    write_text(folder / "workspace" / "parameters.yaml", parameters_yaml(role))
    write_text(folder / "README.md", readme(role))
    return folder / CONTAINER_CONFIG
