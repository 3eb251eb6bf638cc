"""The kinds of channels, images and masks: their settings, and how a network sees masks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.errors import ImageError
from synthcube.schema import ChannelIndex, Classes, ImageSpec, Pair, Schema

Masks = Mapping[int, Sequence[int]]
"""The classes of each channel that is a mask, by the channel's number."""

_WHOLE = 1e-3  # beyond a whole number: rounding errors of scaled or 32-bit files
_NAMED = 5  # values of a mask that an error names
_MOST_CLASSES = 16  # whole values that pass for those of a mask


class ImageChannel(Schema):
    """A channel of intensities, which are scaled to [-1, 1]."""

    kind: Literal["image"] = Field(default="image", description="Intensities.")
    intensity_range: Pair | None = Field(
        default=None, description="In place of data.intensity_range."
    )
    percentiles: Pair | None = Field(default=None, description="In place of data.percentiles.")
    normalisation: Literal["range", "z_score"] = Field(
        default="range",
        description="z_score: the mean minus and plus 3 standard deviations of an image become -1 "
        "and 1. range: intensity_range, or percentiles.",
    )

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        pairs = {"intensity_range": self.intensity_range, "percentiles": self.percentiles}
        for name, pair in pairs.items():
            if pair and not pair[0] < pair[1]:
                raise ValueError(f"{name} {list(pair)}: the first must be below the second")
        if self.percentiles and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles {list(self.percentiles)} must lie in 0 to 100")
        chosen = [name for name, pair in pairs.items() if pair]
        chosen += ["normalisation: z_score"] if self.normalisation == "z_score" else []
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)}: only one of them can be used")
        return self


class MaskChannel(Schema):
    """A channel of classes: resampled by the nearest voxel, and made as whole numbers."""

    kind: Literal["mask"] = Field(default="mask", description="Classes.")
    classes: Classes = Field(
        default=(0, 1), description="Values of the voxels; the first is the background."
    )


ChannelConfig = Annotated[ImageChannel | MaskChannel, Field(discriminator="kind")]
ChannelConfigs = dict[ChannelIndex, ChannelConfig]


def masks_of(channels: Mapping[int, ImageChannel | MaskChannel]) -> dict[int, tuple[int, ...]]:
    """The classes of each mask among the channels, in the order of the channels."""
    numbered = sorted(channels.items())
    return {number: part.classes for number, part in numbered if isinstance(part, MaskChannel)}


def require_classes(tensor: torch.Tensor, masks: Masks) -> torch.Tensor:
    """`tensor` (C, *spatial) in source units, its masks rounded to the classes.

    Raises:
        ImageError: a voxel of a mask has none of the values of its classes.
    """
    if not masks:
        return tensor
    tensor = tensor.clone()
    for channel, classes in masks.items():
        voxels = tensor[channel]
        rounded = voxels.round()
        other = (voxels - rounded).abs() > _WHOLE
        other |= ~torch.isin(rounded, torch.tensor(classes, dtype=rounded.dtype))
        if other.any():
            values = voxels[other].unique()
            shown = ", ".join(f"{value:g}" for value in values[:_NAMED].tolist())
            more = f" and {len(values) - _NAMED} more values" if len(values) > _NAMED else ""
            raise ImageError(
                f"channel {channel} is a mask and holds {shown}{more}; "
                f"data.channels.{channel}.classes are {list(classes)}"
            )
        tensor[channel] = rounded
    return tensor


def class_indices(values: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """The place of each voxel's class in `classes`, float32; every value must be among them."""
    ordered, places = torch.tensor(classes, dtype=torch.float32).sort()
    return places[torch.searchsorted(ordered, values.contiguous())].float()


def class_values(indices: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """The class at each place in `classes`, float32; places are rounded and clipped."""
    places = indices.round().clamp(0, len(classes) - 1).long()
    return torch.tensor(classes, dtype=torch.float32)[places]


def encoded(images: torch.Tensor, masks: Masks) -> torch.Tensor:
    """What a network sees of images (B, C, *spatial) in [-1, 1]: (B, C', *spatial).

    A mask of two classes stays one channel, -1 and 1. One of more classes becomes a channel for
    each, 1 where the voxel is of that class and -1 elsewhere: numbered classes in one channel
    would put class 1 around every border of 0 and 2.
    """
    if not any(len(classes) > 2 for classes in masks.values()):
        return images
    parts = []
    for channel in range(images.shape[1]):
        part = images[:, channel : channel + 1]
        if (count := len(masks.get(channel, ()))) > 2:
            indices = ((part + 1) / 2 * (count - 1)).round()
            levels = torch.arange(count).to(part).view(-1, *[1] * (part.ndim - 2))
            part = (indices == levels).to(part) * 2 - 1
        parts.append(part)
    return torch.cat(parts, dim=1)


def decoded(images: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Images out of what a network makes, (B, C', *spatial): (B, C, *spatial) in [-1, 1].

    Each voxel of a mask is of one class, the one that the network makes largest. Classes lie
    evenly from -1 to 1, in their order.
    """
    if not masks:
        return images
    parts, start, channel = [], 0, 0
    while start < images.shape[1]:
        count = len(masks.get(channel, ()))
        width = count if count > 2 else 1
        part = images[:, start : start + width]
        if count == 2:
            part = torch.where(part > 0, 1.0, -1.0)
        elif count > 2:
            part = part.argmax(dim=1, keepdim=True).to(images.dtype) / (count - 1) * 2 - 1
        parts.append(part)
        start, channel = start + width, channel + 1
    return torch.cat(parts, dim=1)


def files_of(image: ImageSpec) -> list[tuple[list[int], str]]:
    """The channels of each file that an image is written to, and what the file's name ends in.

    Without masks there is one file. With masks each channel has its own, but the three of a colour
    picture stay together.
    """
    if not image.masks:
        return [(list(range(image.channels)), "")]
    files: list[tuple[list[int], str]] = []
    for channel in range(image.channels):
        kind = "mask" if channel in image.masks else "image"
        continues = files and kind == "image" and files[-1][0][0] not in image.masks
        if image.file_format == "png" and continues:
            files[-1][0].append(channel)
        else:
            files.append(([channel], f"_{kind}_{channel}"))
    return files


def subject_of(tensor: torch.Tensor, affine: npt.ArrayLike, masks: Collection[int]) -> Any:
    """What TorchIO transforms of (C, X, Y, Z): a ScalarImage, or where channels are masks a
    Subject, in which these are LabelMaps."""
    import torchio as tio

    if not masks:
        return tio.ScalarImage(tensor=tensor, affine=affine)
    images, labels = _by_kind(len(tensor), masks)
    parts: dict[str, Any] = {"mask": tio.LabelMap(tensor=tensor[labels], affine=affine)}
    if images:
        parts["image"] = tio.ScalarImage(tensor=tensor[images], affine=affine)
    return tio.Subject(parts)


def voxels_of(subject: Any, masks: Collection[int]) -> tuple[torch.Tensor, npt.NDArray[np.float64]]:
    """The channels (C, X, Y, Z) of what :func:`subject_of` made, and their affine."""
    if not masks:
        return subject.data.float(), np.asarray(subject.affine, dtype=float)
    labels = subject["mask"]
    count = len(labels.data) + (len(subject["image"].data) if "image" in subject else 0)
    images, places = _by_kind(count, masks)
    tensor = torch.empty(count, *labels.data.shape[1:])
    tensor[places] = labels.data.float()
    if images:
        tensor[images] = subject["image"].data.float()
    return tensor, np.asarray(labels.affine, dtype=float)


class MaskSearch:
    """Finds channels that hold few whole numbers in all images that are added."""

    def __init__(self) -> None:
        self._values: dict[int, set[float]] = {}

    def add(self, image: torch.Tensor) -> None:
        """Look at one more image, (C, *spatial) in source units."""
        for channel, voxels in enumerate(image):
            known = self._values.setdefault(channel, set())
            if len(known) <= _MOST_CLASSES:
                known |= set(voxels.unique()[: _MOST_CLASSES + 1].tolist())

    def masks(self) -> dict[int, tuple[int, ...]]:
        """The probable masks so far, with the numbers that they hold."""
        return {
            channel: tuple(sorted(map(int, known)))
            for channel, known in self._values.items()
            if 2 <= len(known) <= _MOST_CLASSES and all(value.is_integer() for value in known)
        }


def probable_masks(images: Iterable[torch.Tensor]) -> dict[int, tuple[int, ...]]:
    """Channels that hold few whole numbers in all of the images, with these numbers.

    Args:
        images: each (C, *spatial) in source units, all of one number of channels.
    """
    search = MaskSearch()
    for image in images:
        search.add(image)
    return search.masks()


def mask_settings(masks: Masks) -> str:
    """The lines of a YAML that say which channels are masks."""
    parts = [f"{number}: {{kind: mask, classes: {list(masks[number])}}}" for number in masks]
    return f"data: {{channels: {{{', '.join(parts)}}}}}"


def _by_kind(count: int, masks: Collection[int]) -> tuple[list[int], list[int]]:
    """The channels that are images, and those that are masks."""
    return [i for i in range(count) if i not in masks], sorted(masks)
