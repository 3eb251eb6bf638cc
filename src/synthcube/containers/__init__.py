"""The container files for MLCube and MedPerf, kept as package data in this folder.

mlcube.yaml describes the container for MLCube. Each folder describes one of MedPerf's roles:
container_config.yaml (MLCube reads it too), parameters.yaml and README.md.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from synthcube.errors import ConfigError
from synthcube.storage import make_folder, write_text

IMAGE = "synthcube:latest"  # what `make image` builds
MLCUBE = "mlcube.yaml"
CONTAINER_CONFIG = "container_config.yaml"
PARAMETERS = "workspace/parameters.yaml"
ROLES = ("preparator", "model", "evaluator", "script", "trainer")

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?"
_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:{_HOST}/)?{_NAME}(?:/{_NAME})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?"
    r"(?:@sha256:[0-9a-f]{64})?"
)
_IMAGE_LINE = re.compile(rf"^( *)image: {IMAGE}\n", re.MULTILINE)
# The keys that build the image from the repository, and Singularity's file, which is built there.
_BUILDING = re.compile(r"^  build_\w+: .*\n|^singularity:\n(?:  .*\n)+\n", re.MULTILINE)


def image_name(text: str, option: str = "--image") -> str:
    """Return `text`, the value of `option`, if it is a valid name of a container image.

    Raises:
        ConfigError: it is not.
    """
    if len(text) > 255 or not _REFERENCE.fullmatch(text):
        raise ConfigError(
            f"{option} {text!r:.120} is not the name of a container image: use registry/name:tag "
            "in lower case, such as docker.io/group/synthcube:1.0."
        )
    return text


def description(name: str, image: str = IMAGE, *, builds: bool = True) -> str:
    """Return the text of one of the YAML files, with `image` as the container's image.

    Args:
        name: path in this folder, such as "model/container_config.yaml".
        builds: keep the keys that build the image from the repository, for a file in the
            repository; without them MLCube only pulls the image.
    """
    from synthcube import reading  # imports pydantic, which --help does not need

    text = _read(name)
    if image != IMAGE:
        line = reading.dump({"image": image})  # in quotes where needed: 1:30 would be a number
        text = _IMAGE_LINE.sub(lambda match: match[1] + line, text)
    return text if builds else _BUILDING.sub("", text)


def write_specs(folder: Path, image: str = IMAGE) -> list[Path]:
    """Write mlcube.yaml, and a folder for each of MedPerf's roles; return the paths of the YAML.

    Args:
        folder: `mlcube` at the top of the repository if `image` is the default, which MLCube
            builds from there. Any other image is pulled from its registry.

    Raises:
        ConfigError: `image` is not the name of an image.
        OutputError: `folder` cannot be written.
    """
    builds = image_name(image) == IMAGE
    path = make_folder(folder, "--write") / MLCUBE
    write_text(path, description(MLCUBE, image, builds=builds))
    paths = [path]
    for role in ROLES:
        path = folder / role / CONTAINER_CONFIG
        make_folder(path.parent / "workspace")
        write_text(path, description(f"{role}/{CONTAINER_CONFIG}", image, builds=builds))
        write_text(path.parent / PARAMETERS, _read(f"{role}/parameters.yaml"))
        write_text(path.parent / "README.md", _read(f"{role}/README.md"))
        paths.append(path)
    return paths


def mounts() -> dict[str, dict[str, Path]]:
    """Return where MedPerf mounts each parameter, by task and name, as the roles' YAML says."""
    # libyaml is much faster, and every start of the command line reads these files
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = [yaml.load(_read(f"{role}/{CONTAINER_CONFIG}"), loader) for role in ROLES]
    return {
        name: {
            parameter: Path(volume["mount_path"])
            for parameter, volume in (task["input_volumes"] | task["output_volumes"]).items()
        }
        for file in files
        for name, task in file["tasks"].items()
    }


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
