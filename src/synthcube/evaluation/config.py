"""The section `evaluation` of the YAML."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.schema import Schema

ExtractorName = Literal["efficientnet-lite0", "inception", "radimagenet", "medicalnet", "radiomic"]
_NEED_WEIGHTS = ("inception", "radimagenet", "medicalnet")


class ExtractorConfig(Schema):
    """The extractor of the features by which sets of images are compared."""

    name: ExtractorName = Field(
        default="efficientnet-lite0",
        description="efficientnet-lite0 (ImageNet; the extra `perceptual`); inception, radimagenet "
        "or medicalnet with weights of your own; radiomic, which needs none and whose numbers "
        "compare with no others.",
    )
    weights: str | None = Field(
        default=None, description="File of the weights (.pt, .pth, .safetensors)."
    )

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.name in _NEED_WEIGHTS and not self.weights:
            raise ValueError(f"{self.name} needs its weights: evaluation.extractor.weights")
        if self.name not in _NEED_WEIGHTS and self.weights:
            raise ValueError(
                f"{self.name} takes no weights; those that do: {', '.join(_NEED_WEIGHTS)}"
            )
        return self


class EvaluationConfig(Schema):
    """Settings of `synthcube evaluate`."""

    extractor: ExtractorConfig = Field(
        default=ExtractorConfig(), description="Network in whose features distances are computed."
    )
    slices_per_plane: int = Field(
        default=8, ge=1, le=16384, description="Slices of a volume in each of the three planes."
    )
    num_neighbours: int = Field(
        default=5, ge=1, le=10000,
        description="Neighbours of precision, recall, density and coverage.",
    )  # fmt: skip
    num_repeats: int = Field(
        default=10, ge=2, le=10000,
        description="Random splits behind real baselines and confidence intervals.",
    )  # fmt: skip
    copy_false_alarms: float = Field(
        default=0.01, gt=0, lt=0.5,
        description="Share of held-out real images that the threshold for near-copies may call "
        "copies of a training image.",
    )  # fmt: skip
    pairs: bool | None = Field(
        default=None,
        description="Whether predictions and labels match one by one, by Source, SubjectID or "
        "file name; null: where they do.",
    )
    mask_channel: int | None = Field(
        default=None, ge=0, lt=4096,
        description="Channel of the labels' files, counted from 0, that is a mask: SSIM, PSNR and "
        "MSE of pairs are computed inside of it too, as BraTS ranks inpainting; null: not.",
    )  # fmt: skip
    usefulness: bool = Field(
        default=True,
        description="Train a small classifier on predictions and test it on real images, where "
        "both have classes.",
    )
