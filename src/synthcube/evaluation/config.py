"""The section `evaluation` of the YAML."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.schema import Schema

ExtractorName = Literal[
    "efficientnet-lite0", "inception", "radimagenet", "medicalnet", "radiomic", "random-projection"
]
_FROM_DISK = ("inception", "radimagenet", "medicalnet")


class ExtractorConfig(Schema):
    """What turns an image into the numbers that sets of images are compared by."""

    name: ExtractorName = Field(
        default="efficientnet-lite0",
        description="efficientnet-lite0 (ImageNet; the extra `perceptual`); inception, radimagenet "
        "or medicalnet with weights of your own; radiomic or random-projection, which need none "
        "and compare with no one else's numbers.",
    )
    weights: str | None = Field(
        default=None, description="File of the weights (.pt, .pth, .safetensors)."
    )

    @model_validator(mode="after")
    def _weights_where_needed(self) -> Self:
        if self.name in _FROM_DISK and not self.weights:
            raise ValueError(f"{self.name} needs its weights: evaluation.extractor.weights")
        if self.name not in _FROM_DISK and self.weights:
            raise ValueError(
                f"{self.name} takes no weights; those that do: {', '.join(_FROM_DISK)}"
            )
        return self


class EvaluationConfig(Schema):
    """What `synthcube evaluate` computes, and how."""

    extractor: ExtractorConfig = Field(
        default=ExtractorConfig(), description="Network whose features distances are taken in."
    )
    slices_per_plane: int = Field(
        default=8, ge=1, le=16384, description="Slices of a volume in each of the three planes."
    )
    num_neighbours: int = Field(
        default=5,
        ge=1,
        le=10000,
        description="Neighbours of precision, recall, density and coverage.",
    )
    num_repeats: int = Field(
        default=10,
        ge=2,
        le=10000,
        description="Random splits behind floors and confidence intervals.",
    )
    copy_false_alarms: float = Field(
        default=0.01, gt=0, lt=0.5,
        description="Share of held-out real images that the threshold for near-copies may call "
        "copies of a training image.",
    )  # fmt: skip
    pairs: bool | None = Field(
        default=None,
        description="Whether predictions and labels belong together one by one, by SubjectID or "
        "file name; null: where they do.",
    )
    usefulness: bool = Field(
        default=True,
        description="Train a small classifier on predictions and test it on real images, where "
        "both have classes.",
    )
