"""The strict base of every config section, and the small types that rooms hand each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    model_validator,
)
from pydantic.fields import FieldInfo
from typing_extensions import Self

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

List = Annotated[tuple[T, ...], Strict(False)]
"""A YAML list: stored as a tuple, so that a config stays immutable."""

FileFormat = Literal["png", "nii.gz"]

MAX_SEED = 2**63 - 1
MAX_COUNT = 1_000_000_000
"""Of what is counted and costs time alone: epochs, steps, batches."""
MAX_EXACT = 2**53
"""Of what is only counted, such as bytes: above it JSON readers round."""
MAX_BATCH = 1_000_000
MAX_IMAGES = 1_000_000
"""Images that one command makes."""
MAX_VOXELS = 2**30
"""Of one image, over all of its channels: 4 GB in float32."""
LARGEST_INTENSITY = 1e30  # differences stay finite in float32
SMALLEST_SPACING, LARGEST_SPACING = 1e-6, 1e4  # from a nanometre to ten metres

MAX_SIDE = 16384
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Levels = Annotated[List[Channels], Field(min_length=1, max_length=16)]
"""Channels at each resolution of a network."""
Width = Annotated[int, Field(ge=1, le=65536)]
"""Channels of a layer, or entries of a vector."""
Depth = Annotated[int, Field(ge=1, le=256)]
"""Layers or blocks, one after the other."""
Level = Annotated[int, Field(ge=0, le=16)]
"""Index of a resolution of a network; 0 is the full one."""
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
StepNumber = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Voxels = Annotated[int, Field(ge=1, le=MAX_VOXELS)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Weight of a term of a loss."""
Spacing = Annotated[float, Field(ge=SMALLEST_SPACING, le=LARGEST_SPACING)]
Intensity = Annotated[float, Field(ge=-LARGEST_INTENSITY, le=LARGEST_INTENSITY)]
Pair = Annotated[tuple[Intensity, Intensity], Strict(False)]
ChannelIndex = Annotated[
    int,
    Field(ge=0, lt=4096),  # first, or the JSON Schema would lack it
    BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isdecimal() else key),
]
"""JSON has the keys of a mapping as text."""


def _distinct(classes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes {list(classes)}: none may be there twice")
    return classes


Classes = Annotated[
    List[Annotated[int, Field(ge=-(2**15), lt=2**24)]],
    Field(min_length=2, max_length=256),
    AfterValidator(_distinct),
]
"""Values of a mask; the first is the background."""


class Schema(BaseModel):
    """Frozen and strict: unknown keys, silent conversions ("16" for 16), infinity and NaN are
    refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _arguments_finite(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}: a finite number is needed")
        return self


def completed(fields: Mapping[str, FieldInfo], values: Any) -> Any:
    """`values` of a config, where an optimizer without a name is the default one, changed.

    So {lr: 0.001} keeps the family's own optimizer: another one is called by its name.
    """
    if not isinstance(values, Mapping):
        return values
    filled = dict(values)
    for name, value in values.items():
        default = fields[name].default if name in fields else None
        partial = isinstance(value, Mapping) and "name" not in value
        if partial and name.endswith("optimizer") and isinstance(default, BaseModel):
            filled[name] = {**default.model_dump(), **value}
    return filled


class ConditionSpec(Schema):
    """A column of the manifest that a model was trained to follow."""

    name: str = Field(description="Column of the manifest.")
    kind: Literal["class", "number"] = Field(description="What its cells are.")
    classes: List[str] = Field(default=(), description="Names of a class, in the order of ids.")
    low: float = Field(default=0.0, description="Lowest number trained on; the model sees -1.")
    high: float = Field(default=0.0, description="Highest number trained on; the model sees 1.")

    @property
    def fault(self) -> str:
        """Why no image can follow it; empty where one can."""
        if self.kind == "class":
            known = len(set(self.classes)) == len(self.classes) > 0
            return "" if known else "classes: at least one is needed, and none twice"
        return "" if self.low < self.high else f"low {self.low:g} must be below high {self.high:g}"


class Moments(Schema):
    """Number, mean and standard deviation (with Bessel's correction) of measured values."""

    count: int = Field(default=0, ge=0, le=MAX_EXACT, description="Values.")
    mean: float = Field(default=0.0, description="Mean.")
    std: float = Field(default=0.0, ge=0, description="Standard deviation.")


class SpentPrivacy(Schema):
    """What the steps of a differentially private training have spent, and what that rests on."""

    epsilon: float = Field(ge=0, description="Spent by all steps; a smaller one promises more.")
    delta: float = Field(gt=0, lt=1, description="Probability that the promise does not hold.")
    sample_rate: float = Field(gt=0, le=1, description="Probability of a subject to join a step.")
    subjects: int = Field(ge=1, le=MAX_EXACT, description="Training subjects.")
    steps: int = Field(ge=0, le=MAX_EXACT, description="Steps that were taken.")
    sigma: float = Field(gt=0, description="Noise of a step, in units of clip_norm.")
    clip_norm: float = Field(gt=0, description="Largest norm of a subject's gradient.")


class PrivacyStatement(SpentPrivacy):
    """What a differentially private training promises, and on what it rests."""

    unit: str = Field(
        default="one subject with all its images, added or removed",
        description="What neighbouring data sets differ in.",
    )
    accountant: str = Field(description="Name and version of what computed epsilon.")
    sampling: str = Field(
        default="Poisson over subjects, one image of each", description="Who joins a step."
    )
    draws: int = Field(ge=1, le=MAX_EXACT, description="Draws of noise for each image.")
    start_sha256: str = Field(default="", description="Of the weights that it started from.")
    first_stage_sha256: str = Field(default="", description="Of the weights of its first stage.")
    canary_audit: float | None = Field(
        default=None, ge=0,
        description="Lower bound of epsilon that an audit with canaries found; null: no audit.",
    )  # fmt: skip
    sites: dict[str, SpentPrivacy] = Field(
        default={},
        description="Of each site of a federation; all other numbers are those of the site that "
        "has spent most.",
    )


class ImageSpec(Schema):
    """What every image of a data set has in common: enough to sample, and to save true images.

    A model sees float32 in [-1, 1]; ``intensity_range`` is what -1 and 1 stand for in the
    source's own units, channel by channel. ``size`` has one entry for each spatial axis, in
    TorchIO's order (first axis = left to right), so its length is the spatial rank, 2 or 3.
    """

    size: Annotated[List[Side], Field(min_length=2, max_length=3)] = Field(
        description="Voxels along each spatial axis."
    )
    channels: Channels = Field(description="Channels of one image (3 for RGB).")
    spacing_mm: Annotated[List[Spacing], Field(min_length=3, max_length=3)] = Field(
        description="Voxel size in millimetres, always three values."
    )
    affine: List[List[float]] = Field(
        description="4x4 matrix from voxel index to RAS+ millimetres, given to generated images."
    )
    intensity_range: List[Pair] = Field(
        description="Source intensities that -1 and 1 stand for, one pair for each channel."
    )
    file_format: FileFormat = Field(description="Format in which images are written.")
    integer: bool = Field(default=False, description="Whether source intensities are integers.")
    labels: List[str] = Field(default=(), description="Class names, in the order of their ids.")
    conditions: List[ConditionSpec] = Field(
        default=(), description="Columns of the manifest that the images follow."
    )
    source_channels: List[ChannelIndex] = Field(
        default=(),
        description="Channels of the data from which the images are made; they are not among "
        "`channels`.",
    )
    masks: dict[ChannelIndex, Classes] = Field(
        default={},
        description="Channels that are masks, counted from 0 among `channels`, with the values of "
        "their classes. -1 to 1 stands for their places in this list, evenly spaced.",
    )
    patches: bool = Field(
        default=False,
        description="Whether they are patches of the images of the training, which are larger.",
    )

    @model_validator(mode="after")
    def _can_be_an_image(self) -> Self:
        if faults := list(self._faults()):
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        if too_large := size_fault(self.size, self.channels + len(self.source_channels)):
            yield f"size: {too_large}"
        if fault := affine_fault(self.affine):
            yield f"affine {[list(row) for row in self.affine]}: {fault}"
        ranges = self.intensity_range
        if len(ranges) != self.channels or any(low >= high for low, high in ranges):
            yield (
                f"intensity_range {[list(pair) for pair in ranges]}: one pair for each of the "
                f"{self.channels} channel(s) is needed, the first below the second"
            )
        if len(set(self.source_channels)) < len(self.source_channels):
            yield f"source_channels {list(self.source_channels)}: a channel is there twice"
        if beyond := [channel for channel in self.masks if channel >= self.channels]:
            yield f"masks: there is no channel {beyond[0]}"
        names = [spec.name.casefold() for spec in self.conditions]
        if len(set(names)) < len(names):
            yield "conditions: a name is there twice"
        for spec in self.conditions:
            if spec.fault:
                yield f"condition {spec.name}: {spec.fault}"

    @property
    def rank(self) -> int:
        """Number of spatial axes: 2 or 3."""
        return len(self.size)

    @property
    def encoded(self) -> ImageSpec:
        """What a network sees: a mask of more than two classes is one channel for each class.

        See :func:`synthcube.data.channels.encoded`, which makes such images.
        """
        if not self.masks:
            return self
        ranges: list[tuple[float, float]] = []
        for channel, pair in enumerate(self.intensity_range):
            classes = self.masks.get(channel, ())
            ranges += [pair] * (len(classes) if len(classes) > 2 else 1)
        changes = {"channels": len(ranges), "intensity_range": tuple(ranges), "masks": {}}
        return self.model_copy(update=changes)


def size_fault(size: Sequence[int], channels: int = 1) -> str:
    """Why no image can have that size; empty where one can."""
    if math.prod(size) * channels <= MAX_VOXELS:
        return ""
    text = " x ".join(map(str, size)) + (f" x {channels} channels" if channels > 1 else "")
    return f"{text} are more than {MAX_VOXELS} voxels, the most that one image may have"


def near_multiples(size: Sequence[int], step: int) -> list[int]:
    """The sides nearest to those of `size` that are multiples of `step`, and not 0."""
    return [max(1, round(side / step)) * step for side in size]


def affine_fault(affine: Sequence[Sequence[float]]) -> str:
    """Why no image can lie so in space; empty where one can."""
    if [len(row) for row in affine] != [4] * 4 or not all(
        math.isfinite(value) for row in affine for value in row
    ):
        return "a 4x4 matrix of finite numbers is needed"
    if tuple(affine[3]) != (0, 0, 0, 1):
        return "its last row must be 0, 0, 0, 1"
    columns = [tuple(row[axis] for row in affine[:3]) for axis in range(3)]
    spacing = [math.hypot(*column) for column in columns]
    if not all(SMALLEST_SPACING <= side <= LARGEST_SPACING for side in spacing):
        shown = ", ".join(f"{side:g}" for side in spacing)
        return (
            f"its voxels are {shown} mm large; {SMALLEST_SPACING:g} to {LARGEST_SPACING:g} mm "
            "are possible"
        )
    (a, b, c), (d, e, f), (g, h, i) = columns
    volume = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    if abs(volume) < 1e-6 * math.prod(spacing):
        return "it cannot be inverted"
    return ""


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in the names; an empty mapping stays as a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
