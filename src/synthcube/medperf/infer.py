"""MedPerf's infer: images of a packaged model; and the keys of a container's parameters_file."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube import config, storage
from synthcube.compute import ComputeConfig
from synthcube.config import S, SamplingConfig
from synthcube.data.conditions import cell, requested_values
from synthcube.data.manifest import read_manifest
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ArtifactError, ConfigError
from synthcube.models import artifact
from synthcube.models.artifact import INDEX, Artifact
from synthcube.schema import MAX_COUNT, MAX_SEED, Schema
from synthcube.tasks.infer import InferRequest
from synthcube.tasks.infer import infer as infer_images

log = logging.getLogger("synthcube")


class PreparatorConfig(Schema):
    """How a site's images are brought to one form, and what may be told of them."""

    data: DataConfig = Field(
        default=DataConfig(),
        description="As in a training: orientation, preprocessing, spacing and size are changed, "
        "intensities are not; the columns in `conditions` must be there.",
    )
    smallest_group: int = Field(
        default=5,
        ge=2,
        le=MAX_COUNT,
        description="statistics does not tell of fewer subjects than this.",
    )


class ModelConfig(Schema):
    """What the trained model is to do."""

    task: Literal["generate", "reconstruct", "translate"] = Field(
        default="generate", description="generate, or reconstruct or translate prepared images."
    )
    conditions: Literal["drawn", "prepared"] = Field(
        default="drawn",
        description="What generated images follow: what sampling.num_images says, the rest drawn; "
        "or, for a model that follows conditions, those of the prepared images in turn.",
    )
    beyond_training: Literal["refuse", "leave_out"] = Field(
        default="refuse",
        description="Prepared conditions that the model was not trained on, such as a greater age: "
        "fail, or make no image of them.",
    )
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="Seed of the images.")
    sampling: SamplingConfig = Field(
        default=SamplingConfig(), description="As in a training; it wins over the training's."
    )
    compute: ComputeConfig = Field(
        default=ComputeConfig(), description="As in a training; it wins over the training's."
    )

    @model_validator(mode="after")
    def _conditions_of_generated_images(self) -> Self:
        if self.conditions == "prepared" and self.task != "generate":
            raise ValueError(f"conditions: prepared is for task: generate, not {self.task}")
        if self.conditions == "prepared" and isinstance(self.sampling.num_images, dict):
            raise ValueError(
                "conditions: prepared decides the classes: sampling.num_images must be a number"
            )
        return self


def read_parameters(path: Path | None, schema: type[S]) -> S:
    """The content of a parameters_file, or the defaults where there is none."""
    return config.read(path, schema) if path else schema()


def infer(
    data_path: Path,
    output_path: Path,
    additional_files: Path,
    *,
    parameters: Path | ModelConfig | None = None,
) -> Path | None:
    """Generate images, or reconstruct or translate prepared ones; returns a picture of them.

    Args:
        data_path: prepared images.
        additional_files: folder with one trained model.
        parameters: a parameters_file, or its content; None: the defaults.

    Raises:
        ConfigError: the parameters are not valid, or ask for what the model cannot follow.
        ArtifactError: additional_files holds no trained model, several, or a damaged one.
        FamilyError: the model cannot do what is asked.
        OutputError: `output_path` cannot be written, or holds other images.
    """
    storage.require_separate(
        {"output_path": output_path},
        {
            "data_path": data_path, "additional_files": additional_files,
            "parameters_file": parameters if isinstance(parameters, Path) else None,
        },
    )  # fmt: skip
    if not isinstance(parameters, ModelConfig):
        parameters = read_parameters(parameters, ModelConfig)
    model = find_model(additional_files)
    trained = artifact.load(model)
    if parameters.task == "translate" and not trained.image.source_channels:
        raise ConfigError("task: translate, but the model makes images of no others.")
    rows = None
    if parameters.conditions == "prepared":
        rows = _prepared_conditions(data_path, trained, parameters.beyond_training)
        number = parameters.sampling.num_images
        if "num_images" in parameters.sampling.model_fields_set and isinstance(number, int):
            rows = list(itertools.islice(itertools.cycle(rows), number))
    return infer_images(
        InferRequest(
            model, output_path,
            data=None if parameters.task == "generate" else data_path,
            config=parameters.model_dump(
                mode="json", exclude_unset=True, include={"seed", "sampling", "compute"}
            ),
            conditions_table=rows,
        )
    )  # fmt: skip


def find_model(folder: Path) -> Path:
    """The one trained model in a folder, or in those below it."""
    if (folder / INDEX).is_file():
        return folder
    # A tarball may have one more folder above the model's own.
    indices = [*sorted(folder.glob(f"*/{INDEX}")), *sorted(folder.glob(f"*/*/{INDEX}"))]
    models = [path.parent for path in indices]
    if len(models) == 1:
        return models[0]
    names = ", ".join(str(path.relative_to(folder)) for path in models)
    raise ArtifactError(
        f"additional_files {folder} holds several models ({names}): pack one."
        if models
        else f"additional_files {folder} holds no trained model: pack what synthcube package or "
        f"synthcube export wrote, with {INDEX}."
    )


def _prepared_conditions(data_path: Path, trained: Artifact, beyond: str) -> list[dict[str, str]]:
    """The conditions of each prepared image, in order, that the model is to follow."""
    specs, rows = trained.image.conditions, read_manifest(data_path).rows
    if not specs:
        raise ConfigError(
            "conditions: prepared, but the model follows no conditions, for it was trained without "
            "data.conditions: write conditions: drawn in parameters_file."
        )
    missing = [spec.name for spec in specs if not any(cell(row, spec.name) for row in rows)]
    if missing:
        raise ConfigError(
            f"conditions: prepared, but the prepared data have nothing in {', '.join(missing)}, "
            "which the model follows."
        )
    requests = [{spec.name: cell(row, spec.name) for spec in specs} for row in rows]
    if beyond == "refuse":
        return requests
    kept = [request for request in requests if _is_known(trained, request)]
    log.info(
        "%d of %d prepared images have conditions that the model was not trained on.",
        len(requests) - len(kept), len(requests),
    )  # fmt: skip
    if not kept:
        raise ConfigError("conditions: prepared, but the model was trained on none of them.")
    return kept


def _is_known(trained: Artifact, request: dict[str, str]) -> bool:
    try:
        requested_values(trained.image.conditions, [request])
    except ConfigError:
        return False
    return True
