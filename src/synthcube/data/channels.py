"""What one image file holds: what the readers of the formats hand to :mod:`.images`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from synthcube.errors import ImageError
from synthcube.runtime import free_memory
from synthcube.schema import MAX_VOXELS

Array = npt.NDArray[Any]

_SMALL_BYTES = 1 << 26  # what every machine has
_BYTES_BESIDE = 8  # of a voxel, beside the file's own: float32, and a copy of it


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels of one file, and what its format says of them."""

    voxels: Array  # (C, X, Y, Z) float32
    affine: Array  # (4, 4) float64, voxel index to RAS+ millimetres
    eight_bit: bool  # a picture of 8 bits or fewer, which a PNG holds without loss
    integer: bool  # intensities are whole numbers
    raster: bool  # a picture: no true geometry


def check_declared(path: Path, shape: Sequence[int], itemsize: int) -> None:
    """Refuse an image by its header, before its voxels are read.

    Args:
        itemsize: bytes of a voxel in the file.

    Raises:
        ImageError: it is larger than an image may be, or than the memory that is free.
    """
    text = " x ".join(map(str, shape))
    if math.prod(shape) > MAX_VOXELS:
        raise ImageError(
            f"{path} is {text} by its header; an image may have {MAX_VOXELS} voxels at most."
        )
    needed = math.prod(shape) * (itemsize + _BYTES_BESIDE)
    if needed > _SMALL_BYTES and needed > (free := free_memory()):
        raise ImageError(
            f"{path} is {text} by its header and needs {needed / 1e9:.1f} GB to be read; "
            f"{free / 1e9:.1f} GB of memory are free."
        )
