"""Package: a trained model as a container that can be registered with MedPerf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synthcube import artifact, storage, yaml_text
from synthcube.artifact import Artifact
from synthcube.config import trained_settings
from synthcube.errors import OutputError
from synthcube.export.registration import registration_steps
from synthcube.models.family import Samples
from synthcube.specs import CONTAINER_CONFIG, IMAGE, MODEL, container_config, image_name
from synthcube.tasks.archive import write_archive
from synthcube.tasks.export import export

ARCHIVE, PARAMETERS = "additional_files.tar.gz", "workspace/parameters.yaml"
_ADDITIONAL = "workspace/additional_files"
_MODEL = f"{_ADDITIONAL}/model"


def package(model_path: Path, folder: Path, *, image: str = IMAGE) -> Path:
    """Write everything that the model's registration needs to `folder`, in one step.

    The same model gives the same bytes.

    Args:
        image: name of the container's image in a registry that the sites can pull from.

    Raises:
        ConfigError: `image` is no name of one.
        ArtifactError: there is no trained model, or it is damaged.
        OutputError: `folder` cannot be written, or holds something that is no package.
    """
    storage.require_separate({"output_path": folder}, {"model_path": model_path})
    image_name(image)
    trained = artifact.load(model_path)
    storage.make_folder(folder, "output_path")
    storage.settle(folder)
    earlier = _written_names(folder)
    if storage.contents(folder) and not earlier:
        raise OutputError(
            f"output_path {folder} holds something that is no package: give another one."
        )
    with storage.replaced_folder(folder, earlier) as staging:
        files = staging / _ADDITIONAL
        export(trained.folder, staging / _MODEL)
        digest = write_archive(staging / ARCHIVE, files)
        storage.write_text(staging / CONTAINER_CONFIG, container_config(MODEL, image, top=None))
        storage.write_text(staging / PARAMETERS, yaml_text.dump(_parameters(trained)))
        steps = registration_steps(trained, image=image, archive=ARCHIVE, archive_sha256=digest)
        storage.write_text(staging / "README.md", steps)
    return folder


def _written_names(folder: Path) -> list[str]:
    """Of the files of a package; none where there is no package."""
    if not (folder / CONTAINER_CONFIG).is_file() or not (folder / ARCHIVE).is_file():
        return []
    model = artifact.written_names(folder / _MODEL)
    return [CONTAINER_CONFIG, ARCHIVE, *(f"{_MODEL}/{name}" for name in model)]


def _parameters(trained: Artifact) -> dict[str, Any]:
    """What the model does unless its owner says otherwise."""
    settings = trained_settings(trained)
    sampling = {name: settings["sampling"][name] for name in ("num_images", "batch_size")}
    common = {"seed": settings["seed"], "sampling": sampling}
    if trained.image.source_channels:
        return {"task": "translate", **common}
    if isinstance(trained.build(torch.device("cpu")), Samples):
        return {"task": "generate", "conditions": "drawn", **common}
    return {"task": "reconstruct", **common}
