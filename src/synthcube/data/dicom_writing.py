"""Generated images as DICOM: a series of slices for each volume, one object for each 2D image.

They are secondary captures, the class of images that no scanner made, and say in their tags that
they are synthetic and for research only. Nothing is written into the pixels.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import __version__
from synthcube.data.dicom_files import is_readable
from synthcube.data.dicom_geometry import LPS_TO_RAS
from synthcube.data.geometry import Affine, spacing_of
from synthcube.data.raster import picture_of
from synthcube.errors import ConfigError, ImageError
from synthcube.storage import make_folder, replaced_folder, write_with

if TYPE_CHECKING:
    from pydicom import Dataset

Array = npt.NDArray[Any]

SYNTHETIC = "Synthetic, for research only"
_NAMESPACE = uuid.UUID("8b0f0c0e-5f0e-4a35-9b0e-6f1c2b7a9d11")  # of our UIDs, drawn once
_HIGHEST = 65535  # of 16 bits
_RIGHT_ANGLE = 1e-4


@dataclass(frozen=True, slots=True)
class Study:
    """What the series of one image have in common."""

    identity: str
    """A hexadecimal hash of the image and its model: other images have another one."""

    @classmethod
    def of(cls, model: str, image: torch.Tensor) -> Study:
        """The study of an image that a model, named by its hash, made."""
        voxels = image.detach().cpu().contiguous().numpy()
        return cls(hashlib.sha256(model.encode() + voxels.tobytes()).hexdigest())

    def uid(self, *parts: object) -> str:
        """The same UID for the same parts, in the form that DICOM has for UUIDs."""
        name = " ".join(map(str, (self.identity, *parts)))
        return f"2.25.{uuid.uuid5(_NAMESPACE, name).int}"


def require_dicom(affine: npt.ArrayLike | None) -> None:
    """Raise a ConfigError where no DICOM can be written.

    Args:
        affine: of the images; None: they are pictures.
    """
    if not is_readable():
        raise ConfigError(
            "sampling.format is dicom, which needs pydicom: pip install 'synthcube[dicom]'."
        )
    if affine is not None and (fault := _affine_fault(np.asarray(affine, dtype=float))):
        raise ConfigError(f"sampling.format is dicom, but {fault}")


def write_dicom(
    target: Path,
    tensor: torch.Tensor,
    affine: npt.ArrayLike | None,
    study: Study,
    *,
    integer: bool = False,
    must_be_exact: bool = False,
    number: int = 1,
) -> list[Path]:
    """Write an image; returns the folder of each volume's slices, or the file of a 2D image.

    The channels become series of one study, but the three of a colour picture one object.
    Intensities have 16 bits: whole numbers are kept, others to 1 / 131,070 of their range. A folder
    is replaced as a whole.

    Args:
        target: the folder, or the file without its suffix.
        tensor: (C, X, Y) or (C, X, Y, Z) in source intensities.
        affine: (4, 4), voxel index to RAS+ millimetres; None: it is a picture of 8 bits.
        integer: whether intensities are whole numbers; they are rounded.
        must_be_exact: whether an intensity is the name of a class.
        number: of the first series in its study.

    Raises:
        ImageError: the image cannot be DICOM.
    """
    if affine is None:
        picture = np.asarray(picture_of(tensor, target))  # (Y, X[, 3])
        base = _object(study, target.name, number, picture)
        _add_pixels(base, picture)
        return [_write_file(target, base, study)]
    matrix = np.asarray(affine, dtype=np.float64)
    if fault := _affine_fault(matrix):
        raise ImageError(f"{target.name}: {fault}")
    several = len(tensor) > 1
    return [
        _write_channel(
            target.with_name(f"{target.name}_channel_{index}") if several else target,
            channel.detach().cpu().double().numpy(), matrix, study, number + index,
            integer=integer, must_be_exact=must_be_exact,
        )
        for index, channel in enumerate(tensor)
    ]  # fmt: skip


def _affine_fault(affine: Affine) -> str:
    axes = affine[:3, :3] / spacing_of(affine)
    if np.abs(axes.T @ axes - np.eye(3)).max() <= _RIGHT_ANGLE:
        return ""
    return "the axes of the images are not at right angles, which a series cannot say: use native."


def _write_channel(
    target: Path, voxels: Array, affine: Affine, study: Study, number: int, *,
    integer: bool, must_be_exact: bool,
) -> Path:  # fmt: skip
    is_flat = voxels.ndim == 2
    volume = voxels[..., None] if is_flat else voxels  # (X, Y, Z)
    stored, slope, intercept = _stored(volume, integer)
    if must_be_exact and slope != 1:
        raise ImageError(
            f"{target.name}: its classes are more than {_HIGHEST} apart, and 16 bits cannot keep "
            "them: use sampling.format native."
        )
    base = _object(study, target.name, number, stored)
    base.FrameOfReferenceUID = study.uid("frame of reference")
    _add_geometry(base, affine)
    _add_rescaling(base, slope, intercept, volume)
    objects = _slices(base, stored, affine)
    if is_flat:
        return _write_file(target, next(objects), study)
    earlier = [path.name for path in target.glob("*.dcm")] if target.is_dir() else []
    with replaced_folder(target, earlier) as staging:
        for index, data in enumerate(objects):
            _save(staging / f"{index + 1:04d}.dcm", data, study, index)
    return target


def _stored(volume: Array, integer: bool) -> tuple[Array, float, float]:
    """Voxels of 16 bits, and the slope and intercept that give the intensities back."""
    from pydicom.valuerep import format_number_as_ds

    values = np.rint(volume) if integer else volume
    low, high = float(values.min()), float(values.max())
    is_whole = integer and high - low <= _HIGHEST
    slope = 1.0 if is_whole or low == high else (high - low) / _HIGHEST
    # as their texts of at most 16 characters say them
    slope, intercept = (float(format_number_as_ds(number)) for number in (slope, low))
    stored = np.rint((values - intercept) / slope).clip(0, _HIGHEST)
    return stored.astype("<u2"), slope, intercept


def _object(study: Study, name: str, number: int, pixels: Array) -> Dataset:
    """What all objects of a series say."""
    from pydicom import Dataset
    from pydicom.uid import SecondaryCaptureImageStorage

    content = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    data = Dataset()
    data.SOPClassUID = SecondaryCaptureImageStorage
    data.StudyInstanceUID = study.uid("study")
    data.SeriesInstanceUID = study.uid("series", name, content)
    data.PatientID = f"SYNTHETIC-{study.identity[:12]}"
    data.PatientName = f"Synthetic^{study.identity[:12]}"
    # required, and empty: there is no person, no date and no request
    data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = ""
    data.StudyID = data.AccessionNumber = data.ReferringPhysicianName = ""
    data.Laterality = data.PatientOrientation = ""
    data.Modality = "OT"
    data.ConversionType = "SYN"  # a synthetic image
    data.ImageType = ["DERIVED", "SECONDARY"]
    data.SeriesNumber, data.InstanceNumber = number, 1
    data.StudyDescription = data.SeriesDescription = data.ImageComments = SYNTHETIC
    data.DerivationDescription = f"{SYNTHETIC}: made by a model of SynthCube {__version__}"
    data.SyntheticData = "YES"
    data.ContentQualification = "RESEARCH"
    data.BurnedInAnnotation = "NO"
    data.Manufacturer, data.SoftwareVersions = "SynthCube", __version__
    return data


def _add_geometry(data: Dataset, affine: Affine) -> None:
    columns, rows, slices = (float(side) for side in spacing_of(affine))
    directions = (LPS_TO_RAS @ affine)[:3, :2] / (columns, rows)
    data.PositionReferenceIndicator = ""
    data.ImageOrientationPatient = [_decimal(x) for x in directions.T.ravel()]
    data.PixelSpacing = [_decimal(rows), _decimal(columns)]
    data.SliceThickness = data.SpacingBetweenSlices = _decimal(slices)


def _add_rescaling(data: Dataset, slope: float, intercept: float, volume: Array) -> None:
    data.RescaleSlope, data.RescaleIntercept = _decimal(slope), _decimal(intercept)
    data.RescaleType = "US"  # unspecified
    low, high = float(volume.min()), float(volume.max())
    data.WindowCenter, data.WindowWidth = _decimal((low + high) / 2), _decimal(max(high - low, 1))


def _decimal(number: float) -> Any:
    from pydicom.valuerep import DSfloat

    return DSfloat(float(number) + 0.0, auto_format=True)


def _slices(base: Dataset, stored: Array, affine: Affine) -> Iterator[Dataset]:
    for index in range(stored.shape[-1]):
        data = deepcopy(base)
        data.InstanceNumber = index + 1
        position = LPS_TO_RAS @ affine @ (0, 0, index, 1)
        data.ImagePositionPatient = [_decimal(x) for x in position[:3]]
        _add_pixels(data, stored[..., index].T)
        yield data


def _add_pixels(data: Dataset, pixels: Array) -> None:
    """Pixels (rows, columns) of 8 or 16 bits, or (rows, columns, 3) of 8."""
    is_colour = pixels.ndim == 3
    bits = 8 * pixels.dtype.itemsize
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 3 if is_colour else 1
    data.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        data.PlanarConfiguration = 0
    else:
        data.PresentationLUTShape = "IDENTITY"
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation = bits - 1, 0
    content = np.ascontiguousarray(pixels).tobytes()
    data.PixelData = content + b"\0" * (len(content) % 2)
    data["PixelData"].VR = "OB" if bits == 8 else "OW"


def _write_file(target: Path, data: Dataset, study: Study) -> Path:
    path = make_folder(target.parent) / f"{target.name}.dcm"
    write_with(path, lambda temporary: _save(temporary, data, study, 0))
    return path


def _save(path: Path, data: Dataset, study: Study, index: int) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    data.SOPInstanceUID = study.uid("object", data.SeriesInstanceUID, index)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = data.SOPClassUID
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta = meta
    data.save_as(path, enforce_file_format=True)
