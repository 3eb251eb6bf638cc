"""What is done to images that a model made, in their own intensities, before they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails

from synthcube import names
from synthcube.data.channels import Array
from synthcube.data.named_transforms import (
    TransformConfig,
    near_miss,
    own_class,
    refuse_unusable,
    torchio_transforms,
)
from synthcube.data.operations import (
    Change,
    Clip,
    FillHoles,
    HistogramMatching,
    LargestComponent,
    Operation,
    Rescale,
    Threshold,
)
from synthcube.errors import ConfigError, ImageError, SynthCubeError
from synthcube.schema import ImageSpec, List, Schema

if TYPE_CHECKING:
    import torch

OPERATIONS: dict[str, type[Operation]] = {
    "clip": Clip,
    "rescale": Rescale,
    "threshold": Threshold,
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
        """The transform.

        Raises:
            ConfigError: it is unknown, or draws random numbers.
        """
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
        if isinstance(transform, tio.Transform):
            return partial(_with_torchio, transform)
        return partial(_with_tensor, transform)

    def record(self) -> dict[str, Any]:
        """Name and arguments as plain values."""
        return self.model_dump(mode="json")

    @property
    def keeps_integers(self) -> bool:
        """Whether intensities only move; those that are computed are no whole numbers."""
        import torchio as tio

        return isinstance(self.build(), tio.SpatialTransform)

    def _kind(self) -> Any:
        if names.is_own(self.name):
            return own_class(self.name)
        refuse_unusable(self.name, _UNUSABLE)
        known = {**torchio_transforms(), **_monai_transforms()}
        if self.name.startswith("Rand") and self.name not in known:
            raise ConfigError(f"{self.name} is random; {_SEED}")
        if self.name not in known:
            listed = f"; known: {', '.join(OPERATIONS)}, and the transforms of MONAI and TorchIO"
            hint = near_miss(self.name, [*OPERATIONS, *known]) or listed
            raise ConfigError(f"there is no operation or transform {self.name!r}{hint}")
        return known[self.name]


def _of_its_kind(value: Any) -> Any:
    """The section as the class that its name stands for: one set of faults, not one for each."""
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
    | Threshold
    | LargestComponent
    | FillHoles
    | HistogramMatching
    | FinishingTransform,
    BeforeValidator(_of_its_kind),
]
_STEPS: TypeAdapter[tuple[Any, ...]] = TypeAdapter(List[PostprocessingConfig])


class Postprocessing:
    """Steps in order, made ready for images of one kind and tried on one of them.

    Args:
        steps: sections of ``sampling.postprocessing``, as values or validated.
        image: what the images have in common.

    Raises, at construction:
        ConfigError: all that is wrong: sections, channels, files, a changed shape or geometry.
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
        """(C, *spatial) in the source's intensities to the same, float32.

        Raises:
            ImageError: a step fails, changes the shape or geometry, or leaves no numbers.
        """
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
        return torch.from_numpy(voxels)

    def _faults(self, image: ImageSpec) -> list[str]:
        """What goes wrong with a ramp over all intensities: found before hours of sampling."""
        import torch

        ramps = [np.linspace(*pair, int(np.prod(image.size))) for pair in image.intensity_range]
        probe = torch.from_numpy(np.stack(ramps).astype(np.float32)).reshape(-1, *image.size)
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

    return names.classes(array, _OF_MONAI)


def _hinted(kind: type[Schema], fault: Any) -> InitErrorDetails:
    """A fault to raise again; at an unknown key, the nearest that there is."""
    details = InitErrorDetails(
        type=fault["type"], loc=fault["loc"], input=fault["input"], ctx=fault.get("ctx", {})
    )
    if fault["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        hint = near_miss(str(fault["loc"][-1]), known) or f"; known: {', '.join(known)}"
        details |= {"type": "value_error", "ctx": {"error": ValueError(f"unknown key{hint}")}}
    return details
