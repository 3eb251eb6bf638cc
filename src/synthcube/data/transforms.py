"""Transforms that a YAML names: TorchIO's, those that GaNDLF called otherwise, a user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from pydantic import ConfigDict, Field, ValidationInfo, model_validator
from typing_extensions import Self

from synthcube import plugins
from synthcube.errors import ConfigError, SynthCubeError
from synthcube.schema import Schema

ALIASES = {
    "to_canonical": "ToCanonical",
    "threshold": "Threshold",
    "clip": "Clamp",
    "clamp": "Clamp",
    "crop_external_zero_planes": "ZeroPlanesCrop",
    "crop": "Crop",
    "centercrop": "CropOrPad",
    "normalize": "ZNormalization",
    "normalize_positive": "PositiveNormalization",
    "normalize_nonzero": "NonzeroNormalization",
    "rescale": "RescaleIntensity",
    "resize": "Resize",
    "resample": "Resample",
    "affine": "RandomAffine",
    "elastic": "BoundedElasticDeformation",
    "kspace": "KSpaceArtifact",
    "motion": "RandomMotion",
    "bias": "BiasFieldFromBlack",
    "blur": "RandomBlur",
    "noise": "RandomNoise",
    "noise_var": "RelativeNoise",
    "gamma": "GammaFromBlack",
    "swap": "BoundedSwap",
    "flip": "RandomFlip",
    "rotate_90": "QuarterTurn",
    "rotate_180": "HalfTurn",
    "anisotropic": "PlanarAnisotropy",
}
"""Names of GaNDLF, and the classes of TorchIO or of inherited_transforms that stand for them."""

# Classes of torchio that were looked at one by one: their arguments are numbers and words.
_OF_TORCHIO = (
    "Affine", "BiasField", "Blur", "Clamp", "Crop", "CropOrPad", "EnsureShapeMultiple", "Flip",
    "Gamma", "Ghosting", "Mask", "Noise", "Pad", "RandomAffine", "RandomAffineElasticDeformation",
    "RandomAnisotropy", "RandomBiasField", "RandomBlur", "RandomElasticDeformation",
    "RandomFlip", "RandomGamma", "RandomGhosting", "RandomMotion", "RandomNoise", "RandomSpike",
    "RandomSwap", "Resample", "RescaleIntensity", "Resize", "ToCanonical", "ToOrientation",
    "Transpose", "ZNormalization",
)  # fmt: skip
_NESTED = "it takes other transforms; list those themselves"
_LABELS = "it is for maps of labels, and images are none"
_ARRAYS = "it takes arrays, which nobody writes down; the one that draws them is Random"
UNUSABLE_TRANSFORMS = {
    **dict.fromkeys(("Compose", "OneOf"), _NESTED),
    "Lambda": "it takes a function; name a class of your own, package.module:Class",
    "MonaiAdapter": _NESTED,
    **dict.fromkeys(
        ("Contour", "KeepLargestComponent", "LabelsToImage", "OneHot", "RandomLabelsToImage",
         "RemapLabels", "RemoveLabels", "SequentialLabels"),
        _LABELS,
    ),
    "AffineElasticDeformation": f"{_ARRAYS}AffineElasticDeformation",
    "ElasticDeformation": f"{_ARRAYS}ElasticDeformation",
    "Motion": f"{_ARRAYS}Motion",
    "Spike": f"{_ARRAYS}Spike",
    "Swap": f"{_ARRAYS}Swap",
    "CopyAffine": "it takes another image",
    "ToReferenceSpace": "it takes another image",
    "PCA": "it is for what a network makes of images",
    "To": "a model always sees float32",
}  # fmt: skip
"""Classes of torchio that cannot be named, and why."""

_SCALED = "every image is brought to [-1, 1] anyway, see data.intensity_range"
_NO_ALPHA = "alpha is dropped where an image is read"
_NOWHERE = "neither TorchIO nor MONAI has it; name a class of your own, package.module:Class"
_SPACING = "data.spacing_mm says the voxel size of all images"

WITHOUT = {
    **dict.fromkeys(
        ("normalize_by_val", "normalize_imagenet", "normalize_standardize", "normalize_div_by_255"),
        f"leave it out: {_SCALED}",
    ),
    "normalize_nonzero_masked": f"leave it out: {_SCALED}",
    "rgba2rgb": f"leave it out: {_NO_ALPHA}",
    "rgb2rgba": f"leave it out: {_NO_ALPHA}",
    "histogram_matching": "in sampling.postprocessing it matches what infer writes; for training "
    "images there is HistogramStandardization",
    "stain_normalizer": _NOWHERE,
    "resample_min": _SPACING,
    "resample_minimum": _SPACING,
    "colorjitter": _NOWHERE,
    "hed_transform": _NOWHERE,
}
"""Names of GaNDLF that no transform stands for, and what to do instead."""


class TransformConfig(Schema):
    """A transform of TorchIO, by a name of GaNDLF, or package.module:MyTransform.

    Further keys are its arguments: numbers and the words in vocabulary.py, unless it is the
    user's own.
    """

    model_config = ConfigDict(extra="allow")

    only_trains: ClassVar[bool] = False

    name: str = Field(description="Class in torchio, name of GaNDLF, or package.module:Mine.")

    @model_validator(mode="after")
    def _can_be_built(self, info: ValidationInfo) -> Self:
        if self.only_trains and plugins.is_needless(info):
            return self
        try:
            self.build()
        except SynthCubeError as error:
            raise ValueError(str(error)) from error
        except (TypeError, ValueError, RuntimeError) as error:
            hint = _argument_hint(self._kind(), self.model_extra or {})
            raise ValueError(f"{self.name} does not take these arguments: {error}{hint}") from error
        return self

    def build(self) -> Callable[[Any], Any]:
        """The transform: torchio.Subject to torchio.Subject."""
        kind = self._kind()
        transform: Callable[[Any], Any] = kind(**plugins.arguments(self.name, self.model_extra))
        return transform

    def _kind(self) -> Any:
        if plugins.is_own(self.name):
            return own_class(self.name)
        if self.name in ALIASES:
            return alias(self.name)
        refuse_unusable(self.name, WITHOUT)
        known = torchio_transforms()
        if self.name not in known:
            hint = plugins.did_you_mean(self.name, [*known, *ALIASES])
            raise ConfigError(f"torchio has no transform {self.name!r}{hint}")
        return known[self.name]


class AugmentationConfig(TransformConfig):
    """A transform as :class:`TransformConfig` has it, of which a trained model has no need."""

    only_trains: ClassVar[bool] = True


def own_class(name: str) -> Any:
    """The class of transforms called ``package.module:Class``.

    Raises:
        ConfigError: there is none, or what is there makes nothing that can be called.
    """
    kind: Any = plugins.load(name)
    # Looked at before anything is called: a shared model's config must not run a function.
    if not (inspect.isclass(kind) and any("__call__" in vars(base) for base in kind.__mro__)):
        raise ConfigError(f"{name} is no transform: a class whose instances are called is needed")
    return kind


def alias(name: str) -> Any:
    """The class that stands for a name of GaNDLF."""
    import torchio

    from synthcube.data import transform_classes

    return getattr(transform_classes, ALIASES[name], None) or getattr(torchio, ALIASES[name])


def torchio_transforms() -> dict[str, Any]:
    """Every transform of TorchIO that a YAML can describe, by name."""
    import torchio

    from synthcube.data.transform_classes import HistogramStandardization

    kinds = plugins.classes(torchio, _OF_TORCHIO)
    return kinds | {"HistogramStandardization": HistogramStandardization}


def refuse_unusable(name: str, *reasons: Mapping[str, str]) -> None:
    """
    Raises:
        ConfigError: `name` is known to be of no use here, and why.
    """
    for known in (*reasons, UNUSABLE_TRANSFORMS):
        if name in known:
            raise ConfigError(f"there is no transform {name!r}: {known[name]}")


def _argument_hint(kind: Any, given: Collection[str]) -> str:
    starts = [vars(base).get("__init__") for base in kind.__mro__]
    known = {name for each in starts if inspect.isfunction(each) for name in _parameters(each)}
    return "".join(plugins.did_you_mean(name, known) for name in given if name not in known)


def _parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
