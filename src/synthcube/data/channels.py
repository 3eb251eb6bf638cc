"""What one image file holds: what the readers of the formats hand to :mod:`.images`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Channels:
    """The channels of one file, and what its format says of them."""

    voxels: Array  # (C, X, Y, Z) float32
    affine: Array  # (4, 4) float64, voxel index to RAS+ millimetres
    eight_bit: bool  # a picture of 8 bits or fewer, which a PNG holds without loss
    integer: bool  # intensities are whole numbers
    raster: bool  # a picture: no true geometry
