"""What the readers and writers of image files share: checks, and errors of decoders in words."""

from __future__ import annotations

import gzip
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError
from nibabel.wrapstruct import WrapStructError

from synthcube.environment import free_memory
from synthcube.errors import ImageError
from synthcube.schema import MAX_VOXELS

Array = npt.NDArray[Any]
UNNAMED = Path("image")
_BOMBS = (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError)
# What decoders raise at damaged files. Not Exception: a bug of ours must not pass for damage.
_DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, ArithmeticError, LookupError, RuntimeError),
    TypeError,  # Pillow, at a TIFF whose tags have the wrong type
    *(zlib.error, struct.error),
    *(HeaderDataError, HeaderTypeError, ImageDataError, ImageFileError, WrapStructError),
)
_SMALL_BYTES = 1 << 26  # what every machine has
_BYTES_BESIDE = 8  # of a voxel, beside the file's own: float32, and a copy of it


@dataclass(frozen=True, slots=True)
class FileImage:
    """The channels of one file, with the properties that its format states."""

    voxels: Array  # (C, X, Y, Z) float32
    affine: Array  # (4, 4) float64, voxel index to RAS+ millimetres
    eight_bit: bool  # a picture of 8 bits or fewer, which a PNG holds without loss
    integer: bool  # intensities are whole numbers
    raster: bool  # a picture: no true geometry


@contextmanager
def decoding(path: Path, suffix: str) -> Iterator[None]:
    """Within this context what a decoder raises at a damaged file is an :class:`ImageError`."""
    try:
        # decoders warn and log in their own words; whatever matters is said below, once
        with warnings.catch_warnings(), LoggingOutputSuppressor(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            yield
    except _BOMBS as error:
        raise ImageError(
            f"{path} has more than {PIL.Image.MAX_IMAGE_PIXELS} pixels, as a file would that is "
            "made to fill the memory: cut it into smaller pictures."
        ) from error
    except _DAMAGE as error:
        raise ImageError(f"{path} {_reason(error, suffix)}; copy or export it again.") from error


def _reason(error: Exception, suffix: str) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"is not a {suffix} image, whatever its name says"
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return "is cut short or damaged: its compressed data cannot be read to the end"
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied"
    text = str(error).strip() or type(error).__name__
    return f"is cut short or damaged ({text.splitlines()[0]})"


def check_declared(path: Path, shape: Sequence[int], itemsize: int) -> None:
    """Raise an ImageError if an image is too large by its header, before its voxels are read.

    `itemsize` is the number of bytes of a voxel in the file.
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


def check_finite(path: Path, voxels: Array) -> None:
    """Raise an ImageError if a voxel is NaN or infinite."""
    if np.isfinite(voxels).all():
        return
    undefined, infinite = int(np.isnan(voxels).sum()), int(np.isinf(voxels).sum())
    raise ImageError(
        f"{path} holds {undefined} NaN and {infinite} infinite voxels of {voxels.size} "
        "(infinite in float32); replace them by numbers."
    )


def voxels_of(path: Path, tensor: torch.Tensor) -> Array:
    """The finite voxels of an image, (C, X, Y, Z)."""
    voxels = tensor.detach().cpu().float().numpy()
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    if voxels.ndim != 4 or not voxels.size:
        raise ImageError(
            f"{path.name}: an image of shape {tuple(tensor.shape)} cannot be written; "
            "(C, X, Y) or (C, X, Y, Z) is needed."
        )
    check_finite(path, voxels)
    return voxels
