"""The strict base of every config section, and the small types that rooms hand each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

List = Annotated[tuple[T, ...], Strict(False)]
"""A YAML list: stored as a tuple, so that a config stays immutable."""

FileFormat = Literal["png", "nii.gz"]


class Schema(BaseModel):
    """Frozen and strict: unknown keys and silent conversions ("16" for 16) are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


def completed(fields: Mapping[str, FieldInfo], values: Any) -> Any:
    """`values` of a config, where an optimizer without a name is the default one, changed.

    So {lr: 0.001} keeps the family's own optimizer: another one is called by its name.
    """
    if not isinstance(values, Mapping):
        return values
    filled = dict(values)
    for name, given in values.items():
        default = fields[name].default if name in fields else None
        partial = isinstance(given, Mapping) and "name" not in given
        if partial and name.endswith("optimizer") and isinstance(default, BaseModel):
            filled[name] = {**default.model_dump(), **given}
    return filled


class ConditionSpec(Schema):
    """A column of the manifest that a model was trained to follow."""

    name: str = Field(description="Column of the manifest.")
    kind: Literal["class", "number"] = Field(description="What its cells are.")
    classes: List[str] = Field(default=(), description="Names of a class, in the order of ids.")
    low: float = Field(default=0.0, description="Lowest number trained on; the model sees -1.")
    high: float = Field(default=0.0, description="Highest number trained on; the model sees 1.")


class ImageSpec(Schema):
    """What every image of a data set has in common: enough to sample, and to save true images.

    A model sees float32 in [-1, 1]; ``intensity_range`` is what -1 and 1 stand for in the
    source's own units, channel by channel. ``size`` has one entry for each spatial axis, in
    TorchIO's order (first axis = left to right), so its length is the spatial rank, 2 or 3.
    """

    size: List[int] = Field(description="Voxels along each spatial axis.")
    channels: int = Field(ge=1, description="Channels of one image (3 for RGB).")
    spacing_mm: List[float] = Field(description="Voxel size in millimetres, always three values.")
    affine: List[List[float]] = Field(
        description="4x4 matrix from voxel index to RAS+ millimetres, given to generated images."
    )
    intensity_range: List[Annotated[tuple[float, float], Strict(False)]] = Field(
        description="Source intensities that -1 and 1 stand for, one pair for each channel."
    )
    file_format: FileFormat = Field(description="Format in which images are written.")
    integer: bool = Field(default=False, description="Whether source intensities are integers.")
    labels: List[str] = Field(default=(), description="Class names, in the order of their ids.")
    conditions: List[ConditionSpec] = Field(
        default=(), description="Columns of the manifest that the images follow."
    )
    source_channels: List[int] = Field(
        default=(),
        description="Channels of the data from which the images are made; they are not among "
        "`channels`.",
    )

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.size)


class Condition(TypedDict):
    """What images are to follow."""

    values: torch.Tensor
    """(B, K), float32: for each of ImageSpec.conditions the class id, or the number scaled to
    [-1, 1]; NaN where it is not known."""
    source: torch.Tensor
    """(B, S, *spatial), float32 in [-1, 1]: the images that are translated; S may be 0."""


class Batch(TypedDict):
    """What the data room hands to a family."""

    image: torch.Tensor  # (B, C, *spatial), float32 in [-1, 1]
    label: torch.Tensor  # (B,), int64 class id; -1 where the manifest gives none
    index: torch.Tensor  # (B,), int64 row of the manifest
    augmented: bool  # whether the images may differ from those of the manifest
    condition: Condition
