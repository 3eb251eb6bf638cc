"""TorchIO transforms for names of GaNDLF, adapted to images in [-1, 1] and to 2D.

Each takes the arguments of the class it extends. Training images are in [-1, 1] when they are
augmented, and 2D ones have a third axis of one voxel: what assumes intensities from 0 up, or a
certain size along each axis, is adapted to the image here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torchio as tio

_Range = tuple[float, float]


class Threshold(tio.MonaiAdapter):
    """Voxels not above `threshold` (not below it, where `above` is false) become `cval`."""

    def __init__(self, threshold: float, above: bool = True, cval: float = 0.0, **kwargs: Any):
        from monai.transforms import ThresholdIntensity

        super().__init__(ThresholdIntensity(threshold, above, cval), **kwargs)


class ZeroPlanesCrop(tio.SpatialTransform):
    """Cuts off the outer planes in which every voxel of every channel is 0."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        inside = (subject.get_first_image().data != 0).any(dim=0)  # (X, Y, Z)
        if not inside.any():
            return subject
        places = inside.nonzero()  # (N, 3)
        before, after = places.amin(dim=0), torch.tensor(inside.shape) - 1 - places.amax(dim=0)
        margins = torch.stack([before, after], dim=1).flatten().tolist()
        return tio.Crop(tuple(margins), **self._get_base_args())(subject)


class PositiveNormalization(tio.ZNormalization):
    """Zero mean and unit deviation of the voxels above 0."""

    def __init__(self, **kwargs: Any):
        super().__init__(masking_method=_positive, **kwargs)


class NonzeroNormalization(tio.ZNormalization):
    """Zero mean and unit deviation of the voxels that are not 0."""

    def __init__(self, **kwargs: Any):
        super().__init__(masking_method=_nonzero, **kwargs)


class HistogramStandardization(tio.HistogramStandardization):
    """Brings the histogram to `landmarks`: numbers, as TorchIO's own reads them from a file."""

    def __init__(self, landmarks: Sequence[float], **kwargs: Any):
        super().__init__({"default_image_name": np.asarray(landmarks, dtype=float)}, **kwargs)


class BoundedElasticDeformation(tio.RandomElasticDeformation):
    """Displaces by at most half the distance of control points, beyond which tissue folds."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        image = subject.get_first_image()
        sides, points = np.array(image.spatial_shape), np.array(self.num_control_points)
        distance_mm = sides * np.array(image.spacing) / (points - 3)  # of cubic splines
        limit = np.where(sides > 1, 0.45 * distance_mm, 0)  # below a half: ITK rounds
        settings: Any = self._get_base_args()
        bounded = tio.RandomElasticDeformation(
            num_control_points=self.num_control_points,
            max_displacement=tuple(np.minimum(self.max_displacement, limit).tolist()),
            locked_borders=self.num_locked_borders,
            image_interpolation=self.image_interpolation,
            **settings,
        )
        return bounded(subject)


class KSpaceArtifact(tio.OneOf):
    """Ghosting or a spike in k-space, one of them in each image."""

    def __init__(self, **kwargs: Any):
        super().__init__([tio.RandomGhosting(), tio.RandomSpike()], **kwargs)


class GammaFromBlack(tio.RandomGamma):
    """Gamma over the image's own range: TorchIO's counts from 0, mid-grey in [-1, 1]."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        return _over_own_range(subject, self.get_images, super().apply_transform)


class BiasFieldFromBlack(tio.RandomBiasField):
    """Bias field over the image's own range: black stays black, as where no signal is."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        return _over_own_range(subject, self.get_images, super().apply_transform)


class RelativeNoise(tio.RandomNoise):
    """Gaussian noise whose `std` is a share of the image's own standard deviation."""

    def __init__(self, mean: float | _Range = 0, std: float | _Range = (0, 0.015), **kwargs: Any):
        super().__init__(mean=mean, std=std, **kwargs)

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        deviation = float(subject.get_first_image().data.std())
        low, high = self.std_range
        noise = tio.RandomNoise(
            mean=self.mean_range, std=(low * deviation, high * deviation), **self._get_base_args()
        )
        return noise(subject)


class BoundedSwap(tio.RandomSwap):
    """Swaps patches of at most half of each side: a larger one leaves no place to swap with."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        halves = np.maximum(np.array(subject.spatial_shape) // 2, 1)
        if halves.max() == 1:
            return subject
        swap = tio.RandomSwap(
            patch_size=tuple(np.minimum(self.patch_size, halves).tolist()),
            num_iterations=self.num_iterations,
            **self._get_base_args(),
        )
        return swap(subject)


class PlanarAnisotropy(tio.RandomAnisotropy):
    """Coarser along one axis that has more than one voxel."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        axes = tuple(axis for axis in self.axes if subject.spatial_shape[axis] > 1)
        if not axes:
            return subject
        settings: Any = self._get_base_args()
        coarsening = tio.RandomAnisotropy(
            axes=axes,
            downsampling=self.downsampling_range,
            image_interpolation=self.image_interpolation,
            **settings,
        )
        return coarsening(subject)


class QuarterTurn(tio.SpatialTransform):
    """Turns by 90 degrees about one of the axes `axis`, voxel by voxel, without interpolation."""

    turns = 1

    def __init__(self, axis: int | Sequence[int] = 2, p: float = 0.5, **kwargs: Any):
        super().__init__(p=p, **kwargs)
        self.axes = [axis] if isinstance(axis, int) else list(axis)
        if not self.axes or not set(self.axes) <= {0, 1, 2}:
            raise ValueError(f"axis must be 0, 1 or 2, or a list of them, not {axis}")

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        axis = self.axes[int(torch.randint(len(self.axes), (1,)))]
        plane = [1 + other for other in range(3) if other != axis]  # after the channels
        for image in self.get_images(subject):
            image.set_data(torch.rot90(image.data, self.turns, plane))
        return subject


class HalfTurn(QuarterTurn):
    """Turns by 180 degrees about one of the axes `axis`, voxel by voxel."""

    turns = 2


def _positive(voxels: torch.Tensor) -> torch.Tensor:
    return voxels > 0


def _nonzero(voxels: torch.Tensor) -> torch.Tensor:
    return voxels != 0


def _over_own_range(
    subject: tio.Subject,
    images_of: Callable[[tio.Subject], list[Any]],
    apply: Callable[[tio.Subject], tio.Subject],
) -> tio.Subject:
    """`apply` with intensities scaled to [0, 1] before, and scaled back after."""
    ranges = []
    for image in images_of(subject):
        low, high = float(image.data.min()), float(image.data.max())
        image.set_data((image.data - low) / ((high - low) or 1))
        ranges.append((low, high))
    changed = apply(subject)
    for image, (low, high) in zip(images_of(changed), ranges, strict=True):
        image.set_data(image.data * (high - low) + low)
    return changed
