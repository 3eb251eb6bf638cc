"""Slices of a DICOM series in order, and the affine of the volume that they are.

DICOM has millimetres to the patient's left and back (LPS), an affine here those to the right and
the front (RAS), see :mod:`synthcube.data.geometry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from synthcube.data.geometry import Affine
from synthcube.errors import ImageError

_Vector = npt.NDArray[np.float64]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_RIGHT_ANGLE = 1e-3  # most that the directions of rows and columns may differ from unit vectors
_SAME_DIRECTION = 1e-3
_SAME_SPACING_MM = 1e-4
_SAME_PLACE_MM = 1e-3
# Shares of the distance of slices. Positions are often rounded to 0.01 or 0.1 mm.
_UNEVEN = 0.05
_TILTED = 0.01  # a shift of each slice against the one before: 0.6 degrees


@dataclass(frozen=True, slots=True)
class Plane:
    """Where a slice lies, as DICOM says it."""

    position: tuple[float, ...]
    """Centre of the first pixel, (3,) in LPS millimetres."""
    orientation: tuple[float, ...]
    """Direction of the rows, then of the columns, (6,) in LPS."""
    spacing: tuple[float, ...]
    """Distance of the rows, then of the columns, in mm."""


def stacked(planes: Sequence[Plane], thickness: float = 0.0) -> tuple[list[int], Affine]:
    """The order of slices along their normal, and the affine of the volume (X, Y, Z) in RAS.

    Args:
        thickness: size in mm of a voxel across a single slice; 0: not known, and it becomes 1.

    Raises:
        ImageError: they are no volume; the text says why, without a path.
    """
    _check_alike(planes)
    row, column = _directions(planes[0])
    normal = np.cross(row, column)
    positions = np.array([plane.position for plane in planes], dtype=float)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    if len(planes) > 1:
        step = (positions[-1] - positions[0]) / (len(planes) - 1)
        _check_stack(positions, normal, step)
    else:
        step = normal * (thickness or 1.0)
    between_rows, between_columns = planes[0].spacing
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * between_columns, column * between_rows, step], axis=1)
    affine[:3, 3] = positions[0]
    return order.tolist(), LPS_TO_RAS @ affine


def flat_affine(spacing: Sequence[float] | None) -> Affine:
    """The affine of a picture without a place in space: x to the left, y to the back.

    Args:
        spacing: distance of the rows, then of the columns, in mm; None: it becomes 1.
    """
    between_rows, between_columns = spacing or (1.0, 1.0)
    return LPS_TO_RAS @ np.diag([between_columns, between_rows, 1.0, 1.0])


def _check_alike(planes: Sequence[Plane]) -> None:
    first = planes[0]
    spacing = np.array([plane.spacing for plane in planes])
    if (spacing <= 0).any() or not np.isfinite(spacing).all():
        raise ImageError("PixelSpacing holds numbers that are not above 0")
    if np.abs(spacing - spacing[0]).max() > _SAME_SPACING_MM:
        raise ImageError("the slices have different pixel spacings")
    numbers = [*first.position, *first.orientation]
    if not np.isfinite(numbers).all():
        raise ImageError("the place of its slices is not a number")
    directions = np.array([plane.orientation for plane in planes])
    if np.abs(directions - directions[0]).max() > _SAME_DIRECTION:
        raise ImageError(
            f"its {len(planes)} slices have mixed orientations, as those of a localizer have"
        )


def _directions(plane: Plane) -> tuple[_Vector, _Vector]:
    row, column = np.array(plane.orientation, dtype=float).reshape(2, 3)
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    off = max(abs(lengths[0] - 1), abs(lengths[1] - 1), abs(row @ column))
    if not off <= _RIGHT_ANGLE:
        raise ImageError("ImageOrientationPatient is not two directions at a right angle")
    return row / lengths[0], column / lengths[1]


def _check_stack(positions: _Vector, normal: _Vector, step: _Vector) -> None:
    """Raise an ImageError unless slices in order are evenly spaced along their normal."""
    gaps = np.diff(positions @ normal)
    if not np.isfinite(gaps).all():
        raise ImageError("the place of its slices is not a number")
    number = len(positions)
    if twice := int((gaps < _SAME_PLACE_MM).sum()):
        raise ImageError(
            f"{twice} of its {number} slices lie where another one does, as in a series of several "
            "time points, echoes or b-values"
        )
    usual = float(np.median(gaps))
    if len(gaps) > 1 and (wide := np.flatnonzero(gaps > (2 - 0.3) * usual)).size:
        missing = int(np.round(gaps[wide] / usual - 1).sum())
        raise ImageError(
            f"{missing} slice{'s are' if missing > 1 else ' is'} missing: after slice "
            f"{wide[0] + 1} of {number} is a gap of {gaps[wide[0]]:.4g} mm, else of {usual:.4g} mm"
        )
    if np.abs(gaps - usual).max() > _UNEVEN * usual:
        raise ImageError(
            f"the distance of its slices is uneven: {gaps.min():.4g} to {gaps.max():.4g} mm"
        )
    sideways = float(np.linalg.norm(step - normal * (step @ normal)))
    if sideways > _TILTED * usual:
        angle = np.degrees(np.arctan2(sideways, step @ normal))
        raise ImageError(
            f"the gantry was tilted by {angle:.1f} degrees: its slices are shifted against each "
            "other, which resampling to upright slices would undo"
        )
    straight = positions[0] + np.arange(number)[:, None] * step
    if np.linalg.norm(positions - straight, axis=1).max() > max(_UNEVEN * usual, _SAME_PLACE_MM):
        raise ImageError("its slices are shifted against each other")
