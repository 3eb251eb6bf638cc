"""Images on another grid, at the same place in the world.

Not with TorchIO's Resample: its smoothing refuses pictures and volumes of less than four slices,
and a rounding error in the spacing costs it a voxel, which CropOrPad then fills with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Affine = npt.NDArray[np.float64]


def resampled(
    tensor: torch.Tensor, affine: Affine, shape: Sequence[int], steps: Sequence[float]
) -> tuple[torch.Tensor, Affine]:
    """`tensor` (C, X, Y, Z) on a grid of `shape` voxels, each `steps` old voxels wide.

    Both grids have the same centre. Interpolation is linear; where a step is longer than a
    voxel, the kernel is as wide as the step, so that nothing aliases. At the border the
    weights of what is inside are scaled up: nothing is filled in.
    """
    old_centre, new_centre = ((np.array(grid) - 1) / 2 for grid in (tensor.shape[1:], shape))
    moved = affine.copy()
    moved[:3, :3] = affine[:3, :3] * np.asarray(steps)
    moved[:3, 3] += affine[:3, :3] @ old_centre - moved[:3, :3] @ new_centre
    for axis, (new, step) in enumerate(zip(shape, steps, strict=True), start=1):
        old = tensor.shape[axis]
        if (old, 1.0) != (new, step):
            weights = _weights(old, new, step).to(tensor)
            tensor = torch.tensordot(tensor, weights, dims=([axis], [1])).movedim(-1, axis)
    return tensor, moved


def cropped_or_padded(
    tensor: torch.Tensor, affine: Affine, shape: Sequence[int]
) -> tuple[torch.Tensor, Affine]:
    """The middle of `tensor` (C, X, Y, Z); what is missing becomes each channel's minimum."""
    import torchio as tio

    if tuple(tensor.shape[1:]) == tuple(shape):
        return tensor, affine
    # TorchIO pads all channels with one number, and zero is water in a CT, not air
    floor = tensor.amin(dim=(1, 2, 3), keepdim=True)
    image: Any = tio.ScalarImage(tensor=tensor - floor, affine=affine)
    fitted: Any = tio.CropOrPad(tuple(shape))(image)
    return fitted.data + floor, np.asarray(fitted.affine, dtype=float)


def _weights(old: int, new: int, step: float) -> torch.Tensor:
    """How much of each old voxel goes into each new one along an axis, (new, old)."""
    centres = (torch.arange(new, dtype=torch.float64) - (new - 1) / 2) * step + (old - 1) / 2
    distances = (centres[:, None] - torch.arange(old)).abs()
    weights = (1 - distances / max(step, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)
