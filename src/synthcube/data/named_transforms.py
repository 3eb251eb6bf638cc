"""Transforms that a YAML names: TorchIO's, those that GaNDLF called otherwise, a user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import Self

from synthcube import plugins
from synthcube.errors import ConfigError, SynthCubeError
from synthcube.schema import Schema

_OWN = "synthcube.data.inherited_transforms"

ALIASES = {
    "to_canonical": "torchio:ToCanonical",
    "threshold": f"{_OWN}:Threshold",
    "clip": "torchio:Clamp",
    "clamp": "torchio:Clamp",
    "crop_external_zero_planes": f"{_OWN}:ZeroPlanesCrop",
    "crop": "torchio:Crop",
    "centercrop": "torchio:CropOrPad",
    "normalize": "torchio:ZNormalization",
    "normalize_positive": f"{_OWN}:PositiveNormalization",
    "normalize_nonzero": f"{_OWN}:NonzeroNormalization",
    "rescale": "torchio:RescaleIntensity",
    "resize": "torchio:Resize",
    "resample": "torchio:Resample",
    "affine": "torchio:RandomAffine",
    "elastic": f"{_OWN}:BoundedElasticDeformation",
    "kspace": f"{_OWN}:KSpaceArtifact",
    "motion": "torchio:RandomMotion",
    "bias": f"{_OWN}:BiasFieldFromBlack",
    "blur": "torchio:RandomBlur",
    "noise": "torchio:RandomNoise",
    "noise_var": f"{_OWN}:RelativeNoise",
    "gamma": f"{_OWN}:GammaFromBlack",
    "swap": f"{_OWN}:BoundedSwap",
    "flip": "torchio:RandomFlip",
    "rotate_90": f"{_OWN}:QuarterTurn",
    "rotate_180": f"{_OWN}:HalfTurn",
    "anisotropic": f"{_OWN}:PlanarAnisotropy",
}
"""Names of GaNDLF, and the classes that stand for them; their arguments are TorchIO's."""

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
    "images TorchIO has HistogramStandardization",
    "stain_normalizer": _NOWHERE,
    "resample_min": _SPACING,
    "resample_minimum": _SPACING,
    "colorjitter": _NOWHERE,
    "hed_transform": _NOWHERE,
}
"""Names of GaNDLF that no transform stands for, and what to do instead."""


class TransformConfig(Schema):
    """A transform of TorchIO, by a name of GaNDLF, or package.module:MyTransform.

    Further keys are its arguments.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="Class in torchio, name of GaNDLF, or package.module:Mine.")

    @model_validator(mode="after")
    def _can_be_built(self) -> Self:
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
        transform: Callable[[Any], Any] = self._kind()(**(self.model_extra or {}))
        return transform

    def _kind(self) -> Any:
        if ":" in self.name:
            return own_class(self.name)
        if self.name in ALIASES:
            return plugins.load(ALIASES[self.name])
        if self.name in WITHOUT:
            raise ConfigError(f"there is no transform {self.name!r}: {WITHOUT[self.name]}")
        known = torchio_transforms()
        if self.name not in known:
            hint = near_miss(self.name, [*known, *ALIASES])
            raise ConfigError(f"torchio has no transform {self.name!r}{hint}")
        return known[self.name]


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


def torchio_transforms() -> dict[str, Any]:
    """Every transform of TorchIO that a YAML can describe, by name."""
    import torchio as tio

    return {
        name: item
        for name, item in vars(tio).items()
        if inspect.isclass(item)
        and issubclass(item, tio.Transform)
        and not inspect.isabstract(item)
        and name not in {"Transform", "Lambda", "Compose", "OneOf", "MonaiAdapter"}
    }


def near_miss(name: str, known: Collection[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    folded = {each.lower(): each for each in known}
    near = get_close_matches(name.lower(), folded, n=1)
    return f"; did you mean {folded[near[0]]}?" if near else ""


def _argument_hint(kind: Any, given: Collection[str]) -> str:
    starts = [vars(base).get("__init__") for base in kind.__mro__]
    known = {name for each in starts if inspect.isfunction(each) for name in _parameters(each)}
    return "".join(near_miss(name, known) for name in given if name not in known)


def _parameters(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
