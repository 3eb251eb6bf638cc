"""Pictures of images for people: upright, and in one grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch

from synthcube.errors import ImageError
from synthcube.storage import write_with

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)

MIN_TILE = 96  # pixels: a smaller tile is enlarged by a whole factor
GAP = 2  # pixels between tiles
PLANES = ("sagittal", "coronal", "axial")
_PLANE_AXES = ((1, 2), (0, 2), (0, 1))  # of each plane: the axis to the right, the axis up
_PLANE_GAP = 1  # between the planes or channels of one tile
_BACKGROUND = (64, 64, 96)  # not grey: no part of an image is mistaken for it
_NOT_A_NUMBER = (255, 0, 255)


def grid(
    images: Sequence[torch.Tensor],
    columns: int | None = None,
    *,
    raster: bool = True,
    spacing_mm: Sequence[float] | None = None,
) -> PIL.Image.Image:
    """One RGB picture of all images, row by row. Raises ImageError.

    A 2D image is shown with x to the right; 3 channels are colours, others stand side by
    side. A volume is shown by its middle sagittal, coronal and axial planes, left to right,
    scaled to one height, front or head up and the patient's right on the left; its channels
    stand side by side. Voxels that are NaN are magenta.

    Args:
        images: each (C, X, Y) or (C, X, Y, Z) in [-1, 1]; values beyond are clipped.
        columns: tiles in a row; chosen so that the grid is about square where it is None.
        raster: 2D images have y down, as in a PNG; otherwise y up, as in RAS. Volumes are RAS.
        spacing_mm: voxel size along each axis, 1 mm where it is None.
    """
    if not images:
        raise ImageError("There is no image to show.")
    tiles = [_tile(image, raster, spacing_mm) for image in images]
    height = max(tile.shape[0] for tile in tiles)
    width = max(tile.shape[1] for tile in tiles)
    if columns is None:
        columns = round(math.sqrt(len(tiles) * height / width))
    columns = min(max(columns, 1), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    canvas = _canvas(rows * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return PIL.Image.fromarray(canvas)


def plane_of(
    image: torch.Tensor, plane: str = "axial", *, spacing_mm: Sequence[float] | None = None
) -> PIL.Image.Image:
    """One pixel a voxel: a 2D image, or the middle plane of a volume, head or front up.

    Grey; channels stand side by side. Where voxels are not square, the shorter side is a pixel.

    Args:
        image: (C, X, Y) or (C, X, Y, Z) in [-1, 1], RAS; values beyond are clipped.
        plane: of a volume: sagittal, coronal or axial.
        spacing_mm: voxel size along each axis, 1 mm where it is None.

    Raises:
        ImageError: there is no such plane.
    """
    if plane not in PLANES:
        raise ImageError(f"plane is {plane!r}: use {', '.join(PLANES)}.")
    voxels = image.detach().cpu().float().numpy()
    spacing = [*(spacing_mm or ()), 1.0, 1.0, 1.0]
    index = PLANES.index(plane) if voxels.ndim == 4 else PLANES.index("axial")
    right, up = _PLANE_AXES[index]
    pixel = min(spacing[right], spacing[up])
    cuts = [
        middle_planes(channel)[index] if voxels.ndim == 4 else channel.T[::-1] for channel in voxels
    ]
    rows, columns = cuts[0].shape
    size = (
        max(1, round(rows * spacing[up] / pixel)),
        max(1, round(columns * spacing[right] / pixel)),
    )
    return PIL.Image.fromarray(_beside(_resized(_grey(cut), size) for cut in cuts)).convert("L")


def save_grid(
    path: Path,
    images: Sequence[torch.Tensor],
    columns: int | None = None,
    *,
    raster: bool = True,
    spacing_mm: Sequence[float] | None = None,
) -> None:
    """Write :func:`grid` as a PNG in one step; it raises the same errors, and OutputError."""
    picture = grid(images, columns, raster=raster, spacing_mm=spacing_mm)
    write_with(path, lambda temporary: picture.save(temporary, format="PNG"))


def _tile(image: torch.Tensor, raster: bool, spacing_mm: Sequence[float] | None) -> Pixels:
    voxels = image.detach().cpu().float().numpy()
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    if voxels.ndim != 4 or not voxels.size:
        raise ImageError(
            f"An image of shape {tuple(image.shape)} cannot be shown; "
            "(C, X, Y) or (C, X, Y, Z) is needed."
        )
    spacing = [*(() if spacing_mm is None else map(float, spacing_mm)), 1.0, 1.0, 1.0][:3]
    if voxels.shape[-1] > 1:
        return _beside(plane for channel in voxels for plane in _planes(channel, spacing))
    flat = voxels[..., 0].transpose(0, 2, 1)  # (C, Y, X)
    flat = flat if raster else flat[:, ::-1]
    planes = [_colours(flat)] if len(flat) == 3 else [_grey(channel) for channel in flat]
    height, width = flat.shape[1:]
    size = _enlarged(height * spacing[1], width * spacing[0], min(spacing[:2]))
    return _beside(_resized(plane, size) for plane in planes)


def middle_planes(volume: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Middle sagittal, coronal and axial plane of an (X, Y, Z) volume, head or front up."""
    x, y, z = (side // 2 for side in volume.shape)
    return [plane.T[::-1] for plane in (volume[x], volume[:, y], volume[:, :, z])]


def _planes(volume: npt.NDArray[Any], spacing: Sequence[float]) -> list[Pixels]:
    """Middle sagittal, coronal and axial plane of an (X, Y, Z) volume, all of one height."""
    extent = [side * step for side, step in zip(volume.shape, spacing, strict=True)]
    cuts = [
        (cut, right, up)
        for cut, (right, up) in zip(middle_planes(volume), _PLANE_AXES, strict=True)
    ]
    pixel = min(spacing)
    sizes = [_enlarged(extent[up], extent[right], pixel) for _, right, up in cuts]
    height = max(size[0] for size in sizes)
    planes = []
    for cut, right, up in cuts:
        width = max(1, round(height * extent[right] / extent[up]))
        planes.append(_resized(_grey(cut), (height, width)))
    return planes


def _enlarged(height: float, width: float, pixel: float) -> tuple[int, int]:
    """Pixels for a plane of that many millimetres: the shorter side at least MIN_TILE."""
    rows, columns = max(1, round(height / pixel)), max(1, round(width / pixel))
    factor = math.ceil(MIN_TILE / min(rows, columns))
    return rows * factor, columns * factor


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Nearest neighbour: voxels stay visible as what they are."""
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    picture = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize((width, height), PIL.Image.Resampling.NEAREST))


def _grey(plane: npt.NDArray[Any]) -> Pixels:
    return _colours(np.stack([plane] * 3))


def _colours(planes: npt.NDArray[Any]) -> Pixels:
    """(3, height, width) in [-1, 1] to pixels."""
    colours = np.nan_to_num(planes, nan=0, posinf=1, neginf=-1)
    pixels: Pixels = np.rint((colours.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    pixels[np.isnan(planes).any(axis=0)] = _NOT_A_NUMBER
    return pixels


def _beside(planes: Iterable[Pixels]) -> Pixels:
    """Planes of one height, left to right."""
    strip: list[Pixels] = []
    for plane in planes:
        if strip:
            strip.append(_canvas(len(plane), _PLANE_GAP))
        strip.append(plane)
    return np.concatenate(strip, axis=1)


def _canvas(height: int, width: int) -> Pixels:
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[:] = _BACKGROUND
    return canvas
