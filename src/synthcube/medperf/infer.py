"""What the parameters_file of a MedPerf container may say, role by role."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube import config, reading, storage
from synthcube.compute import ComputeConfig
from synthcube.config import S, SamplingConfig
from synthcube.data.conditions import ConditionRequest, cell, requested_values
from synthcube.data.manifest import read_manifest, write_manifest
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ArtifactError, ConfigError
from synthcube.models import artifact
from synthcube.models.artifact import INDEX, Artifact
from synthcube.schema import MAX_COUNT, MAX_SEED, Schema
from synthcube.tasks.infer import infer as make_images


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


def read_parameters(path: Path | None, kind: type[S]) -> S:
    """What the file says, or the defaults where there is none.

    Raises:
        ConfigError: all that is wrong with it.
    """
    return config.read(path, kind) if path else kind()


log = logging.getLogger("synthcube")

_DEPTH = 2  # folders of a tarball above the model's own


def infer(
    data_path: Path,
    output_path: Path,
    additional_files: Path,
    *,
    parameters_file: Path | None = None,
) -> Path | None:
    """Generate images, or reconstruct or translate prepared ones; returns a picture of them.

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
            "parameters_file": parameters_file,
        },
    )  # fmt: skip
    settings = read_parameters(parameters_file, ModelConfig)
    model = find_model(additional_files)
    with storage.scratch_folder() as folder:
        given = settings.model_dump(mode="json", exclude_unset=True)
        wanted = {"seed", "sampling", "compute"}
        config_path = folder / "config.yaml"
        config_path.write_text(
            reading.dump({key: given[key] for key in given if key in wanted}), encoding="utf-8"
        )
        conditions_path, trained = None, artifact.load(model)
        if settings.task == "translate" and not trained.image.source_channels:
            raise ConfigError("task: translate, but the model makes images of no others.")
        if settings.conditions == "prepared":
            number = settings.sampling.num_images
            asked = number if "num_images" in settings.sampling.model_fields_set else None
            conditions_path = folder / "conditions.csv"
            wishes = _prepared_conditions(data_path, trained, settings.beyond_training)
            count = asked if isinstance(asked, int) else len(wishes)
            write_manifest(conditions_path, list(itertools.islice(itertools.cycle(wishes), count)))
        return make_images(
            model, output_path,
            config_path=config_path, conditions_path=conditions_path,
            data_path=None if settings.task == "generate" else data_path,
        )  # fmt: skip


def find_model(folder: Path) -> Path:
    """The one trained model in a folder, or in those below it.

    Raises:
        ArtifactError: there is none, or there are several.
    """
    if (folder / INDEX).is_file():
        return folder
    patterns = ["/".join(["*"] * depth) + f"/{INDEX}" for depth in range(1, _DEPTH + 1)]
    found = [path.parent for pattern in patterns for path in sorted(folder.glob(pattern))]
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path.relative_to(folder)) for path in found)
    raise ArtifactError(
        f"additional_files {folder} holds several models ({names}): pack one."
        if found
        else f"additional_files {folder} holds no trained model: pack what synthcube package or "
        f"synthcube export wrote, with {INDEX}."
    )


def _prepared_conditions(data_path: Path, trained: Artifact, beyond: str) -> list[ConditionRequest]:
    """What the model is to follow, for each prepared image in its order."""
    specs, rows = trained.image.conditions, read_manifest(data_path).rows
    if not specs:
        raise ConfigError(
            "conditions: prepared, but the model follows no conditions, for it was trained without "
            "data.conditions: write conditions: drawn in parameters_file."
        )
    missing = [each.name for each in specs if not any(cell(row, each.name) for row in rows)]
    if missing:
        raise ConfigError(
            f"conditions: prepared, but the prepared data have nothing in {', '.join(missing)}, "
            "which the model follows."
        )
    wishes = [{each.name: cell(row, each.name) for each in specs} for row in rows]
    if beyond == "refuse":
        return wishes
    kept = [wish for wish in wishes if _known(trained, wish)]
    log.info(
        "%d of %d prepared images have conditions that the model was not trained on.",
        len(wishes) - len(kept), len(wishes),
    )  # fmt: skip
    if not kept:
        raise ConfigError("conditions: prepared, but the model was trained on none of them.")
    return kept


def _known(trained: Artifact, wish: ConditionRequest) -> bool:
    try:
        requested_values(trained.image.conditions, [wish])
    except ConfigError:
        return False
    return True
