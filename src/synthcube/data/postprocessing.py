"""Postprocessing of generated images, in source intensities, before they are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails
from typing_extensions import Self

from synthcube import plugins
from synthcube.data.channels import class_values, require_classes
from synthcube.data.image_files import Array
from synthcube.data.transforms import (
    TransformConfig,
    own_class,
    refuse_unusable,
    torchio_transforms,
)
from synthcube.errors import ConfigError, ImageError, SynthCubeError
from synthcube.schema import ImageSpec, Intensity, List, Schema
from synthcube.storage import sha256

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def _not_empty(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise ValueError("at least one is needed, not []")
    return values


_SomeOf = Annotated[List[T], AfterValidator(_not_empty)]
Change = Callable[[Array, Array], Array]
"""(C, *spatial) float32 and (4, 4) affine to voxels of the same shape."""


class Operation(Schema, ABC):
    """Base of the operations; a subclass changes the voxels of the channels it acts on."""

    keeps_integers: ClassVar[bool] = True
    name: str = Field(description="Name of the operation.")
    channels: _SomeOf[Annotated[int, Field(ge=0, lt=4096)]] | None = Field(
        default=None,
        description="Channels to act on, counted from 0; null: all that are not masks.",
    )

    def ready(self, image: ImageSpec) -> Change:
        """The operation for images like `image`, with its files already read."""
        chosen = _image_channels(image) if self.channels is None else list(self.channels)
        if max(chosen) >= image.channels:
            raise ConfigError(
                f"channels {chosen}: the images have {image.channels}, counted from 0"
            )
        change = self.on_channels(len(chosen))
        return _on(chosen, lambda voxels, _: change(voxels))

    @abstractmethod
    def on_channels(self, number: int) -> Callable[[Array], Array]:
        """A function from (number, *spatial) voxels to changed ones of the same shape."""

    def record(self) -> dict[str, Any]:
        """All settings on which the outcome depends, as plain values."""
        return self.model_dump(mode="json")


class VoxelOperation(Operation):
    """An operation that does the same whatever the number of channels."""

    def on_channels(self, number: int) -> Callable[[Array], Array]:
        return self.changed

    @abstractmethod
    def changed(self, voxels: Array) -> Array:
        """Voxels of the same shape as these, (C, *spatial)."""


def _image_channels(image: ImageSpec) -> list[int]:
    channels = [channel for channel in range(image.channels) if channel not in image.masks]
    if not channels:
        raise ConfigError("all channels are masks; name those to act on as channels")
    return channels


def _on(channels: list[int], change: Change) -> Change:
    """`change` of these channels alone."""

    def apply(voxels: Array, affine: Array) -> Array:
        outcome = change(voxels[channels], affine)
        if np.shape(outcome) != voxels[channels].shape:
            return outcome  # which is a fault
        changed: Array = voxels.copy()
        changed[channels] = outcome
        return changed

    return apply


class Clip(VoxelOperation):
    """Intensities beyond `low` or `high` become that bound."""

    name: Literal["clip"]
    low: Intensity | None = Field(default=None, description="Lowest intensity; null: no bound.")
    high: Intensity | None = Field(default=None, description="Highest intensity; null: no bound.")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("clip needs low, high or both")
        if self.low is not None and self.high is not None:
            _check_order(self.low, self.high)
        return self

    def changed(self, voxels: Array) -> Array:
        return np.clip(voxels, self.low, self.high)


class Rescale(VoxelOperation):
    """The lowest intensity of each image becomes `low`, its highest `high`; all channels alike."""

    keeps_integers: ClassVar[bool] = False
    name: Literal["rescale"]
    low: Intensity = Field(description="What the lowest intensity becomes.")
    high: Intensity = Field(description="What the highest intensity becomes.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.low, self.high)
        return self

    def changed(self, voxels: Array) -> Array:
        lowest, highest = float(voxels.min()), float(voxels.max())
        share = (voxels - lowest) / ((highest - lowest) or 1)  # a constant image becomes low
        return share * (self.high - self.low) + self.low


class ThresholdOperation(VoxelOperation):
    """Intensities below `below` become `value`."""

    name: Literal["threshold"]
    below: Intensity = Field(description="Lowest intensity that is kept.")
    value: Intensity = Field(default=0, description="What lower ones become.")

    def changed(self, voxels: Array) -> Array:
        return np.where(voxels < self.below, self.value, voxels)


class LargestComponent(VoxelOperation):
    """Of the connected parts above `above`, all but the largest become `background`.

    A voxel is above where any channel is; what is not above is left as it is. Parts are connected
    in all three axes of a volume. Of parts of one size, the first in memory's order is kept.
    """

    name: Literal["largest_component"]
    above: Intensity = Field(description="A voxel belongs to a part where it is above this.")
    background: Intensity = Field(default=0, description="What the other parts become.")
    diagonal: bool = Field(
        default=False, description="Whether voxels that share only an edge or corner are connected."
    )

    def changed(self, voxels: Array) -> Array:
        from scipy import ndimage

        inside = (voxels > self.above).any(axis=0)  # (*spatial)
        reach = inside.ndim if self.diagonal else 1
        parts, _ = ndimage.label(inside, ndimage.generate_binary_structure(inside.ndim, reach))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0  # what is not above
        others = inside & (parts != sizes.argmax())
        return np.where(others, self.background, voxels)


class FillHoles(VoxelOperation):
    """What is enclosed by voxels above `above`, without being above it itself, becomes `value`.

    A voxel is above where any channel is. A hole in a volume is enclosed in all three axes.
    """

    name: Literal["fill_holes"]
    above: Intensity = Field(description="Voxels above this enclose a hole.")
    value: Intensity = Field(description="What the voxels of a hole become.")

    def changed(self, voxels: Array) -> Array:
        from scipy import ndimage

        inside = (voxels > self.above).any(axis=0)  # (*spatial)
        holes = ndimage.binary_fill_holes(inside) & ~inside
        return np.where(holes, self.value, voxels)


class HistogramMatching(Operation):
    """Each channel is given the distribution of intensities of a reference, rank by rank.

    The method of Gonzalez and Woods, Digital Image Processing, section 3.3, as in scikit-image's
    ``match_histograms``. A reference of one channel serves all.
    """

    name: Literal["histogram_matching"]
    reference: str | None = Field(default=None, description="File of the reference image.")
    quantiles: _SomeOf[_SomeOf[Intensity]] | None = Field(
        default=None,
        description="In place of a file: for each channel, intensities at equal steps of "
        "probability from 0 to 1.",
    )

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if (self.reference is None) == (self.quantiles is None):
            raise ValueError("histogram_matching needs either reference or quantiles")
        for row in self.quantiles or ():
            if list(row) != sorted(row):
                raise ValueError(f"quantiles {list(row)}: each must be at least the one before it")
        return self

    def on_channels(self, number: int) -> Callable[[Array], Array]:
        references = self._references()
        if len(references) not in (1, number):
            raise ConfigError(
                f"the reference has {len(references)} channels, the image {number}: "
                "one is needed, or as many"
            )
        chosen = references if len(references) == number else references * number

        def matched(voxels: Array) -> Array:
            return np.stack([_matched(*pair) for pair in zip(voxels, chosen, strict=True)])

        return matched

    def record(self) -> dict[str, Any]:
        digest = {"reference_sha256": sha256(Path(self.reference))} if self.reference else {}
        return super().record() | digest

    def _references(self) -> list[tuple[Array, Array]]:
        """For each channel, probabilities and the intensities at or below which they lie."""
        if self.quantiles:
            return [(np.linspace(0, 1, len(row)), np.array(row)) for row in self.quantiles]
        from synthcube.data.images import read_image

        channels = read_image([Path(str(self.reference))]).tensor.numpy()
        counted = [np.unique(channel, return_counts=True) for channel in channels]
        return [(np.cumsum(counts) / counts.sum(), values) for values, counts in counted]


def _matched(channel: Array, reference: tuple[Array, Array]) -> Array:
    _, places, counts = np.unique(channel, return_inverse=True, return_counts=True)
    probabilities = np.cumsum(counts) / channel.size
    return np.asarray(np.interp(probabilities, *reference)[places].reshape(channel.shape))


def _check_order(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"low {low:g} and high {high:g}: the first must be below the second")


OPERATIONS: dict[str, type[Operation]] = {
    "clip": Clip,
    "rescale": Rescale,
    "threshold": ThresholdOperation,
    "largest_component": LargestComponent,
    "fill_holes": FillHoles,
    "histogram_matching": HistogramMatching,
}
# Classes of monai.transforms.intensity.array that were looked at one by one: their arguments are
# numbers and words, and they draw no random numbers.
_OF_MONAI = (
    "AdjustContrast", "ClipIntensityPercentiles", "DetectEnvelope", "GaussianSharpen",
    "GaussianSmooth", "GibbsNoise", "HistogramNormalize", "KSpaceSpikeNoise", "MedianSmooth",
    "NormalizeIntensity", "SavitzkyGolaySmooth", "ScaleIntensity", "ScaleIntensityFixedMean",
    "ScaleIntensityRange", "ScaleIntensityRangePercentiles", "ShiftIntensity", "StdShiftIntensity",
    "ThresholdIntensity", "UltrasoundConfidenceMapTransform",
)  # fmt: skip
_UNUSABLE = {
    "ComputeHoVerMaps": "it is for maps of labels, and images are none",
    "ForegroundMask": "it makes a mask in place of the image",
    "IntensityRemap": "it is random",
    "MaskIntensity": "it takes a mask",
}
_SEED = "an image is to depend on its seed alone"
# What code that is not ours raises at an image it cannot take.
_FOREIGN = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class FinishingTransform(TransformConfig):
    """A transform of MONAI's intensity arrays or of TorchIO, or package.module:MyTransform.

    A TorchIO transform is given a ScalarImage, every other one a tensor (C, *spatial), as MONAI's
    are. It must not draw random numbers: an image depends on its seed alone.
    """

    def build(self) -> Callable[[Any], Any]:
        """The transform, which must not draw random numbers."""
        import torchio as tio
        from monai.transforms import Randomizable
        from torchio.transforms.augmentation import RandomTransform

        transform = super().build()
        draws = isinstance(transform, Randomizable | RandomTransform)
        if draws or (isinstance(transform, tio.Transform) and transform.probability < 1):
            raise ConfigError(f"{self.name} is random; {_SEED}")
        return transform

    def ready(self, image: ImageSpec) -> Change:
        """The transform as an operation on voxels and their affine."""
        import torchio as tio

        transform = self.build()
        apply = _with_torchio if isinstance(transform, tio.Transform) else _with_tensor
        return _on(_image_channels(image), partial(apply, transform))

    def record(self) -> dict[str, Any]:
        """Name and arguments as plain values."""
        return self.model_dump(mode="json")

    @property
    def keeps_integers(self) -> bool:
        """Whether voxels only move; computed intensities are not whole numbers."""
        import torchio as tio

        return isinstance(self.build(), tio.SpatialTransform)

    def _kind(self) -> Any:
        if plugins.is_own(self.name):
            return own_class(self.name)
        refuse_unusable(self.name, _UNUSABLE)
        known = {**torchio_transforms(), **_monai_transforms()}
        if self.name.startswith("Rand") and self.name not in known:
            raise ConfigError(f"{self.name} is random; {_SEED}")
        if self.name not in known:
            listed = f"; known: {', '.join(OPERATIONS)}, and the transforms of MONAI and TorchIO"
            hint = plugins.did_you_mean(self.name, [*OPERATIONS, *known]) or listed
            raise ConfigError(f"there is no operation or transform {self.name!r}{hint}")
        return known[self.name]


def _validated_step(value: Any) -> Any:
    """The section as the class that its name stands for, so that only its faults are listed."""
    if isinstance(value, Schema):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a mapping is needed, such as {{name: clip, low: 0}}, not {value!r}")
    kind: type[Schema] = OPERATIONS.get(str(value.get("name")), FinishingTransform)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        details = [_hinted(kind, fault) for fault in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(kind.__name__, details) from error


PostprocessingConfig = Annotated[
    Clip
    | Rescale
    | ThresholdOperation
    | LargestComponent
    | FillHoles
    | HistogramMatching
    | FinishingTransform,
    BeforeValidator(_validated_step),
]
_STEPS: TypeAdapter[tuple[Any, ...]] = TypeAdapter(List[PostprocessingConfig])


class Postprocessing:
    """Steps in order, made ready for images of one kind and tried on one of them.

    Args:
        steps: sections of ``sampling.postprocessing``, as values or validated.
        image: what the images have in common.
    """

    def __init__(self, steps: Iterable[Any], image: ImageSpec) -> None:
        try:
            self.steps = _STEPS.validate_python(list(steps))
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors()
            ]
            raise ConfigError("sampling.postprocessing cannot be used here:", faults) from error
        self._masks = image.masks
        self.record: list[dict[str, Any]] = []
        self._changes: list[tuple[str, Change]] = []
        faults = []
        for index, step in enumerate(self.steps):
            try:
                self._changes.append((f"{index} ({step.name})", step.ready(image)))
                self.record.append(step.record())
            except SynthCubeError as error:
                faults.append(f"{index} ({step.name}): {error}")
        if self.steps and not faults:
            faults = self._faults(image)
        if faults:
            raise ConfigError("sampling.postprocessing does not fit these images:", faults)
        self.keeps_integers = all(step.keeps_integers for step in self.steps)
        """Whether images of whole numbers are to be written as such."""

    def __call__(self, image: torch.Tensor, affine: npt.ArrayLike) -> torch.Tensor:
        """(C, *spatial) in the source's intensities to the same, float32."""
        import torch

        voxels, matrix = image.numpy(), np.asarray(affine, dtype=float)
        for where, change in self._changes:
            try:
                changed = np.asarray(change(voxels, matrix), dtype=np.float32)
            except _FOREIGN as error:
                raise ImageError(f"sampling.postprocessing.{where}: {error}") from error
            if changed.shape != voxels.shape:
                raise ImageError(
                    f"sampling.postprocessing.{where} makes {changed.shape} of an image of the "
                    f"shape {voxels.shape}; the shape must stay"
                )
            if not np.isfinite(changed).all():
                raise ImageError(
                    f"sampling.postprocessing.{where} leaves voxels that are not a number"
                )
            voxels = changed
            try:
                require_classes(torch.from_numpy(voxels), self._masks)
            except ImageError as error:
                raise ImageError(f"sampling.postprocessing.{where}: {error}") from error
        return torch.from_numpy(voxels)

    def _faults(self, image: ImageSpec) -> list[str]:
        """Faults that show on a ramp over all intensities, before hours of sampling."""
        import torch

        ramps = [np.linspace(*pair, int(np.prod(image.size))) for pair in image.intensity_range]
        probe = torch.from_numpy(np.stack(ramps).astype(np.float32)).reshape(-1, *image.size)
        for channel, classes in image.masks.items():
            probe[channel] = class_values(probe[channel], classes)
        try:
            outcome = self(probe, image.affine)
        except ImageError as error:
            return [str(error).removeprefix("sampling.postprocessing.")]
        low, high = float(outcome.min()), float(outcome.max())
        if image.file_format == "png" and min(high, 255) - max(low, 0) < 2:
            return [f"intensities of {low:g} to {high:g} are left; a PNG holds those of 0 to 255"]
        return []


def _with_torchio(transform: Callable[[Any], Any], voxels: Array, affine: Array) -> Array:
    import torch
    import torchio as tio

    volume = voxels[..., None] if voxels.ndim == 3 else voxels
    done = transform(tio.ScalarImage(tensor=torch.from_numpy(volume), affine=affine))
    if not np.allclose(done.affine, affine, atol=1e-6):
        raise ValueError("it moves the image in space; the geometry must stay")
    changed: Array = done.data.float().numpy()
    return changed[..., 0] if voxels.ndim == 3 and changed.shape[-1] == 1 else changed


def _with_tensor(transform: Callable[[Any], Any], voxels: Array, affine: Array) -> Array:
    import torch

    return np.asarray(transform(torch.from_numpy(voxels.copy())))


def _monai_transforms() -> dict[str, Any]:
    from monai.transforms.intensity import array

    return plugins.classes(array, _OF_MONAI)


def _hinted(kind: type[Schema], fault: Any) -> InitErrorDetails:
    """A fault to raise again; at an unknown key, the nearest that there is."""
    details = InitErrorDetails(
        type=fault["type"], loc=fault["loc"], input=fault["input"], ctx=fault.get("ctx", {})
    )
    if fault["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        hint = plugins.did_you_mean(str(fault["loc"][-1]), known) or f"; known: {', '.join(known)}"
        details |= {"type": "value_error", "ctx": {"error": ValueError(f"unknown key{hint}")}}
    return details
