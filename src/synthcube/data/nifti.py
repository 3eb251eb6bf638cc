"""NIfTI files to channels and back.

Read with nibabel and not with SimpleITK (TorchIO's first choice), which fills up a file that
was cut short with arbitrary voxels and says nothing, takes the qform where the sform differs,
and refuses or silently straightens a sheared affine. For sound files both give the same.
"""

from __future__ import annotations

import gzip
import io
import math
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from synthcube.data.channels import Array, Channels, check_declared
from synthcube.errors import ImageError
from synthcube.reading import open_file
from synthcube.schema import affine_fault

MAX_CHANNELS_4D = 4
"""A fourth axis that is longer is taken for a time series, not for channels."""

_HEADER_SIZES = {348: nib.Nifti1Image, 540: nib.Nifti2Image}  # the first field of the file
_MAX_EXTENSIONS = 1 << 26  # bytes before the voxels
_MAX_TRAILING = 1 << 20  # bytes after them, which every reader ignores
_MILLIMETRES = "mm"
_SCANNER = 1  # form code: millimetres in the coordinates of the scanner
_INTEGERS = (np.uint8, np.int16, np.int32)


def read_nifti(path: Path) -> Channels:
    """Read a .nii or .nii.gz of 2 to 5 axes; its scale factors are applied.

    Raises:
        ImageError: it is no NIfTI, complex, a time series, or its affine is singular.
        Exception: whatever a damaged file makes gzip or nibabel raise.
    """
    with open_file(path, ImageError) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        image = _read_image(path, gzip.GzipFile(fileobj=file) if packed else file)
    proxy: Any = image.dataobj
    coloured = bool(proxy.dtype.names)
    if proxy.dtype.kind == "c":
        raise ImageError(f"{path} holds complex numbers; export the magnitude as real numbers.")
    data = np.asarray(proxy, dtype=None if coloured else np.float32)
    affine = np.asarray(image.affine, dtype=np.float64)
    check_affine(path, affine)
    whole = proxy.dtype.kind in "iu" and all(
        float(factor).is_integer() for factor in (proxy.slope, proxy.inter)
    )
    voxels = np.ascontiguousarray(_channels_first(path, data), dtype=np.float32)
    return Channels(voxels, affine, eight_bit=False, integer=whole or coloured, raster=False)


def _read_image(path: Path, file: BinaryIO | gzip.GzipFile) -> Any:
    """The image in an unpacked file, of which no more is read than its header says."""
    start = file.read(max(_HEADER_SIZES))
    sizes = (int.from_bytes(start[:4], order) for order in ("little", "big"))
    size, kind = next(
        ((size, _HEADER_SIZES[size]) for size in sizes if size in _HEADER_SIZES), (0, None)
    )
    if kind is None:
        raise ImageError(f"{path} is not a NIfTI image, whatever its name says.")
    header = kind.header_class.from_fileobj(io.BytesIO(start[:size]))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if min(shape, default=0) < 0:
        raise ImageError(f"{path} has a damaged header: its shape is {shape}.")
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


def nifti_bytes(voxels: Array, affine: Array, integer: bool) -> bytes:
    """An uncompressed NIfTI-1 file; see :func:`.images.write_image` for the representation.

    Args:
        voxels: (C, X, Y, Z), finite.
        affine: (4, 4), voxel index to RAS+ millimetres, invertible.
        integer: round, and store as the smallest integer type that fits.
    """
    data = voxels[0] if len(voxels) == 1 else np.moveaxis(voxels, 0, -1)[:, :, :, None]
    image = nib.Nifti1Image(_stored(data, integer), affine)
    # both forms, as readers differ in which they prefer; shears are in the sform only
    image.set_sform(affine, code=_SCANNER)
    image.set_qform(affine, code=_SCANNER)
    image.header.set_xyzt_units(_MILLIMETRES)
    if len(voxels) > 1:
        image.header.set_intent("vector")
    return bytes(image.to_bytes())


def check_affine(path: Path, affine: Array) -> None:
    """Refuse what is not an invertible 4x4 matrix, or makes voxels of an impossible size.

    Raises:
        ImageError: with the matrix.
    """
    if fault := affine_fault(affine.tolist()):
        raise ImageError(
            f"{path} has an affine that cannot be used, {affine.tolist()}: {fault}; correct its "
            "header."
        )


def _stored(data: Array, integer: bool) -> Array:
    if not integer:
        return data.astype(np.float32)
    rounded = np.rint(data)
    low, high = float(rounded.min()), float(rounded.max())
    for dtype in _INTEGERS:
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return rounded.astype(dtype)
    return rounded.astype(np.float32)


def _channels_first(path: Path, data: Array) -> Array:
    """Any array that a NIfTI file can hold, as (C, X, Y, Z)."""
    if data.dtype.names:  # RGB24 or RGBA32: a record for each voxel; alpha is dropped
        return np.concatenate([_channels_first(path, data[n]) for n in data.dtype.names[:3]])
    shape = data.shape
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim < 2 or not data.size:
        raise ImageError(f"{path} has the shape {shape}; two or three spatial axes are needed.")
    if data.ndim <= 3:
        return data.reshape(1, *data.shape[:2], -1)
    if data.ndim == 5 and data.shape[3] == 1:  # the standard's place for vectors
        return np.moveaxis(data[:, :, :, 0], -1, 0)
    if data.ndim == 4 and data.shape[3] <= MAX_CHANNELS_4D:
        return np.moveaxis(data, -1, 0)
    raise ImageError(
        f"{path} has the shape {shape}: a time series, or more than {MAX_CHANNELS_4D} channels; "
        "split it into 3D files, one per time point (a row each) or per channel (a column each)."
    )
