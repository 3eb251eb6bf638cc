"""Image files to tensors and back, with true geometry.

Axes are those of NIfTI and TorchIO: the first tensor axis is the first axis of the NIfTI
array; in a picture (PNG, JPEG, TIFF) the first axis runs to the right, the second down.
"""

from __future__ import annotations

import gzip
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError
from nibabel.wrapstruct import WrapStructError

from synthcube.data.channels import Array, Channels
from synthcube.data.manifest import SUFFIXES, image_suffix
from synthcube.data.nifti import check_affine, nifti_bytes, read_nifti
from synthcube.data.raster import picture_of, read_raster
from synthcube.errors import ImageError
from synthcube.schema import FileFormat
from synthcube.storage import write_with

_BOMBS = (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError)
# What decoders raise at damaged files. Not Exception: our own fault is not to pass for damage.
_DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, ArithmeticError, LookupError, RuntimeError),
    TypeError,  # Pillow, at a TIFF whose tags have the wrong type
    *(zlib.error, struct.error),
    *(HeaderDataError, HeaderTypeError, ImageDataError, ImageFileError, WrapStructError),
)
_TOLERANCE_MM = 1e-3  # between the affines of one image's files: float32 in their headers


@dataclass
class Image:
    """One image in source intensities."""

    tensor: torch.Tensor  # (C, X, Y, Z) float32, Z = 1 for 2D
    affine: Array  # (4, 4) float64, voxel index to RAS+ millimetres
    file_format: FileFormat  # "png" for a 2D picture of 8 bits (PNG, JPEG, TIFF)
    integer: bool  # whether the source's intensities are whole numbers
    raster: bool  # a picture: its affine is a convention, not a measurement


def read_image(paths: Sequence[Path]) -> Image:
    """Read the files of one image and stack their channels.

    RGB gives three channels, alpha is dropped; grey and colour are never turned into each other.

    Raises:
        ImageError: a file is missing, damaged, of another kind than its name says, a time
            series, or holds NaN or infinite voxels; or the files differ in shape or affine.
    """
    if not paths:
        raise ImageError("An image needs at least one file, none was given.")
    files = [_read_file(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        _check_agreement(paths[0], files[0], path, file)
    tensor = torch.from_numpy(np.concatenate([file.voxels for file in files]))
    is_picture = all(file.eight_bit for file in files) and tensor.shape[-1] == 1
    return Image(
        tensor=tensor,
        affine=files[0].affine,
        file_format="png" if is_picture else "nii.gz",
        integer=all(file.integer for file in files),
        raster=files[0].raster,
    )


def image_fault(path: Path) -> str:
    """Why a file cannot be used as an image, or an empty text."""
    try:
        tensor = read_image([path]).tensor
    except ImageError as error:
        return str(error).removeprefix(f"{path} ")
    low, high = float(tensor.min()), float(tensor.max())
    return f"constant image: every voxel is {low:g}" if low == high else ""


def write_image(
    path: Path, tensor: torch.Tensor, affine: npt.ArrayLike, *, integer: bool = False
) -> None:
    """Write an image in source intensities so that every reader gets the same voxels back.

    A ``.png`` is rounded and clipped to 0..255; it holds no affine. A ``.nii.gz`` is float32,
    or with `integer` the smallest of uint8, int16 and int32 that fits. Several channels,
    RGB among them, become the 5D vector of the NIfTI standard, (X, Y, Z, 1, C) with intent
    "vector", which nibabel, SimpleITK, TorchIO and :func:`read_image` all read as C channels
    (of a single slice, SimpleITK and TorchIO forget where the slice lies). The same image
    gives the same bytes.

    Args:
        path: ends in .png (2D, 1 or 3 channels) or .nii.gz.
        tensor: (C, X, Y) or (C, X, Y, Z); 2D becomes (X, Y, 1) in NIfTI.
        affine: (4, 4), voxel index to RAS+ millimetres.
        integer: whether intensities are whole numbers; they are rounded.

    Raises:
        ImageError: the tensor does not fit the format, or holds NaN or infinite values.
        OutputError: `path` cannot be written.
    """
    voxels = tensor.detach().cpu().float().numpy()
    voxels = voxels[..., None] if voxels.ndim == 3 else voxels
    if voxels.ndim != 4 or not voxels.size:
        raise ImageError(
            f"{path.name}: an image of shape {tuple(tensor.shape)} cannot be written; "
            "(C, X, Y) or (C, X, Y, Z) is needed."
        )
    _check_finite(path, voxels)
    suffix = image_suffix(path)
    if suffix == ".png":
        picture = picture_of(path, voxels)
        write_with(path, lambda temporary: picture.save(temporary, format="PNG"))
    elif suffix == ".nii.gz":
        matrix = np.asarray(affine, dtype=np.float64)
        check_affine(path, matrix)
        raw = nifti_bytes(voxels, matrix, integer)
        write_with(path, lambda temporary: _write_gzip(temporary, raw))
    else:
        raise ImageError(f"{path.name}: images are written as .png or .nii.gz only.")


def _read_file(path: Path) -> Channels:
    suffix = image_suffix(path)
    if not suffix:
        raise ImageError(f"{path} is not a known image; its name ends in {', '.join(SUFFIXES)}.")
    if not path.exists():
        raise ImageError(f"{path} is missing.")
    if path.is_file() and not path.stat().st_size:
        raise ImageError(f"{path} is empty (0 bytes); copy or export it again.")
    try:
        # decoders warn and log in their own words; whatever matters is said below, once
        with warnings.catch_warnings(), LoggingOutputSuppressor(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            file = read_nifti(path) if suffix.startswith(".nii") else read_raster(path)
    except _BOMBS as error:
        raise ImageError(
            f"{path} has more than {PIL.Image.MAX_IMAGE_PIXELS} pixels, as a file would that is "
            "made to fill the memory: cut it into smaller pictures."
        ) from error
    except _DAMAGE as error:
        raise ImageError(f"{path} {_reason(error, suffix)}; copy or export it again.") from error
    _check_finite(path, file.voxels)
    return file


def _reason(error: Exception, suffix: str) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return f"is not a {suffix} image, whatever its name says"
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
        return "is cut short or damaged: its compressed data cannot be read to the end"
    if isinstance(error, PermissionError):
        return "cannot be read: permission denied"
    text = str(error).strip() or type(error).__name__
    return f"is cut short or damaged ({text.splitlines()[0]})"


def _check_agreement(path: Path, file: Channels, other_path: Path, other: Channels) -> None:
    size, other_size = file.voxels.shape[1:], other.voxels.shape[1:]
    if size != other_size:
        raise ImageError(
            f"{path} has the size {size}, but {other_path} has {other_size}; "
            "the channels of one image must be on the same grid."
        )
    if not np.allclose(file.affine, other.affine, rtol=0, atol=_TOLERANCE_MM):
        raise ImageError(
            f"{path} and {other_path} lie differently in space, their affines are "
            f"{file.affine.tolist()} and {other.affine.tolist()}; "
            "resample the channels of one image to the same grid."
        )


def _check_finite(path: Path, voxels: Array) -> None:
    if np.isfinite(voxels).all():
        return
    undefined, infinite = int(np.isnan(voxels).sum()), int(np.isinf(voxels).sum())
    raise ImageError(
        f"{path} holds {undefined} NaN and {infinite} infinite voxels of {voxels.size} "
        "(infinite in float32); replace them by numbers."
    )


def _write_gzip(path: Path, raw: bytes) -> None:
    # neither name nor time in the header: the same image is the same file
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=file, mtime=0) as packed,
    ):
        packed.write(raw)
