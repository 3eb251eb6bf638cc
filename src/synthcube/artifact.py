"""The folder of a trained model: what is needed to sample, and nothing that can run.

``artifact.json`` lists the other files with their SHA-256, and is written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from synthcube import __version__, addresses, registry, runtime
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
EXPORTED_WEIGHTS = "model.safetensors"
"""Name of the weights in an exported folder: where a Hub looks for them."""
CARD = "README.md"
"""A model card may be edited where the model is published: no hash of it is kept."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact folder."""

    folder: Path
    config: Mapping[str, Any]
    image: ImageSpec
    metrics: Mapping[str, float]
    sha256: str  # of the index, which holds the hash of every file
    weights: Path

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
            weights = load_file(self.weights)
            _leave_out(family, weights)
            family.load_state_dict(weights, strict=True)
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
    checkpoint: str = "",
) -> None:
    """Write the artifact in one step, in place of an older one.

    Args:
        checkpoint: fingerprint of the checkpoint that the weights are of.
    """
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
        write_index(staging, checkpoint=checkpoint)


def write_index(folder: Path, names: Iterable[str] | None = None, *, checkpoint: str = "") -> None:
    """List the files of an artifact folder with their hashes.

    Args:
        names: of them, where others may lie beside them.
        checkpoint: fingerprint of the one that the weights are of, in a run.
    """
    unlisted = (INDEX, CARD)
    found = folder.iterdir() if names is None else (folder / name for name in names)
    files = sorted(path for path in found if path.is_file())
    index = {
        "schema_version": SCHEMA_VERSION,
        "synthcube": __version__,
        "files": {
            path.name: sha256(path)
            for path in files
            if path.name[0] != "." and path.name not in unlisted
        },
        **({"checkpoint": checkpoint} if checkpoint else {}),
    }
    write_json(folder / INDEX, index)


def find(path: Path | str) -> Path:
    """The artifact folder that a run, or an artifact folder itself, stands for.

    Args:
        path: or the address of a model at a commit that was downloaded before.

    Raises:
        ArtifactError: there is none.
    """
    if address := addresses.parse(path):
        # A branch may have moved since: what is here may not be what it holds now.
        if address.is_pinned and (folder := address.folder(INDEX)):
            return folder
        raise ArtifactError(f"{address}: this commit of it is not on this disk.")
    path = Path(path)
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


def load(path: Path | str) -> Artifact:
    """Read and verify the artifact of a run or artifact folder, every byte of it.

    Raises:
        ArtifactError: missing, incomplete, changed since it was written, or of a newer schema.
    """
    folder = find(path)
    listed = read_index(folder)
    if faults := damaged(folder, listed).values():
        raise ArtifactError(
            f"The artifact {folder} is damaged: get it again, or export anew.", faults
        )
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    image = ImageSpec.model_validate(_read_json(folder / IMAGE))
    weights = folder / (EXPORTED_WEIGHTS if EXPORTED_WEIGHTS in listed else WEIGHTS)
    return Artifact(
        folder, config, image, _read_json(folder / METRICS), sha256(folder / INDEX), weights
    )


def read_index(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an artifact folder, by name, as its index says.

    Raises:
        ArtifactError: the index cannot be read, is of a newer schema, or lists too few files or
            one that is outside of the folder.
    """
    index = _read_json(folder / INDEX)
    version = index.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder} is of artifact schema {version}, this SynthCube {__version__} reads up to "
            f"{SCHEMA_VERSION}: it was written by {index.get('synthcube')}; upgrade."
        )
    files = index.get("files")
    listed = {str(name): str(digest) for name, digest in dict(files or {}).items()}
    weights = EXPORTED_WEIGHTS if EXPORTED_WEIGHTS in listed else WEIGHTS
    needed = {weights, CONFIG, IMAGE, METRICS}
    faults = [f"{name} is not listed" for name in sorted(needed - set(listed))]
    faults += [f"{name} is not a name of a file" for name in listed if Path(name).name != name]
    if faults:
        raise ArtifactError(f"{folder / INDEX} is damaged: get it again, or export anew.", faults)
    return listed


def damaged(folder: Path, listed: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with the files of a folder, by name, given the SHA-256 of each."""
    faults = {}
    for name, digest in listed.items():
        if not (folder / name).is_file():
            faults[name] = f"{name} is missing"
        elif sha256(folder / name) != digest:
            faults[name] = f"{name} has changed since it was written (SHA-256 differs)"
    return faults


def _leave_out(family: Family, weights: Mapping[str, torch.Tensor]) -> None:
    """Remove the networks that only train, where an export has left out their weights."""
    for name in family.unaveraged:
        if not any(each.startswith(f"{name}.") for each in weights):
            setattr(family, name, None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object.")
    return value
