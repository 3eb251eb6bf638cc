"""metadata.json: what MONAI's tools read of an exported model, and its version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synthcube import __version__, environment, reading
from synthcube.errors import ArtifactError
from synthcube.models.artifact import Artifact
from synthcube.sharing.card import Results, intended_use
from synthcube.sharing.config import VERSION

METADATA = "metadata.json"

_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_UNKNOWN = "not stated"
_BEYOND_MONAI = ("synthcube", "lightning", "diffusers", "pydantic", "safetensors", "torchio")


def metadata(
    trained: Artifact, *, version: str, license_id: str = "", results: Results | None = None
) -> dict[str, Any]:
    """The content of metadata.json.

    Args:
        version: of the model, such as 1.0.0.
    """
    image, name = trained.image, trained.config["model"]["name"]
    installed = environment.versions()
    source = len(image.source_channels)
    source_format = _tensor(trained, source, "images to translate") if source else None
    scores = results.settled if results else ()
    return {
        "schema": _SCHEMA,
        "version": version,
        "changelog": {version: f"exported with SynthCube {__version__}"},
        "monai_version": installed.get("monai", _UNKNOWN),
        "pytorch_version": installed.get("torch", _UNKNOWN),
        "numpy_version": installed.get("numpy", _UNKNOWN),
        "required_packages_version": {
            package: installed[package] for package in _BEYOND_MONAI if package in installed
        },
        "name": f"{name} {image.rank}D",
        "task": f"Generation of {image.rank}D medical images",
        "description": f"A {name} of SynthCube that makes images of "
        f"{' x '.join(map(str, image.size))} voxels with {image.channels} channel(s).",
        "authors": _UNKNOWN,
        "copyright": f"license: {license_id}" if license_id else _UNKNOWN,
        "data_type": image.file_format,
        "image_classes": ", ".join(image.labels) or "one class",
        "eval_metrics": {f"{score.section}/{score.name}": score.value for score in scores},
        "intended_use": intended_use(trained),
        "references": [],
        **({"privacy": trained.privacy.model_dump(mode="json")} if trained.privacy else {}),
        "network_data_format": {
            "inputs": {"image": source_format}
            if source_format
            else {"seed": _tensor(trained, 1, "a seed")},
            "outputs": {"pred": _tensor(trained, image.channels, "images")},
        },
    }


def version_of(folder: Path) -> str:
    """The version of an exported model; an ArtifactError where metadata.json does not say it."""
    version = reading.read_object(folder / METADATA, ArtifactError).get("version")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise ArtifactError(
            f"{folder / METADATA} does not say the model's version: export it again."
        )
    return version


def _tensor(trained: Artifact, channels: int, what: str) -> dict[str, Any]:
    image = trained.image
    is_seed = what == "a seed"
    return {
        "type": "integer" if is_seed else "image",
        "format": "seed" if is_seed else "magnitude",
        "num_channels": channels,
        "spatial_shape": [1] if is_seed else list(image.size),
        "dtype": "int64" if is_seed else "float32",
        "value_range": [0, 2**53] if is_seed else [-1, 1],
        "is_patch_data": False,
        "channel_def": {str(index): f"{what}, channel {index}" for index in range(channels)},
    }
