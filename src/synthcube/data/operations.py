"""Operations on the intensities of finished images, each a section of the YAML by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from synthcube.data.channels import Array
from synthcube.errors import ConfigError
from synthcube.schema import ImageSpec, Intensity, List, Schema
from synthcube.storage import sha256

T = TypeVar("T")


def _not_empty(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise ValueError("at least one is needed, not []")
    return values


_SomeOf = Annotated[List[T], AfterValidator(_not_empty)]
Change = Callable[[Array, Array], Array]
"""(C, *spatial) float32 and (4, 4) affine to voxels of the same shape."""


class Operation(Schema, ABC):
    """What all operations share; a subclass changes the voxels of the channels it acts on."""

    keeps_integers: ClassVar[bool] = True
    name: str = Field(description="Name of the operation.")
    channels: _SomeOf[Annotated[int, Field(ge=0, lt=4096)]] | None = Field(
        default=None, description="Channels to act on, counted from 0; null: all."
    )

    def ready(self, image: ImageSpec) -> Change:
        """The operation for images like `image`, with all that it reads already read.

        Raises:
            SynthCubeError: it does not fit such images, or a file cannot be read.
        """
        chosen = list(range(image.channels) if self.channels is None else self.channels)
        if max(chosen) >= image.channels:
            raise ConfigError(
                f"channels {chosen}: the images have {image.channels}, counted from 0"
            )
        change = self.on_channels(len(chosen))

        def apply(voxels: Array, affine: Array) -> Array:
            changed: Array = voxels.copy()
            changed[chosen] = change(voxels[chosen])
            return changed

        return apply

    @abstractmethod
    def on_channels(self, number: int) -> Callable[[Array], Array]:
        """What is done to (number, *spatial) voxels."""

    def record(self) -> dict[str, Any]:
        """Everything on which the outcome depends, as plain values."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values


class Clip(Operation):
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

    def on_channels(self, number: int) -> Callable[[Array], Array]:
        return lambda voxels: np.clip(voxels, self.low, self.high)


class Rescale(Operation):
    """The lowest intensity of each image becomes `low`, its highest `high`; all channels alike."""

    keeps_integers: ClassVar[bool] = False
    name: Literal["rescale"]
    low: Intensity = Field(description="What the lowest intensity becomes.")
    high: Intensity = Field(description="What the highest intensity becomes.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.low, self.high)
        return self

    def on_channels(self, number: int) -> Callable[[Array], Array]:
        def rescaled(voxels: Array) -> Array:
            lowest, highest = float(voxels.min()), float(voxels.max())
            share = (voxels - lowest) / ((highest - lowest) or 1)  # a constant image becomes low
            return share * (self.high - self.low) + self.low

        return rescaled


class Threshold(Operation):
    """Intensities below `below` become `value`."""

    name: Literal["threshold"]
    below: Intensity = Field(description="Lowest intensity that is kept.")
    value: Intensity = Field(default=0, description="What lower ones become.")

    def on_channels(self, number: int) -> Callable[[Array], Array]:
        return lambda voxels: np.where(voxels < self.below, self.value, voxels)


class LargestComponent(Operation):
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

    def on_channels(self, number: int) -> Callable[[Array], Array]:
        def kept(voxels: Array) -> Array:
            from scipy import ndimage

            inside = (voxels > self.above).any(axis=0)  # (*spatial)
            reach = inside.ndim if self.diagonal else 1
            parts, _ = ndimage.label(inside, ndimage.generate_binary_structure(inside.ndim, reach))
            sizes = np.bincount(parts.ravel())
            sizes[0] = 0  # what is not above
            others = inside & (parts != sizes.argmax())
            return np.where(others, self.background, voxels)

        return kept


class FillHoles(Operation):
    """What is enclosed by voxels above `above`, without being above it itself, becomes `value`.

    A voxel is above where any channel is. A hole in a volume is enclosed in all three axes.
    """

    name: Literal["fill_holes"]
    above: Intensity = Field(description="Voxels above this enclose a hole.")
    value: Intensity = Field(description="What the voxels of a hole become.")

    def on_channels(self, number: int) -> Callable[[Array], Array]:
        def filled(voxels: Array) -> Array:
            from scipy import ndimage

            inside = (voxels > self.above).any(axis=0)  # (*spatial)
            holes = ndimage.binary_fill_holes(inside) & ~inside
            return np.where(holes, self.value, voxels)

        return filled


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
