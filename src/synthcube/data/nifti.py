"""NIfTI files: of 2 to 5 axes, in grey, colour and several channels, read and written."""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from synthcube.data.image_files import UNNAMED, Array, FileImage, check_declared, voxels_of
from synthcube.errors import ImageError
from synthcube.reading import open_file
from synthcube.schema import affine_fault
from synthcube.storage import write_with

MAX_CHANNELS_4D = 4
"""A fourth axis that is longer is taken for a time series, not for channels."""
_HEADER_SIZES = {348: nib.Nifti1Image, 540: nib.Nifti2Image}  # the first field of the file
_MAX_EXTENSIONS = 1 << 26  # bytes before the voxels
_MAX_TRAILING = 1 << 20  # bytes after them, which every reader ignores
_SCANNER = 1  # form code: millimetres in the coordinates of the scanner
_INTEGERS = (np.uint8, np.int16, np.int32)


def read_nifti(path: Path) -> FileImage:
    """Read a .nii or .nii.gz of 2 to 5 axes; its scale factors are applied."""
    image = nifti_image(path)
    proxy: Any = image.dataobj
    coloured = bool(proxy.dtype.names)
    if proxy.dtype.kind == "c":
        raise ImageError(f"{path} holds complex numbers; export the magnitude as real numbers.")
    data = np.asarray(proxy, dtype=None if coloured else np.float32)
    affine = np.asarray(image.affine, dtype=np.float64)
    _check_affine(path, affine)
    whole = proxy.dtype.kind in "iu" and all(
        float(factor).is_integer() for factor in (proxy.slope, proxy.inter)
    )
    voxels = np.ascontiguousarray(_channels_first(path, data), dtype=np.float32)
    return FileImage(voxels, affine, eight_bit=False, integer=whole or coloured, raster=False)


def nifti_image(path: Path) -> Any:
    """The nibabel image in a .nii or .nii.gz, of which no more is read than its header says."""
    with open_file(path, ImageError) as opened:
        file = unpacked(opened)
        kind, header, start = nifti_header(path, file)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        _check_axes(path, shape)
        offset = float(header["vox_offset"])
        if not 0 <= offset <= _MAX_EXTENSIONS:
            raise ImageError(f"{path} has a damaged header: its voxels begin at byte {offset:g}.")
        check_declared(path, shape, dtype.itemsize)
        expected = int(offset) + math.prod(shape) * dtype.itemsize
        raw = start + file.read(max(0, expected - len(start)))
        rest = _MAX_TRAILING
        while rest > 0 and (piece := file.read(1 << 16)):  # to the end: its checksum is compared
            rest -= len(piece)
        if rest <= 0:
            raise ImageError(
                f"{path} holds far more than the image of shape {shape} that its header describes; "
                "export it again."
            )
        return kind.from_bytes(raw)


def unpacked(file: BinaryIO) -> BinaryIO | gzip.GzipFile:
    """`file` from its start, unpacked where it begins as gzip does."""
    is_packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_packed else file


def nifti_header(path: Path, file: BinaryIO | gzip.GzipFile) -> tuple[Any, Any, bytes]:
    """The kind of a NIfTI image, its header, and the bytes that were read from the unpacked file.

    Raises ImageError unless it is a NIfTI image with a possible shape.
    """
    start = file.read(max(_HEADER_SIZES))
    sizes = (int.from_bytes(start[:4], order) for order in ("little", "big"))
    size = next((size for size in sizes if size in _HEADER_SIZES), None)
    if size is None:
        raise ImageError(f"{path} is not a NIfTI image, whatever its name says.")
    kind = _HEADER_SIZES[size]
    header = kind.header_class.from_fileobj(io.BytesIO(start[:size]))
    if min(shape := header.get_data_shape(), default=0) < 0:
        raise ImageError(f"{path} has a damaged header: its shape is {shape}.")
    return kind, header, start


def _channels_first(path: Path, data: Array) -> Array:
    """Any array that a NIfTI file can hold, as (C, X, Y, Z)."""
    if data.dtype.names:  # RGB24 or RGBA32: a record for each voxel; alpha is dropped
        return np.concatenate([_channels_first(path, data[n]) for n in data.dtype.names[:3]])
    data = data.reshape(axes_of(data.shape))
    if data.ndim <= 3:
        return data.reshape(1, *data.shape[:2], -1)
    if data.ndim == 5:  # the standard's place for vectors
        return np.moveaxis(data[:, :, :, 0], -1, 0)
    return np.moveaxis(data, -1, 0)


def axes_of(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape of a NIfTI file without the axes of length 1 at its end, beyond the third."""
    axes = tuple(shape)
    while len(axes) > 3 and axes[-1] == 1:
        axes = axes[:-1]
    return axes


def _check_axes(path: Path, shape: Sequence[int]) -> None:
    axes = axes_of(shape)
    if len(axes) < 2 or not math.prod(axes):
        raise ImageError(f"{path} has the shape {shape}; two or three spatial axes are needed.")
    is_vector = len(axes) == 5 and axes[3] == 1
    if len(axes) > 3 and not is_vector and (len(axes) > 4 or axes[3] > MAX_CHANNELS_4D):
        raise ImageError(
            f"{path} has the shape {shape}: volumes in time, or more than {MAX_CHANNELS_4D} "
            "channels. Of volumes in time, synthcube prepare --volume mean (or first, a number, "
            "each) writes 3D files; channels go into a 3D file each (a column each)."
        )


def _check_affine(path: Path, affine: Array) -> None:
    """Raise an ImageError unless `affine` is an invertible 4x4 matrix of possible voxel sizes."""
    if fault := affine_fault(affine.tolist()):
        raise ImageError(
            f"{path} has an affine that cannot be used, {affine.tolist()}: {fault}; correct its "
            "header."
        )


def nifti_of(
    tensor: torch.Tensor, affine: npt.ArrayLike, *, integer: bool = False, path: Path = UNNAMED
) -> nib.Nifti1Image:
    """The NIfTI-1 image of which :func:`write_image` writes the bytes; it takes the same."""
    voxels, matrix = voxels_of(path, tensor), np.asarray(affine, dtype=np.float64)
    _check_affine(path, matrix)
    data = voxels[0] if len(voxels) == 1 else np.moveaxis(voxels, 0, -1)[:, :, :, None]
    image = nib.Nifti1Image(stored(data, integer), matrix)
    # both forms, as readers differ in which they prefer; shears are in the sform only
    image.set_sform(matrix, code=_SCANNER)
    image.set_qform(matrix, code=_SCANNER)
    image.header.set_xyzt_units("mm")
    if len(voxels) > 1:
        image.header.set_intent("vector")
    return image


def stored(data: Array, integer: bool) -> Array:
    """The voxels in the type in which they are written; see :func:`write_image`."""
    if not integer:
        return data.astype(np.float32)
    rounded = np.rint(data)
    low, high = float(rounded.min()), float(rounded.max())
    for dtype in _INTEGERS:
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return rounded.astype(dtype)
    return rounded.astype(np.float32)


def write_gzip(path: Path, raw: bytes | bytearray) -> None:
    """Write `raw` packed in one step, with no name or time in the header: same bytes, same file."""

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=file, mtime=0) as packed,
        ):
            packed.write(raw)

    write_with(path, write)
