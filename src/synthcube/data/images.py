"""Image files (NIfTI, PNG, JPEG, TIFF) to tensors and back, with true geometry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from synthcube.data.geometry import spacing_of
from synthcube.data.image_files import Array, FileImage, check_finite, decoding
from synthcube.data.manifest import SUFFIXES, Row, image_suffix
from synthcube.data.nifti import nifti_of, read_nifti, write_gzip
from synthcube.data.raster import picture_of, read_raster
from synthcube.errors import ImageError, OutputError, SynthCubeError
from synthcube.schema import FileFormat
from synthcube.storage import write_with

T = TypeVar("T")
_TOLERANCE_MM = 1e-3  # between the affines of one image's files: float32 in their headers
CONSTANT = "constant image"


@dataclass
class Image:
    """One image in source intensities."""

    tensor: torch.Tensor  # (C, X, Y, Z) float32, Z = 1 for 2D
    affine: Array  # (4, 4) float64, voxel index to RAS+ millimetres
    file_format: FileFormat  # "png" for a 2D picture of 8 bits (PNG, JPEG, TIFF)
    integers: tuple[bool, ...]  # of each channel: whether the source stores whole numbers
    raster: bool  # a picture: its affine is a convention, not a measurement
    ranges: tuple[tuple[float, float], ...] = ()
    """Of a slice of a transformed volume: for each channel, the range of the whole volume."""

    @property
    def integer(self) -> bool:
        """Whether the source's intensities are whole numbers."""
        return all(self.integers)


def read_image(paths: Sequence[Path]) -> Image:
    """Read the files of one image and stack their channels. Raises ImageError.

    RGB gives three channels, alpha is dropped; grey and colour are never turned into each other.
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
        integers=tuple([file.integer for file in files for _ in file.voxels]),
        raster=files[0].raster,
    )


def read_images(
    rows: Iterable[Row], use: Callable[[Row, Image], T], faults: dict[Row, str]
) -> Iterator[tuple[Row, T]]:
    """Each row with what `use` returns for its image; rows that fail go to `faults` instead."""
    files: tuple[Path, ...] = ()
    for row in rows:
        try:
            if row.channels != files:  # else another slice of the same volume
                image, files = read_image(row.channels), row.channels
            outcome = use(row, image)
        except OutputError:
            raise
        except SynthCubeError as error:
            text = "; ".join([error.headline, *error.faults])
            names_it = any(str(path) in text for path in row.channels)
            faults[row] = text if names_it else f"{row.channels[0]}: {text}"
        else:
            yield row, outcome


def image_fault(path: Path) -> str:
    """Why a file cannot be used as an image, or an empty text."""
    try:
        tensor = read_image([path]).tensor
    except ImageError as error:
        return str(error).removeprefix(f"{path} ")
    low, high = float(tensor.min()), float(tensor.max())
    return f"{CONSTANT}: every voxel is {low:g}" if low == high else ""


def write_image(
    path: Path,
    tensor: torch.Tensor,
    affine: npt.ArrayLike,
    *,
    integer: bool = False,
    description: str = "",
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
        description: of at most 79 bytes, in the header of a .nii.gz.
    """
    suffix = image_suffix(path)
    if suffix == ".png":
        picture = picture_of(tensor, path)
        write_with(path, lambda temporary: picture.save(temporary, format="PNG"))
    elif suffix == ".nii.gz":
        image = nifti_of(tensor, affine, integer=integer, path=path)
        image.header["descrip"] = description.encode()
        write_gzip(path, bytes(image.to_bytes()))
    else:
        raise ImageError(f"{path.name}: images are written as .png or .nii.gz only.")


def _read_file(path: Path) -> FileImage:
    suffix = image_suffix(path)
    if not suffix:
        raise ImageError(f"{path} is not a known image; its name ends in {', '.join(SUFFIXES)}.")
    if not path.exists():
        raise ImageError(f"{path} is missing.")
    if path.is_file() and not path.stat().st_size:
        raise ImageError(f"{path} is empty (0 bytes); copy or export it again.")
    with decoding(path, suffix):
        file = read_nifti(path) if suffix.startswith(".nii") else read_raster(path)
    check_finite(path, file.voxels)
    return file


def _check_agreement(path: Path, file: FileImage, other_path: Path, other: FileImage) -> None:
    size, other_size = file.voxels.shape[1:], other.voxels.shape[1:]
    if size != other_size:
        raise ImageError(
            f"{path} has the size {size}, but {other_path} has {other_size}; "
            "the channels of one image must be on the same grid."
        )
    if not np.allclose(file.affine, other.affine, rtol=0, atol=_TOLERANCE_MM):
        raise ImageError(
            f"{path} and {other_path} lie differently in space: {_difference(file, other)}; "
            "resample the channels of one image to the same grid."
        )


def _difference(file: FileImage, other: FileImage) -> str:
    """What the geometry of two files differs in, rounded so that it fits a line."""
    parts = {
        "spacing": (spacing_of(file.affine), spacing_of(other.affine)),
        "origin": (file.affine[:3, 3], other.affine[:3, 3]),
    }
    for name, (first, second) in parts.items():
        if not np.allclose(first, second, rtol=0, atol=_TOLERANCE_MM):
            first, second = np.round(first, 3).tolist(), np.round(second, 3).tolist()
            return f"the {name} is {first} and {second} mm"
    return "the axes point in other directions"
