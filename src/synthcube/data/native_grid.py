"""Images written on the grid, and with the header, of the NIfTI file that they were made of."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from synthcube.data.nifti import nifti_image, stored, write_gzip

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

_ROUNDED = 9  # decimals of a voxel: where grids agree, so do their voxels, to the bit


def on_grid(
    image: torch.Tensor, affine: npt.ArrayLike, shape: tuple[int, ...], grid: npt.ArrayLike
) -> tuple[Floats, Bools]:
    """An image at the same place in the world on another grid, (X, Y, Z), linearly interpolated.

    A voxel beyond the image has its lowest intensity, as padding has in the preprocessing. Where
    the new voxels are old ones, whatever the order of the axes, intensities stay as they are.

    Args:
        image: (X, Y) or (X, Y, Z).
        affine: (4, 4), its voxel index to RAS+ millimetres.
        shape: of the other grid, three sides.
        grid: the affine of that grid.

    Returns:
        The voxels, and which of them lie within the image.
    """
    from scipy import ndimage

    voxels = image.numpy().astype(np.float32)
    voxels = voxels[..., None] if voxels.ndim == 2 else voxels
    steps = np.linalg.solve(np.asarray(affine, float), np.asarray(grid, float))
    steps = np.round(steps, _ROUNDED)
    inside = np.ones(shape, bool)
    axes = np.ogrid[tuple(slice(side) for side in shape)]
    for axis, side in enumerate(voxels.shape):
        place = steps[axis, 3] + sum(steps[axis, i] * axes[i] for i in range(3))
        inside &= (place >= -0.5) & (place <= side - 0.5)
    placed = ndimage.affine_transform(
        voxels, steps[:3, :3], steps[:3, 3], output_shape=shape, order=1, mode="nearest"
    )
    placed[~inside] = voxels.min()
    return placed, inside


def write_filled(path: Path, source: Path, voxels: Floats, where: Bools) -> None:
    """Write the NIfTI file `source` with other voxels in some places; every other byte is the same.

    Intensities are stored as those of the source are: scaled, and rounded and clipped to its
    integers.

    Args:
        path: the .nii.gz to write.
        voxels: (X, Y, Z), in the source's intensities.
        where: (X, Y, Z), the voxels to replace.
    """
    image = nifti_image(source)
    proxy = image.dataobj
    raw = bytearray(image.file_map["image"].fileobj.getvalue())
    content = np.frombuffer(raw, proxy.dtype, math.prod(proxy.shape), proxy.offset)
    content = content.reshape(proxy.shape, order="F")
    values = (voxels[where].astype(np.float64) - proxy.inter) / proxy.slope
    if proxy.dtype.kind in "iu":
        limits = np.iinfo(proxy.dtype)
        values = np.rint(values).clip(limits.min, limits.max)
    content[where.reshape(proxy.shape)] = values
    write_gzip(path, raw)


def write_like(path: Path, source: Path, voxels: Floats, *, integer: bool) -> None:
    """Write voxels, (X, Y, Z), as a .nii.gz that lies where the NIfTI file `source` does.

    Affine, codes, units and voxel sizes are those of its header; its texts and extensions, which
    tell of another image, are not taken over.

    Args:
        integer: whether intensities are whole numbers.
    """
    image = nifti_image(source)
    header = image.header.copy()
    header.extensions.clear()
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        if name in header:
            header[name] = b""
    for name in ("cal_min", "cal_max", "intent_code", "scl_slope", "scl_inter"):
        header[name] = 0
    data = stored(voxels, integer)
    header.set_data_dtype(data.dtype)
    write_gzip(path, bytes(type(image)(data, image.affine, header).to_bytes()))
