"""Images as a report shows them: upright, in [0, 1], a volume by its three middle slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def plane(image: Array, bounds: Sequence[tuple[float, float]], *, raster: bool) -> Array:
    """(H, W), or (H, W, 3) where a 2D image has three channels; the first axis runs down.

    A volume is its middle sagittal, coronal and axial slice, left to right; channels that are no
    colours stand side by side.

    Args:
        image: (C, X, Y) or (C, X, Y, Z).
        bounds: intensities shown as 0 and 1, for each channel; what is beyond is clipped.
        raster: a picture, whose second axis runs down; others have it upwards, as in RAS.
    """
    low, high = (np.array([pair[end] for pair in bounds], np.float32) for end in (0, 1))
    shape = (-1, *[1] * (image.ndim - 1))
    width = np.maximum(high - low, np.finfo(np.float32).tiny)
    scaled = ((image - low.reshape(shape)) / width.reshape(shape)).clip(0, 1)
    if image.ndim == 4:
        return _beside([cut for channel in scaled for cut in _cuts(channel)])
    upright = scaled.transpose(0, 2, 1) if raster else scaled.transpose(0, 2, 1)[:, ::-1]
    return np.moveaxis(upright, 0, -1) if len(upright) == 3 else _beside(list(upright))


def _cuts(volume: Array) -> list[Array]:
    x, y, z = (side // 2 for side in volume.shape)
    return [cut.T[::-1] for cut in (volume[x], volume[:, y], volume[:, :, z])]


def _beside(planes: list[Array]) -> Array:
    height = max(each.shape[0] for each in planes)
    padded = [np.pad(each, ((0, height - each.shape[0]), (0, 0))) for each in planes]
    return np.ascontiguousarray(np.concatenate(padded, axis=1), np.float32)
