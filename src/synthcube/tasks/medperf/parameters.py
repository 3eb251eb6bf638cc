"""What the parameters_file of a MedPerf container may say, role by role."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube import config
from synthcube.compute import ComputeConfig
from synthcube.config import S, SamplingConfig
from synthcube.data.transforms import DataConfig
from synthcube.schema import MAX_COUNT, MAX_SEED, Schema


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
