"""Affines of images, and images on another grid at the same place in the world.

An affine is a (4, 4) matrix from voxel indices to RAS+ millimetres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube.schema import ImageSpec

Affine = npt.NDArray[np.float64]

PICTURE_AFFINE = ((-1.0, 0, 0, 0), (0, -1.0, 0, 0), (0, 0, 1.0, 0), (0, 0, 0, 1.0))
"""By convention, as in SimpleITK and TorchIO: x to the patient's left, y to the back, 1 mm."""


def spacing_of(affine: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Voxel size in mm along each axis, (..., 3), of one affine or a stack of them."""
    axes = np.asarray(affine, float)[..., :3, :3]
    spacing: npt.NDArray[np.float64] = np.linalg.norm(axes, axis=-2)
    return spacing


def centred_affine(spacing_mm: Sequence[float], size: Sequence[int]) -> Affine:
    """An upright affine whose origin is the centre of `size` voxels (two or three sides)."""
    spacing = np.array([*spacing_mm, 1.0, 1.0, 1.0][:3])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array([*size, 1][:3]) - 1) / 2 * spacing
    return affine


def generated_affine(affines: Affine, size: Sequence[int]) -> Affine:
    """The affine of a generated image, from those of the training images, (N, 4, 4).

    The one they share, else a centred one of their median spacing.
    """
    common: Affine = affines[0]
    if np.allclose(affines, common, atol=1e-4):
        return common
    return centred_affine(np.median(spacing_of(affines), axis=0).tolist(), size)


def affine_from(affine: Affine, start: Sequence[int]) -> Affine:
    """The affine of the part of an image whose first voxel is `start` (two or three numbers)."""
    moved: Affine = affine.copy()
    moved[:3, 3] += affine[:3, : len(start)] @ np.asarray(start)
    return moved


def placed_like(
    image: ImageSpec, affine: Affine, size: Sequence[int],
    intensity_range: npt.NDArray[np.float64] | None = None,
) -> ImageSpec:  # fmt: skip
    """`image` with affine and size (and intensities) of the one source image it is made from."""
    source = {"affine": affine.tolist(), "size": tuple(size)}
    if intensity_range is not None:
        source["intensity_range"] = intensity_range.tolist()
    return image.model_copy(update=source)


def as_rows(affine: Affine) -> tuple[tuple[float, ...], ...]:
    """An affine as :class:`ImageSpec` keeps it."""
    return tuple(map(tuple, affine.tolist()))


def resampled(
    tensor: torch.Tensor,
    affine: Affine,
    shape: Sequence[int],
    steps: Sequence[float],
    masks: Sequence[int] = (),
) -> tuple[torch.Tensor, Affine]:
    """`tensor` (C, X, Y, Z) on a grid of `shape` voxels, each `steps` old voxels wide.

    Both grids have the same centre. Interpolation is linear; where a step is longer than a
    voxel, the kernel is as wide as the step, so that nothing aliases. At the border the
    weights of what is inside are scaled up: nothing is filled in. A voxel of the channels
    `masks` is that of the nearest old one.
    """
    # Not TorchIO's Resample: its smoothing refuses pictures and volumes of less than four slices,
    # and a rounding error in the spacing costs it a voxel, which CropOrPad then fills with zeros.
    old_centre, new_centre = ((np.array(grid) - 1) / 2 for grid in (tensor.shape[1:], shape))
    moved = affine.copy()
    moved[:3, :3] = affine[:3, :3] * np.asarray(steps)
    moved[:3, 3] += affine[:3, :3] @ old_centre - moved[:3, :3] @ new_centre
    for axis, (new, step) in enumerate(zip(shape, steps, strict=True), start=1):
        old = tensor.shape[axis]
        if (old, 1.0) != (new, step):
            weights = _weights(old, new, step)
            nearest = tensor[list(masks)].index_select(axis, weights.argmax(dim=1))
            linear = torch.tensordot(tensor, weights.to(tensor), dims=([axis], [1]))
            tensor = linear.movedim(-1, axis)
            tensor[list(masks)] = nearest
    return tensor, moved


def cropped_or_padded(
    tensor: torch.Tensor, affine: Affine, shape: Sequence[int], backgrounds: Mapping[int, float]
) -> tuple[torch.Tensor, Affine]:
    """The middle of `tensor` (C, X, Y, Z); what is missing becomes each channel's minimum, or the
    background of a channel that has one."""
    import torchio as tio

    if tuple(tensor.shape[1:]) == tuple(shape):
        return tensor, affine
    # TorchIO pads all channels with one number, and zero is water in a CT, not air
    floor = tensor.amin(dim=(1, 2, 3), keepdim=True)
    for channel, background in backgrounds.items():
        floor[channel] = background
    image: Any = tio.ScalarImage(tensor=tensor - floor, affine=affine)
    fitted: Any = tio.CropOrPad(tuple(shape))(image)
    return fitted.data + floor, np.asarray(fitted.affine, dtype=float)


def _weights(old: int, new: int, step: float) -> torch.Tensor:
    """How much of each old voxel goes into each new one along an axis, (new, old)."""
    centres = (torch.arange(new, dtype=torch.float64) - (new - 1) / 2) * step + (old - 1) / 2
    distances = (centres[:, None] - torch.arange(old)).abs()
    weights = (1 - distances / max(step, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
