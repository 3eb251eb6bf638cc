"""From an image in source intensities to the model's range [-1, 1], and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.data.channels import (
    ChannelConfigs,
    ImageChannel,
    MaskChannel,
    class_indices,
    masks_of,
    require_classes,
    subject_of,
    voxels_of,
)
from synthcube.data.conditions import ConditionFields
from synthcube.data.geometry import Affine, cropped_or_padded, resampled, spacing_of
from synthcube.data.images import Image
from synthcube.data.inpainting import InpaintingConfig
from synthcube.data.transforms import AugmentationConfig, TransformConfig
from synthcube.errors import ArtifactError, ImageError
from synthcube.plugins import TRAINED
from synthcube.reading import validated
from synthcube.schema import (
    LARGEST_SPACING,
    MAX_SIDE,
    SMALLEST_SPACING,
    ImageSpec,
    List,
    Pair,
    size_fault,
)

Plane = Literal["axial", "coronal", "sagittal"]
_ACROSS = {"sagittal": 0, "coronal": 1, "axial": 2}  # the axis of RAS that slices are cut across
_EIGHT_BIT = (0.0, 255.0)  # intensities of a picture
_SPREADS = 3  # standard deviations on either side of the mean that become -1 and 1


class DataConfig(ConditionFields):
    """How images are read, brought to one shape and range, split and augmented."""

    slices: Plane | None = Field(
        default=None,
        description="Cut volumes into 2D images: axial, coronal or sagittal. Slices that are all "
        "of one intensity are left out.",
    )
    spacing_mm: List[Annotated[float, Field(le=LARGEST_SPACING)]] | None = Field(
        default=None, description="Resample to this voxel size; null keeps the source's."
    )
    size: List[Annotated[int, Field(le=MAX_SIDE)]] | None = Field(
        default=None, description="Voxels along each axis; null: all images already agree."
    )
    fit: Literal["resize", "crop_or_pad"] = Field(
        default="resize", description="How an image is brought to data.size."
    )
    patches: List[Annotated[int, Field(le=MAX_SIDE)]] | None = Field(
        default=None,
        description="Train on patches of so many voxels along each axis, such as [64, 64, 64]: in "
        "every epoch another random part of each image. null: on whole images.",
    )
    intensity_range: Pair | None = Field(
        default=None,
        description="Source intensities that become -1 and 1 (clipped beyond), such as "
        "[-1000, 1000] for CT; null: 0 to 255 for 8-bit pictures, else percentiles of each image.",
    )
    percentiles: Pair = Field(
        default=(0.5, 99.5), description="Percentiles of an image that become -1 and 1."
    )
    channels: ChannelConfigs = Field(
        default={},
        description="What single channels are, counted from 0 (a colour picture has three): "
        "{0: {kind: image, intensity_range: [-1000, 1000]}, 1: {kind: mask, classes: [0, 1, 2]}}. "
        "Those that are not named are images.",
    )
    preprocessing: List[TransformConfig] = Field(
        default=(),
        description="TorchIO transforms applied once, before resampling and sizing: "
        "[{name: CropOrPad, target_shape: 64}].",
    )
    inpainting: InpaintingConfig | None = Field(
        default=None,
        description="Train to fill holes that are cut into the images: other ones in every epoch. "
        "{} for the defaults, {max_size: 0.5}; null: no holes.",
    )
    augmentation: List[AugmentationConfig] = Field(
        default=(),
        description="TorchIO transforms applied anew in every epoch, such as "
        "[{name: RandomFlip, axes: 0}].",
    )
    validation_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the subjects held out, where the manifest has no Split column.",
    )
    num_workers: int = Field(
        default=0,
        ge=0,
        le=512,
        description="Loader processes; the cache makes 0 enough without augmentation.",
    )
    cache_gb: float = Field(
        default=20,
        ge=0,
        le=1e6,
        description="Size that the cache of preprocessed images may reach.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        pairs = {"percentiles": self.percentiles, "intensity_range": self.intensity_range}
        for name, pair in pairs.items():
            if pair and not pair[0] < pair[1]:
                raise ValueError(f"{name} {list(pair)}: the first must be below the second")
        if min(self.percentiles) < 0 or max(self.percentiles) > 100:
            raise ValueError(f"percentiles {list(self.percentiles)} must lie in 0 to 100")
        sides = {"size": self.size, "spacing_mm": self.spacing_mm, "patches": self.patches}
        for name, values in sides.items():
            if values is not None and (len(values) not in (2, 3) or min(values) <= 0):
                raise ValueError(f"{name} {list(values)}: two or three positive values are needed")
            if self.slices and values is not None and len(values) != 2:
                raise ValueError(f"{name} {list(values)}: a slice has two sides")
        if self.size and (fault := size_fault(self.size)):
            raise ValueError(f"size: {fault}")
        if self.patches and self.size and (fault := patch_fault(self.patches, self.size)):
            raise ValueError(
                f"patches {list(self.patches)}: data.size is {list(self.size)}, {fault}"
            )
        if self.spacing_mm and min(self.spacing_mm) < SMALLEST_SPACING:
            raise ValueError(
                f"spacing_mm {list(self.spacing_mm)}: {SMALLEST_SPACING:g} to {LARGEST_SPACING:g} "
                "mm are possible"
            )
        return self

    @model_validator(mode="after")
    def _can_have_holes(self) -> Self:
        if self.inpainting and self.source_channels:
            raise ValueError(
                f"inpainting and source_channels {list(self.source_channels)}: only one of them is "
                "possible, because holes are cut into all channels"
            )
        if self.inpainting and self.masks:
            raise ValueError(
                f"inpainting: channel {min(self.masks)} is a mask, and holes are cut into images: "
                "leave it out"
            )
        return self

    @property
    def preprocessing_key(self) -> dict[str, Any]:
        """The settings on which a preprocessed image depends."""
        kept = {"spacing_mm", "size", "fit", "intensity_range", "percentiles", "preprocessing"}
        kept |= {name for name in ("channels", "slices") if getattr(self, name)}
        return self.model_dump(mode="json", include=kept)

    def fixed_range(self, channel: int) -> tuple[str, tuple[float, float] | None]:
        """The intensities of a channel that become -1 and 1 in every image, and their key.

        None for a mask, and where each image has a range of its own.
        """
        stated = self.channels.get(channel)
        if stated is None:
            return "data.intensity_range", self.intensity_range
        if not isinstance(stated, ImageChannel):
            return "", None
        if stated.intensity_range:
            return f"data.channels.{channel}.intensity_range", stated.intensity_range
        own_range = stated.percentiles or stated.normalisation == "z_score"
        return "data.intensity_range", None if own_range else self.intensity_range

    @property
    def masks(self) -> dict[int, tuple[int, ...]]:
        """The classes of each channel of the images that is a mask."""
        return masks_of(self.channels)

    def selected(self, channels: Sequence[int]) -> Self:
        """The settings of images that have these channels alone, in this order."""
        parts = {
            place: self.channels[channel]
            for place, channel in enumerate(channels)
            if channel in self.channels
        }
        return self.model_copy(update={"channels": parts})

    def of_sources(self, channels: Sequence[int]) -> Self:
        """The settings of images that have a model's source channels alone, in this order.

        With holes these are the images themselves, emptied, and the mask of the holes.
        """
        settings = self.selected(channels)
        if not self.inpainting:
            return settings
        parts = {**settings.channels, len(channels) - 1: MaskChannel()}
        return settings.model_copy(update={"channels": parts})

    def targets(self, image: ImageSpec) -> list[int]:
        """The channels of its images that a model makes, of the training of which `image` is."""
        if self.inpainting:
            return list(range(image.channels))
        channels = range(image.channels + len(image.source_channels))
        return [channel for channel in channels if channel not in image.source_channels]

    @property
    def target_masks(self) -> dict[int, tuple[int, ...]]:
        """The same among the channels that the model makes, counted without source_channels."""
        return {
            channel - sum(source < channel for source in self.source_channels): classes
            for channel, classes in self.masks.items()
            if channel not in self.source_channels
        }


def patch_fault(patches: Sequence[int], shape: Sequence[int]) -> str:
    """What keeps images of `shape` (spatial axes) from having such patches; empty if they can."""
    if len(patches) != len(shape):
        return f"which has {len(shape)} sides: as many are needed"
    if all(part <= side for part, side in zip(patches, shape, strict=True)):
        return ""
    most = [min(pair) for pair in zip(patches, shape, strict=True)]
    return f"and a patch cannot be larger: at most {most}"


def trained_data_config(config: Mapping[str, Any], folder: Path) -> DataConfig:
    """The section `data` of a trained model's whole config; `folder` is that of the model."""
    section = dict(config["data"])
    where = f"The section data of {folder / 'config.yaml'}"
    return validated(section, DataConfig, where, ArtifactError, context=TRAINED)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image in the model's range, with its affine and source intensities."""

    tensor: torch.Tensor  # (C, *spatial), float32 in [-1, 1]
    affine: npt.NDArray[np.float64]  # (4, 4), voxel index to RAS+ mm
    intensity_range: tuple[tuple[float, float], ...]  # per channel, in the source's units
    source_range: tuple[tuple[float, float], ...] = ()  # likewise, its minimum and maximum
    row: int = 0  # of the manifest
    slice: int | None = None  # of a volume; None: it is the whole image


class Preprocessing:
    """The deterministic part: orientation, the user's transforms, spacing, size, intensity."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.masks = config.masks
        self.transforms = [transform.build() for transform in config.preprocessing]

    @property
    def keeps_intensities(self) -> bool:
        """Whether the user's transforms keep the 0 to 255 of a picture."""
        import torchio as tio

        return all(isinstance(step, tio.SpatialTransform) for step in self.transforms)

    def __call__(self, image: Image) -> Prepared:
        """`image` in the model's range; an ImageError if it is constant or a transform fails."""
        tensor, affine = self.placed(image)
        low, high = (end.tolist() for end in tensor.flatten(1).aminmax(dim=1))
        if not image.ranges:
            self._check_contrast(tensor)
        eight_bit = image.file_format == "png" and self.keeps_intensities
        ranges = image.ranges or self._ranges(tensor, eight_bit=eight_bit)
        tensor = self._rescaled(tensor, ranges)
        if tensor.shape[-1] == 1:
            tensor = tensor[..., 0]
        return Prepared(tensor.contiguous(), affine, ranges, tuple(zip(low, high, strict=True)))

    def images_of(self, image: Image, number: int | None = None) -> list[tuple[int | None, Image]]:
        """The image itself, or the slices of it that data.slices names, with their numbers.

        Slices are numbered from 0 in RAS: from the feet, the back or the left side. Each has two
        axes, in the order of RAS, and lies where it lay in the volume. Slices whose images are
        constant are left out. A 2D image is a slice already. What is done to whole images,
        orientation and transforms, is done to the volume, and percentiles are those of the volume:
        a slice without bright voxels stays as dark as it is.

        Args:
            number: of the only slice that is needed.

        Raises:
            ImageError: every slice is constant.
        """
        if not self.config.slices or image.tensor.shape[-1] == 1:
            return [(None, image)]
        volume, placed_volume = self._transformed(image)
        across = _ACROSS[self.config.slices]
        order = [axis for axis in range(3) if axis != across] + [across]
        tensor = volume.permute(0, *(axis + 1 for axis in order))
        affine = placed_volume[:, [*order, 3]]
        compared = [i for i in range(len(tensor)) if i not in self.masks] or [*range(len(tensor))]
        flat = tensor[compared].flatten(0, 2)  # (voxels of a slice, slices)
        varied = (flat.amax(dim=0) > flat.amin(dim=0)).nonzero().flatten().tolist()
        if not varied:
            raise ImageError("constant image: every slice is of one intensity")
        ranges = self._ranges(volume, eight_bit=False)
        slices = []
        for index in varied if number is None else [number]:
            placed = affine.copy()
            placed[:3, 3] += index * affine[:3, 2]
            cut = tensor[..., index : index + 1].contiguous()
            slices.append((index, replace(image, tensor=cut, affine=placed, ranges=ranges)))
        return slices

    def placed(self, image: Image, *, may_be_constant: bool = False) -> tuple[torch.Tensor, Affine]:
        """(C, X, Y, Z) before intensities are scaled, in source units, and its affine.

        Voxels of masks are of their classes, or an ImageError is raised.
        """
        if image.ranges:
            tensor, affine = image.tensor, image.affine
        else:
            tensor, affine = self._transformed(image)
        if not may_be_constant:
            self._check_contrast(tensor)  # resampling would turn a constant into noise
        tensor, affine = self._sized(tensor, affine)
        return require_classes(tensor, self.masks), affine

    def _transformed(self, image: Image) -> tuple[torch.Tensor, Affine]:
        """(C, X, Y, Z) in RAS and after the user's transforms, in source units; its affine."""
        import torchio as tio

        count = len(image.tensor)
        if beyond := [channel for channel in self.config.channels if channel >= count]:
            raise ImageError(
                f"the image has {count} channel(s), counted from 0; data.channels names {beyond[0]}"
            )
        masks = self.masks
        subject = subject_of(require_classes(image.tensor, masks), image.affine, masks)
        if image.tensor.shape[-1] > 1 and not image.raster:
            # Volumes are kept the same way round, whatever order their scanner stored them in.
            subject = tio.ToCanonical()(subject)
        for transform, settings in zip(self.transforms, self.config.preprocessing, strict=True):
            try:
                subject = transform(subject)
                tensor, _ = voxels_of(subject, masks)
            except (OSError, RuntimeError, ValueError) as error:
                raise ImageError(f"{settings.name} cannot be applied: {error}") from error
            if not tensor.numel():
                raise ImageError(f"{settings.name} cannot be applied: it leaves no voxels")
        return voxels_of(subject, masks)

    def _sized(self, tensor: torch.Tensor, affine: Affine) -> tuple[torch.Tensor, Affine]:
        size, spacing = self.config.size, self.config.spacing_mm
        if spacing:
            shape, spacing_before = tensor.shape[1:], spacing_of(affine)
            wanted = (*spacing, spacing_before[2])[:3]  # of a single slice, the thickness is kept
            steps = [
                new / old if voxels > 1 else 1.0
                for new, old, voxels in zip(wanted, spacing_before, shape, strict=True)
            ]
            sides = [max(1, round(n / step)) for n, step in zip(shape, steps, strict=True)]
            if fault := size_fault(sides, len(tensor)):
                raise ImageError(f"data.spacing_mm {list(spacing)}: {fault}")
            tensor, affine = resampled(tensor, affine, sides, steps, [*self.masks])
        if not size:
            return tensor, affine
        shape, target = tensor.shape[1:], (*size, 1)[:3]
        if (len(size) == 2 and shape[2] > 1) or (target[2] > 1 and shape[2] == 1):
            kind = f"a volume of {list(shape)}" if shape[2] > 1 else f"2D, {list(shape[:2])}"
            raise ImageError(f"data.size {list(size)} has {len(size)} sides, the image is {kind}")
        if self.config.fit == "crop_or_pad":
            backgrounds = {channel: classes[0] for channel, classes in self.masks.items()}
            return cropped_or_padded(tensor, affine, target, backgrounds)
        steps = [old / new for old, new in zip(shape, target, strict=True)]
        return resampled(tensor, affine, target, steps, [*self.masks])

    def _ranges(self, tensor: torch.Tensor, *, eight_bit: bool) -> tuple[tuple[float, float], ...]:
        return tuple(
            self._range_of(channel, voxels, eight_bit=eight_bit)
            for channel, voxels in enumerate(tensor)
        )

    def _rescaled(
        self, tensor: torch.Tensor, ranges: tuple[tuple[float, float], ...]
    ) -> torch.Tensor:
        for channel, classes in self.masks.items():
            tensor[channel] = class_indices(tensor[channel], classes)
        low, high = torch.tensor(ranges).reshape(-1, 2, 1, 1, 1).unbind(1)  # (C, 1, 1, 1) each
        return ((tensor - low) / (high - low) * 2 - 1).clamp(-1, 1)

    def _range_of(
        self, channel: int, voxels: torch.Tensor, *, eight_bit: bool
    ) -> tuple[float, float]:
        """The intensities of a channel that become -1 and 1; the places of a mask's classes."""
        if classes := self.masks.get(channel):
            return 0.0, len(classes) - 1.0
        stated = self.config.channels.get(channel)
        settings = stated if isinstance(stated, ImageChannel) else ImageChannel()
        _, fixed = self.config.fixed_range(channel)
        if fixed:
            return fixed
        if settings.normalisation == "z_score":
            mean, spread = float(voxels.double().mean()), float(voxels.double().std(correction=0))
            low, high = mean - _SPREADS * spread, mean + _SPREADS * spread
        elif eight_bit and not settings.percentiles:
            return _EIGHT_BIT
        else:
            percentiles = settings.percentiles or self.config.percentiles
            low, high = map(float, np.percentile(voxels.numpy(), percentiles))
            if low == high:  # nearly all background
                low, high = float(voxels.min()), float(voxels.max())
        if low == high:
            raise ImageError(f"constant channel: every voxel is {low:g}")
        return low, high

    def _check_contrast(self, tensor: torch.Tensor) -> None:
        images = [channel for channel in range(len(tensor)) if channel not in self.masks]
        if not images:
            return  # a mask may be all background
        voxels = tensor[images] if self.masks else tensor
        low, high = float(voxels.min()), float(voxels.max())
        if not low - high <= 0:
            raise ImageError("data.preprocessing leaves voxels that are not a number")
        if high - low <= 1e-6 * max(abs(low), abs(high)):  # rounding errors of float32 included
            raise ImageError(
                f"constant image: every voxel is {low:g}; leave it out of the manifest"
            )


def to_intensities(
    tensor: torch.Tensor, intensity_range: tuple[tuple[float, float], ...]
) -> torch.Tensor:
    """(C, *spatial) in [-1, 1] to the source's units, channel by channel."""
    ends = torch.tensor(intensity_range).reshape(-1, 2, *[1] * (tensor.ndim - 1))
    low, high = ends.unbind(1)
    return (tensor.float().cpu() + 1) / 2 * (high - low) + low
