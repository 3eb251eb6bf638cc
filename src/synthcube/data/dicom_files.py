"""Single DICOM files: what their headers say, and their pixels in their own units.

No text of a header, and none of pydicom's messages, which quote them, is in any message here.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from synthcube.data.dicom_geometry import Plane
from synthcube.data.manifest import dicom_start
from synthcube.errors import ImageError
from synthcube.reading import open_file

if TYPE_CHECKING:
    from pydicom import Dataset

Array = npt.NDArray[Any]

NEEDS_EXTRA = "reading DICOM needs pydicom: pip install 'synthcube[dicom]'"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber",
    "InstanceNumber", "PatientID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
    "ImagerPixelSpacing", "SliceThickness", "SpacingBetweenSlices", "BitsStored",
    "BurnedInAnnotation",
]  # fmt: skip
_JPEG_12_BITS, _RLE = "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.5"
# Objects that hold pixels which are no image of the body.
_NO_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "a dose of radiotherapy",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "a whole-slide image",
}


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a file before its pixels are read."""

    path: Path
    patient: str
    """Identifies a person: it is compared and hashed, and never shown."""
    series: str
    instance: str
    series_number: int
    number: int
    size: tuple[int, int]  # rows, columns
    frames: int
    is_colour: bool
    bits: int
    plane: Plane | None  # of a single frame that has a place in space
    spacing: tuple[float, ...] | None  # of the rows and the columns, where known
    thickness: float  # 0: not known


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context pydicom neither warns nor logs: it would quote names and dates."""
    import pydicom.config

    logger = logging.getLogger("pydicom")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def is_readable() -> bool:
    """Whether pydicom is installed."""
    return find_spec("pydicom") is not None


def read_header(path: Path) -> Header:
    """The header of a file that is an image; called within :func:`quiet`.

    Raises:
        ImageError: it is none; the text says why, without a path.
    """
    start = dicom_start(path)
    if not start:
        raise ImageError("it does not begin as DICOM does (DICM after 128 bytes); export it again")
    if _DEFLATED in start:  # it would be unpacked to any size at once
        raise ImageError("its header is packed (deflated); export it uncompressed")
    dataset = _read(path, "its header", specific_tags=[*_TAGS], stop_before_pixels=True)
    try:
        return _header(path, dataset)
    except damage() as error:
        raise ImageError("cut short or damaged: its header holds impossible values") from error


def damage() -> tuple[type[Exception], ...]:
    """What pydicom and its decoders raise at damaged files.

    Not Exception: a bug of ours must not pass for damage.
    """
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(OSError, EOFError, ValueError, ArithmeticError, LookupError, RuntimeError, TypeError),
        *(AttributeError, AssertionError, zlib.error, struct.error),
        *(BytesLengthException, InvalidDicomError),
    )


def _read(path: Path, what: str, **options: Any) -> Dataset:
    from pydicom import dcmread

    try:
        with open_file(path, ImageError) as file:
            return dcmread(file, **options)
    except damage() as error:
        raise ImageError(f"cut short or damaged: {what} cannot be read") from error


def _header(path: Path, dataset: Dataset) -> Header:
    from pydicom.uid import UID

    kind = UID(str(dataset.get("SOPClassUID", "")))
    if kind in _NO_IMAGES:
        raise ImageError(f"it is {_NO_IMAGES[kind]}, not an image")
    if not kind:
        raise ImageError("cut short or damaged: its header ends early")
    if not (dataset.get("Rows") and dataset.get("Columns")):
        name = kind.name if kind.name and kind.name != str(kind) else "a private kind"
        raise ImageError(f"it holds no image ({name})")
    for name in ("SeriesInstanceUID", "SOPInstanceUID"):
        if not dataset.get(name):
            raise ImageError(f"its header has no {name}")
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        raise ImageError("text that may identify the person is burned into its pixels")
    frames = int(dataset.get("NumberOfFrames") or 1)
    # Without a PatientID each study is a person. The issuer of the id plays no part: two people
    # that are taken for one stay in one part of a split, one that is taken for two would not.
    patient = str(dataset.get("PatientID") or "").strip()
    return Header(
        path=path,
        patient=patient or f"study {dataset.get('StudyInstanceUID', '')}",
        series=str(dataset.SeriesInstanceUID),
        instance=str(dataset.SOPInstanceUID),
        series_number=abs(int(dataset.get("SeriesNumber") or 0)),
        number=int(dataset.get("InstanceNumber") or 0),
        size=(int(dataset.Rows), int(dataset.Columns)),
        frames=frames,
        is_colour=is_colour(dataset),
        bits=int(dataset.get("BitsStored") or 16),
        plane=_plane(dataset, dataset, dataset) if frames == 1 else None,
        spacing=_numbers(dataset, "PixelSpacing") or _numbers(dataset, "ImagerPixelSpacing"),
        thickness=_thickness(dataset),
    )


def is_colour(dataset: Dataset) -> bool:
    """Whether pixels are RGB once they are decoded."""
    return (
        int(dataset.get("SamplesPerPixel") or 1) == 3
        or dataset.get("PhotometricInterpretation") == "PALETTE COLOR"
    )


def _thickness(dataset: Dataset) -> float:
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        if dataset.get(keyword) and (size := abs(float(dataset[keyword].value))):
            return size
    return 0.0


def _plane(positioned: Dataset, oriented: Dataset, measured: Dataset) -> Plane | None:
    position = _numbers(positioned, "ImagePositionPatient", 3)
    orientation = _numbers(oriented, "ImageOrientationPatient", 6)
    spacing = _numbers(measured, "PixelSpacing")
    return Plane(position, orientation, spacing) if position and orientation and spacing else None


def _numbers(dataset: Dataset, keyword: str, count: int = 2) -> tuple[float, ...] | None:
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    numbers = tuple(float(number) for number in value)
    if len(numbers) != count:
        raise ImageError(f"{keyword} is {len(numbers)} numbers, {count} are needed")
    return numbers


@dataclass(frozen=True, slots=True)
class Pixels:
    """The frames of a file in their own units."""

    values: Array  # (frames, rows, columns, channels)
    integer: bool  # they are whole numbers
    planes: tuple[Plane | None, ...]  # of each frame
    thickness: float  # 0: not known
    dataset: Dataset  # without the pixels


def read_pixels(header: Header) -> Pixels:
    """The pixels of a file, rescaled; black is low. Called within :func:`quiet`.

    MONOCHROME1, in which high is black, is inverted as GDCM does it: each stored value v of b bits
    becomes 2^b - 1 - v (-1 - v where it is signed), and then it is rescaled.

    Raises:
        ImageError: they cannot be decoded; the text says why, without a path.
    """
    dataset = _read(header.path, "it")
    try:
        if _has_decoder(dataset):
            values, integer = _rescaled(_decoded(dataset, header), dataset)
        else:
            values, integer = _read_by_gdcm(dataset, header)
        planes = _planes(dataset, header.frames)
        measures = _frame_groups(dataset, "PixelMeasuresSequence", header.frames)
        thickness = header.thickness or _thickness(measures[0])
    except ImageError:
        raise
    except damage() as error:
        raise ImageError(
            f"cut short or damaged: its pixels ({_syntax(dataset)}) cannot be decoded"
        ) from error
    dataset.pop("PixelData", None)
    return Pixels(values, integer, planes, thickness, dataset)


def _syntax(dataset: Dataset) -> str:
    """The name of a file's transfer syntax; one that is not of the standard is not shown."""
    from pydicom.uid import UID

    uid = UID(str(dataset.file_meta.get("TransferSyntaxUID", "")))
    return str(uid.name) if uid.is_transfer_syntax else "unknown compression"


def _has_decoder(dataset: Dataset) -> bool:
    """Whether pydicom has a decoder for the compression of a file, if it is compressed."""
    from pydicom.pixels import get_decoder

    uid = dataset.file_meta.TransferSyntaxUID
    try:
        plugins = get_decoder(uid).available_plugins if uid.is_encapsulated else ("none needed",)
    except NotImplementedError:
        return False
    # Pillow, which is asked first, decodes 8 bits only, and fails at 12
    return bool(plugins) and uid != _JPEG_12_BITS


def _read_by_gdcm(dataset: Dataset, header: Header) -> tuple[Array, bool]:
    """The pixels of a frame whose compression pydicom has no decoder for, as lossless JPEG.

    The one of pylibjpeg is under the GPL, and is no part of the extra. GDCM, in SimpleITK, has one;
    it rescales and inverts as we do.
    """
    import SimpleITK as sitk

    if header.frames > 1 or not dataset.file_meta.TransferSyntaxUID.is_transfer_syntax:
        raise ImageError(f"its compression ({_syntax(dataset)}) cannot be read here")
    reader = sitk.ImageFileReader()
    warns = reader.GetGlobalWarningDisplay()
    reader.SetGlobalWarningDisplay(False)  # they would quote the header
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(header.path))
    try:
        values = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise ImageError(
            f"its compression ({_syntax(dataset)}) cannot be read here, or it is damaged"
        ) from error
    finally:
        reader.SetGlobalWarningDisplay(warns)
    return np.reshape(values, (1, *header.size, -1)), values.dtype.kind in "iu"


def _decoded(dataset: Dataset, header: Header) -> Array:
    """Stored values, (frames, rows, columns, channels); colour is RGB of 8 bits."""
    from pydicom.pixels import apply_color_lut

    if dataset.file_meta.TransferSyntaxUID == _RLE:  # pylibjpeg-rle panics at damaged files
        dataset.pixel_array_options(decoding_plugin="pydicom")
    pixels = dataset.pixel_array
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    if header.is_colour:
        bits = 16 if header.bits <= 8 < 8 * pixels.dtype.itemsize else header.bits  # a palette's
        pixels = pixels[..., :3] >> max(0, bits - 8)
    return np.reshape(pixels, (header.frames, *header.size, -1))


def _rescaled(frames: Array, dataset: Dataset) -> tuple[Array, bool]:
    """Stored values in their own units, and whether these are whole numbers."""
    from pydicom.pixels import apply_modality_lut

    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        highest = -1 if dataset.PixelRepresentation else 2**dataset.BitsStored - 1
        frames = highest - frames.astype(np.int64)
    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(frames, dataset), True
    groups = _frame_groups(dataset, "PixelValueTransformationSequence", len(frames))
    factors = [_rescaling(group) for group in groups]
    integer = frames.dtype.kind in "iu" and all(
        number.is_integer() for pair in factors for number in pair
    )
    if all(pair == (1.0, 0.0) for pair in factors):
        return frames, integer
    slopes, intercepts = np.array(factors, dtype=float).T[..., None, None, None]
    return frames * slopes + intercepts, integer


def _rescaling(dataset: Dataset) -> tuple[float, float]:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return (
        1.0 if slope in (None, "") else float(slope),
        0.0 if intercept in (None, "") else float(intercept),
    )


def _planes(dataset: Dataset, frames: int) -> tuple[Plane | None, ...]:
    groups = [
        _frame_groups(dataset, name, frames)
        for name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    ]
    return tuple(_plane(*parts) for parts in zip(*groups, strict=True))


def _frame_groups(dataset: Dataset, name: str, frames: int) -> Sequence[Dataset]:
    """For each frame, the part of the header that says it: its own, the shared one, or the top."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
    common = (shared[0].get(name) or [dataset])[0]
    own = dataset.get("PerFrameFunctionalGroupsSequence") or [{}] * frames
    if len(own) != frames:
        raise ImageError(f"it has {frames} frames, and its header describes {len(own)}")
    return [(item.get(name) or [common])[0] for item in own]
