"""The folder of a trained model: what is needed to sample, and nothing that can run.

``artifact.json`` lists the other files with their SHA-256, and is written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from synthcube import __version__, registry, runtime
from synthcube.errors import ArtifactError
from synthcube.family import Family
from synthcube.names import TRAINED
from synthcube.schema import ImageSpec
from synthcube.storage import (
    recovered_folder,
    replaced_folder,
    sha256,
    write_json,
    write_text,
    write_with,
)

SCHEMA_VERSION = 1
INDEX = "artifact.json"
WEIGHTS, CONFIG, IMAGE, METRICS, VERSIONS = (
    "weights.safetensors", "config.yaml", "image.json", "metrics.json", "versions.json",
)  # fmt: skip
PICTURE = "samples.png"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact folder."""

    folder: Path
    config: Mapping[str, Any]
    image: ImageSpec
    metrics: Mapping[str, float]
    sha256: str  # of the index, which holds the hash of every file

    def build(self, device: torch.device) -> Family:
        """The trained model, in evaluation mode.

        Raises:
            ArtifactError: the weights do not belong to this config.
            FamilyError: the family is not installed here.
        """
        section = dict(self.config["model"])
        try:
            config = registry.find(section["name"]).model_validate(section, context=TRAINED)
            family = config.build(self.image)
            family.load_state_dict(load_file(self.folder / WEIGHTS), strict=True)
        except (RuntimeError, ValidationError, SafetensorError) as error:
            raise ArtifactError(
                f"The weights in {self.folder} do not fit its config: {error}"
            ) from error
        return family.eval().requires_grad_(False).to(device)


def save(
    folder: Path,
    *,
    config: Mapping[str, Any],
    image: ImageSpec,
    weights: Mapping[str, torch.Tensor],
    metrics: Mapping[str, float],
    picture: Path | None = None,
) -> None:
    """Write the artifact in one step, in place of an older one."""
    with replaced_folder(folder) as staging:
        tensors = {name: value.contiguous() for name, value in weights.items()}
        write_with(staging / WEIGHTS, partial(save_file, tensors))
        write_text(staging / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
        write_json(staging / IMAGE, image.model_dump(mode="json"))
        finite = {name: value for name, value in metrics.items() if abs(value) < float("inf")}
        write_json(staging / METRICS, finite)
        write_json(staging / VERSIONS, runtime.versions())
        if picture and picture.exists():
            shutil.copyfile(picture, staging / PICTURE)
        write_index(staging)


def write_index(folder: Path) -> None:
    """List the files of an artifact folder with their hashes."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != INDEX)
    index = {
        "schema_version": SCHEMA_VERSION,
        "synthcube": __version__,
        "files": {path.name: sha256(path) for path in files if path.name[0] != "."},
    }
    write_json(folder / INDEX, index)


def find(path: Path) -> Path:
    """The artifact folder that a run, or an artifact folder itself, stands for.

    Raises:
        ArtifactError: there is none.
    """
    if not path.exists():
        raise ArtifactError(f"model_path {path}: there is no such folder.")
    for folder in (path, recovered_folder(path / "artifact")):
        if (folder / INDEX).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise ArtifactError(
            f"model_path {path}: this run has not finished training; run the same "
            "synthcube train command again to continue it."
        )
    raise ArtifactError(
        f"model_path {path}: no trained model is here; give the run folder of synthcube train, "
        f"or a folder with {INDEX}."
    )


def load(path: Path) -> Artifact:
    """Read and verify the artifact of a run or artifact folder, every byte of it.

    Raises:
        ArtifactError: missing, incomplete, changed since it was written, or of a newer schema.
    """
    folder = find(path)
    index = _read_json(folder / INDEX)
    version = index.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder} is of artifact schema {version}, this SynthCube {__version__} reads up to "
            f"{SCHEMA_VERSION}: it was written by {index.get('synthcube')}; upgrade."
        )
    listed = index.get("files", {})
    needed = {WEIGHTS, CONFIG, IMAGE, METRICS}
    faults = [f"{name} is not listed" for name in sorted(needed - set(listed))]
    for name, digest in listed.items():
        file = folder / Path(name).name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif sha256(file) != digest:
            faults.append(f"{name} has changed since it was written (SHA-256 differs)")
    if faults:
        raise ArtifactError(
            f"The artifact {folder} is damaged: get it again, or export anew.", faults
        )
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    image = ImageSpec.model_validate(_read_json(folder / IMAGE))
    return Artifact(folder, config, image, _read_json(folder / METRICS), sha256(folder / INDEX))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object.")
    return value
