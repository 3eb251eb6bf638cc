"""Image files (NIfTI, PNG, JPEG, TIFF) to tensors and back, with true geometry."""

from __future__ import annotations

import gzip
import io
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import SimpleITK as sitk
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError
from nibabel.wrapstruct import WrapStructError

from synthcube.data.geometry import PICTURE_AFFINE, spacing_of
from synthcube.data.manifest import SUFFIXES, Row, image_suffix
from synthcube.environment import free_memory
from synthcube.errors import ImageError, OutputError, SynthCubeError
from synthcube.reading import open_file
from synthcube.schema import MAX_VOXELS, FileFormat, affine_fault
from synthcube.storage import write_with

Array = npt.NDArray[Any]
T = TypeVar("T")
_TOLERANCE_MM = 1e-3  # between the affines of one image's files: float32 in their headers


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


CONSTANT = "constant image"
_UNNAMED = Path("image")


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
        raw = bytes(image.to_bytes())
        write_with(path, lambda temporary: write_gzip(temporary, raw))
    else:
        raise ImageError(f"{path.name}: images are written as .png or .nii.gz only.")


def _voxels_of(path: Path, tensor: torch.Tensor) -> Array:
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


_BOMBS = (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError)
# What decoders raise at damaged files. Not Exception: a bug of ours must not pass for damage.
_DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, ArithmeticError, LookupError, RuntimeError),
    TypeError,  # Pillow, at a TIFF whose tags have the wrong type
    *(zlib.error, struct.error),
    *(HeaderDataError, HeaderTypeError, ImageDataError, ImageFileError, WrapStructError),
)


def _read_file(path: Path) -> _FileImage:
    suffix = image_suffix(path)
    if not suffix:
        raise ImageError(f"{path} is not a known image; its name ends in {', '.join(SUFFIXES)}.")
    if not path.exists():
        raise ImageError(f"{path} is missing.")
    if path.is_file() and not path.stat().st_size:
        raise ImageError(f"{path} is empty (0 bytes); copy or export it again.")
    with decoding(path, suffix):
        file = _read_nifti(path) if suffix.startswith(".nii") else _read_raster(path)
    check_finite(path, file.voxels)
    return file


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


def _check_agreement(path: Path, file: _FileImage, other_path: Path, other: _FileImage) -> None:
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


def _difference(file: _FileImage, other: _FileImage) -> str:
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


def check_finite(path: Path, voxels: Array) -> None:
    """Raise an ImageError if a voxel is NaN or infinite."""
    if np.isfinite(voxels).all():
        return
    undefined, infinite = int(np.isnan(voxels).sum()), int(np.isinf(voxels).sum())
    raise ImageError(
        f"{path} holds {undefined} NaN and {infinite} infinite voxels of {voxels.size} "
        "(infinite in float32); replace them by numbers."
    )


def write_gzip(path: Path, raw: bytes | bytearray) -> None:
    """Write `raw` packed, without name and time in the header: the same bytes, the same file."""
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=file, mtime=0) as packed,
    ):
        packed.write(raw)


@dataclass(frozen=True, slots=True)
class _FileImage:
    """The channels of one file, with the properties that its format states."""

    voxels: Array  # (C, X, Y, Z) float32
    affine: Array  # (4, 4) float64, voxel index to RAS+ millimetres
    eight_bit: bool  # a picture of 8 bits or fewer, which a PNG holds without loss
    integer: bool  # intensities are whole numbers
    raster: bool  # a picture: no true geometry


_SMALL_BYTES = 1 << 26  # what every machine has
_BYTES_BESIDE = 8  # of a voxel, beside the file's own: float32, and a copy of it


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


MAX_CHANNELS_4D = 4
"""A fourth axis that is longer is taken for a time series, not for channels."""
_HEADER_SIZES = {348: nib.Nifti1Image, 540: nib.Nifti2Image}  # the first field of the file
_MAX_EXTENSIONS = 1 << 26  # bytes before the voxels
_MAX_TRAILING = 1 << 20  # bytes after them, which every reader ignores
_SCANNER = 1  # form code: millimetres in the coordinates of the scanner
_INTEGERS = (np.uint8, np.int16, np.int32)


def nifti_image(path: Path) -> Any:
    """The nibabel image in a .nii or .nii.gz, of which no more is read than its header says."""
    with open_file(path, ImageError) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return _unpacked(path, gzip.GzipFile(fileobj=file) if packed else file)


def _read_nifti(path: Path) -> _FileImage:
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
    return _FileImage(voxels, affine, eight_bit=False, integer=whole or coloured, raster=False)


def _unpacked(path: Path, file: BinaryIO | gzip.GzipFile) -> Any:
    """The image in an unpacked file, of which no more is read than its header says."""
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


def nifti_header(path: Path, file: BinaryIO | gzip.GzipFile) -> tuple[Any, Any, bytes]:
    """The kind of a NIfTI image, its header, and the bytes that were read from the unpacked file.

    Raises ImageError unless it is a NIfTI image with a possible shape.
    """
    start = file.read(max(_HEADER_SIZES))
    sizes = (int.from_bytes(start[:4], order) for order in ("little", "big"))
    size, kind = next(
        ((size, _HEADER_SIZES[size]) for size in sizes if size in _HEADER_SIZES), (0, None)
    )
    if kind is None:
        raise ImageError(f"{path} is not a NIfTI image, whatever its name says.")
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


def nifti_of(
    tensor: torch.Tensor,
    affine: npt.ArrayLike,
    *,
    integer: bool = False,
    path: Path = _UNNAMED,
) -> nib.Nifti1Image:
    """The NIfTI-1 image of which :func:`write_image` writes the bytes; it takes the same."""
    voxels, matrix = _voxels_of(path, tensor), np.asarray(affine, dtype=np.float64)
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


def _check_affine(path: Path, affine: Array) -> None:
    """Raise an ImageError unless `affine` is an invertible 4x4 matrix of possible voxel sizes."""
    if fault := affine_fault(affine.tolist()):
        raise ImageError(
            f"{path} has an affine that cannot be used, {affine.tolist()}: {fault}; correct its "
            "header."
        )


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


# Pillow's mode -> the mode that is read: grey stays grey, colour stays colour, alpha is dropped.
# A palette is colour even where its colours happen to be grey: one data set, one channel count.
_MODES = {
    **dict.fromkeys(("1", "L", "LA"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBA", "RGBX"), "RGB"),
    **{mode: mode for mode in ("I", "I;16", "I;16L", "I;16B", "F")},
}


def _read_raster(path: Path) -> _FileImage:
    """Read a picture; the pages of a TIFF become its slices, an EXIF rotation is applied."""
    with (
        open_file(path, ImageError) as file,
        PIL.Image.open(file, formats=("PNG", "JPEG", "TIFF")) as picture,
    ):
        pages = getattr(picture, "n_frames", 1)
        if picture.format == "PNG" and pages > 1:
            raise ImageError(f"{path} is an animation of {pages} pictures; store one per file.")
        channels = len(picture.getbands())
        check_declared(path, (*picture.size, pages, channels), 1)
        if _has_deep_colour(picture):
            picture.load()  # finds out if it was cut short
            stack = _deep_colour(path)
        else:
            stack = _stack(path, picture, pages if picture.format == "TIFF" else 1)
    return _FileImage(
        np.ascontiguousarray(stack.transpose(3, 2, 1, 0), dtype=np.float32),
        np.array(PICTURE_AFFINE),
        eight_bit=stack.dtype == np.uint8,
        integer=stack.dtype.kind in "iu",
        raster=True,
    )


def _stack(path: Path, picture: PIL.Image.Image, pages: int) -> Array:
    frames = []
    for page in range(pages):
        picture.seek(page)
        check_declared(path, (*picture.size, pages, len(picture.getbands())), 1)
        mode = _MODES.get(picture.mode)
        if mode is None:
            raise ImageError(
                f"{path} has the colour mode {picture.mode}; save it as grey, RGB or RGBA."
            )
        upright = PIL.ImageOps.exif_transpose(picture)
        frame = np.asarray(upright if upright.mode == mode else upright.convert(mode))
        frames.append(frame.reshape(*frame.shape[:2], -1))  # (Y, X, C)
    kinds = {(frame.shape, frame.dtype.str) for frame in frames}
    if len(kinds) > 1:
        sizes = ", ".join(sorted(f"{x} x {y}, {c} channels" for (y, x, c), _ in kinds))
        raise ImageError(
            f"{path} has pages that differ ({sizes}); store one page per file. If it is a whole "
            "slide, synthcube prepare --patch_size 256 cuts it."
        )
    return np.stack(frames)  # (Z, Y, X, C)


def _has_deep_colour(picture: PIL.Image.Image) -> bool:
    """Whether Pillow would cut several 16-bit channels down to 8 bits."""
    tile = getattr(picture, "tile", None)
    arguments = tile[0].args if tile else ""
    raw_mode = arguments if isinstance(arguments, str) else str((arguments or ("",))[0])
    return ";16" in raw_mode and not picture.mode.startswith("I")


def _deep_colour(path: Path) -> Array:
    image = sitk.ReadImage(str(path))
    pixels = sitk.GetArrayFromImage(image)
    pixels = pixels[None] if image.GetDimension() == 2 else pixels
    return np.asarray(pixels[..., :3])  # (Z, Y, X, C)


def picture_of(tensor: torch.Tensor, path: Path = _UNNAMED) -> PIL.Image.Image:
    """An 8-bit picture of (C, X, Y) intensities, rounded and clipped to 0..255.

    Args:
        tensor: of 1 channel (grey) or 3 (colour).
        path: named by the ImageError about an image that is no picture.
    """
    voxels = _voxels_of(path, tensor)
    channels, _, _, depth = voxels.shape
    if depth > 1 or channels not in (1, 3):
        raise ImageError(
            f"{path.name}: a PNG holds 2D images of 1 or 3 channels, this one has {channels} "
            f"and {depth} slices; write it as .nii.gz."
        )
    pixels = np.rint(voxels[..., 0]).clip(0, 255).astype(np.uint8).transpose(2, 1, 0)
    return PIL.Image.fromarray(pixels if channels == 3 else pixels[..., 0])
