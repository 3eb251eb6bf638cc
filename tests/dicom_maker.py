"""DICOM files for tests: series of slices, pictures and multi-frame objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

Pixels = npt.NDArray[Any]

AXIAL = (1.0, 0, 0, 0, 1, 0)
SAGITTAL = (0.0, 1, 0, 0, 0, -1)
CORONAL = (1.0, 0, 0, 0, 0, -1)
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def uid(*sources: object) -> str:
    """The same UID for the same sources."""
    return str(generate_uid(entropy_srcs=[str(source) for source in sources]))


def dataset(sop_class: str, pixels: Pixels, patient: str, series: str, number: int = 1) -> Dataset:
    """An image object without a place: the pixels are (rows, columns[, 3]) or have frames first."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = uid(patient, series, number)
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = uid(patient, "study")
    data.SeriesInstanceUID = uid(patient, series)
    data.PatientID = patient
    data.SeriesNumber, data.InstanceNumber = int(series), number
    data.Modality = "OT"
    is_colour = pixels.ndim > 2 and pixels.shape[-1] == 3
    data.Rows, data.Columns = pixels.shape[-3:-1] if is_colour else pixels.shape[-2:]
    data.SamplesPerPixel = 3 if is_colour else 1
    data.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        data.PlanarConfiguration = 0
    bits = 8 * pixels.dtype.itemsize
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    return data


def save(data: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def slices(
    pixels: Pixels,
    *,
    patient: str = "P1",
    series: str = "1",
    orientation: Sequence[float] = AXIAL,
    spacing: tuple[float, float, float] = (3.0, 0.7, 0.9),
    origin: Sequence[float] = (-20.0, 31.5, -7.25),
    sop_class: str = CTImageStorage,
    **values: Any,
) -> list[Dataset]:
    """A series of single frames out of (slices, rows, columns); `spacing` is in the same order."""
    normal = np.cross(orientation[:3], orientation[3:])
    frames = []
    for index, plane in enumerate(pixels):
        data = dataset(sop_class, plane, patient, series, index + 1)
        data.Modality = "CT"
        position = np.asarray(origin) + normal * spacing[0] * index
        data.ImagePositionPatient = [float(f"{x:.6f}") for x in position]
        data.ImageOrientationPatient = list(orientation)
        data.PixelSpacing = list(spacing[1:])
        data.SliceThickness = spacing[0]
        for name, value in values.items():
            setattr(data, name, value)
        frames.append(data)
    return frames


def save_series(frames: Sequence[Dataset], folder: Path, suffix: str = ".dcm") -> Path:
    """Write the files in an order that is not that of the slices; returns the folder."""
    for index, data in enumerate(frames):
        save(data, folder / f"IM{(index * 7) % 1000:04d}{suffix}")
    return folder


def ct(shape: tuple[int, int, int] = (6, 8, 10), seed: int = 0) -> Pixels:
    """Signed voxels of 16 bits, (slices, rows, columns)."""
    return np.random.default_rng(seed).integers(-1024, 2000, shape).astype(np.int16)


def enhanced(pixels: Pixels, patient: str = "P1", series: str = "1") -> Dataset:
    """An enhanced CT: all slices in one object, in the reverse order."""
    data = dataset(EnhancedCTImageStorage, pixels[::-1].copy(), patient, series)
    data.NumberOfFrames = len(pixels)
    data.Modality = "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    orientation, measures, values = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(CORONAL)
    measures.PixelSpacing, measures.SliceThickness = [0.7, 0.9], 2.0
    measures.SpacingBetweenSlices = 2.0
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
    shared = Dataset()
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelMeasuresSequence = [measures]
    shared.PixelValueTransformationSequence = [values]
    data.SharedFunctionalGroupsSequence = [shared]
    own = []
    for index in reversed(range(len(pixels))):
        position, content, group = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [-20.0, 10.0 + 2.0 * index, 5.0]
        content.StackID, content.InStackPositionNumber = "1", index + 1
        content.DimensionIndexValues = [1, index + 1]
        group.PlanePositionSequence, group.FrameContentSequence = [position], [content]
        own.append(group)
    data.PerFrameFunctionalGroupsSequence = own
    return data


def picture(pixels: Pixels, patient: str = "P1", series: str = "1", **values: Any) -> Dataset:
    """A secondary capture."""
    data = dataset(SecondaryCaptureImageStorage, pixels, patient, series)
    for name, value in values.items():
        setattr(data, name, value)
    return data


def radiograph(pixels: Pixels, patient: str = "P1", series: str = "1", **values: Any) -> Dataset:
    """A radiograph of 12 bits in 16."""
    data = dataset(ComputedRadiographyImageStorage, pixels, patient, series)
    data.BitsStored, data.HighBit = 12, 11
    data.ImagerPixelSpacing = [0.2, 0.3]
    data.Modality = "CR"
    for name, value in values.items():
        setattr(data, name, value)
    return data
