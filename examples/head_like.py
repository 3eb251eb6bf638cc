"""Write scans of heads that nobody has: CT as DICOM series, or T1w and FLAIR as a BIDS data set.

    python examples/head_like.py ct-scans
    python examples/head_like.py my-bids --bids

Ventricles grow with age, which is in the tag PatientAge, and in participants.tsv.
The same number of subjects gives the same files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel
import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy import ndimage

SHAPE, SPACING_MM = (48, 56, 32), (4.0, 4.0, 5.0)
SUBJECTS = 40
AIR, SCALP, SKULL, BRAIN, CORTEX, VENTRICLE = range(6)
VALUES = {
    "CT": np.array([-1000.0, 40, 1100, 32, 42, 6]),
    "T1w": np.array([0.0, 500, 90, 620, 430, 160]),
    "FLAIR": np.array([0.0, 380, 70, 400, 520, 60]),
}


def head(age: float, random: np.random.Generator) -> np.ndarray:
    """Tissue of each voxel of one head, of SHAPE."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(float)
    middle = (np.array(SHAPE) - 1) / 2 + random.uniform(-1, 1, 3)
    half_axes = np.array([18.5, 23, 14]) * random.uniform(0.92, 1.06, 3)
    place = (grid - middle[:, None, None, None]) / half_axes[:, None, None, None]
    radius = np.linalg.norm(place, axis=0)
    tissue = np.full(SHAPE, AIR)
    for tissue_kind, limit in ((SCALP, 1.0), (SKULL, 0.94), (CORTEX, 0.85)):
        tissue[radius < limit] = tissue_kind
    folds = ndimage.gaussian_filter(random.normal(0, 1, SHAPE), 1.2)
    tissue[radius < 0.74 + 0.35 * folds] = BRAIN
    growth = 0.75 + 0.9 * (age - 20) / 70
    for side in (-1, 1):  # the lateral ventricles: two bent ellipsoids
        centre = np.array([side * 0.16, 0.02, 0.12])[:, None, None, None]
        extent = np.array([0.1 * growth, 0.36 * growth**0.5, 0.24 * growth**0.5])
        offset = place - centre
        offset[0] -= side * 0.25 * offset[1] ** 2
        tissue[np.linalg.norm(offset / extent[:, None, None, None], axis=0) < 1] = VENTRICLE
    return tissue


def scan(tissue: np.ndarray, contrast: str, random: np.random.Generator) -> np.ndarray:
    """What a scanner would see of it, of SHAPE; Hounsfield units if the contrast is CT."""
    values = ndimage.gaussian_filter(VALUES[contrast][tissue], 0.5)
    gain = 1.0 if contrast == "CT" else random.uniform(0.9, 1.1)  # MR has no units
    spread = 6.0 if contrast == "CT" else 10.0
    return values * gain + random.normal(0, spread, SHAPE) * (tissue != AIR)


def affine() -> np.ndarray:
    """Voxels to millimetres, RAS; the middle of the volume is the origin."""
    matrix = np.diag([*SPACING_MM, 1.0])
    matrix[:3, 3] = -(np.array(SHAPE) - 1) / 2 * SPACING_MM
    return matrix


def write_series(folder: Path, name: str, age: int, sex: str, hounsfield: np.ndarray) -> None:
    """Write one axial series; DICOM counts x to the left and y to the back."""
    x, y, _ = affine()[:3, 3]
    for index in range(SHAPE[2]):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.SOPInstanceUID = generate_uid(entropy_srcs=[name, str(index)])
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.StudyInstanceUID = generate_uid(entropy_srcs=[name, "study"])
        data.SeriesInstanceUID = generate_uid(entropy_srcs=[name, "series"])
        data.PatientID, data.PatientAge, data.PatientSex = name, f"{age:03d}Y", sex
        data.Modality, data.SeriesNumber, data.InstanceNumber = "CT", 1, index + 1
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        height = float(affine()[2, 3] + index * SPACING_MM[2])
        left, back = -x - (SHAPE[0] - 1) * SPACING_MM[0], -y - (SHAPE[1] - 1) * SPACING_MM[1]
        data.ImagePositionPatient = [float(left), float(back), height]
        data.PixelSpacing = [SPACING_MM[1], SPACING_MM[0]]
        data.SliceThickness = SPACING_MM[2]
        data.Rows, data.Columns = SHAPE[1], SHAPE[0]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation, data.RescaleSlope, data.RescaleIntercept = 0, 1, -1024
        pixels = hounsfield[::-1, ::-1, index].T + 1024
        data.PixelData = np.clip(pixels.round(), 0, 4095).astype("<u2").tobytes()
        folder.mkdir(parents=True, exist_ok=True)
        data.save_as(folder / f"IM{index:04d}.dcm", enforce_file_format=True)


def write(folder: Path, *, bids: bool = False, subjects: int = SUBJECTS) -> None:
    """Write scans of so many subjects below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    people = []
    for number in range(1, subjects + 1):
        random = np.random.default_rng(number)
        age, sex = int(random.integers(20, 90)), random.choice(["F", "M"])
        tissue, label = head(age, random), f"sub-{number:02d}"
        people.append(f"{label}\t{age}\t{sex}")
        if not bids:
            write_series(folder / label, label, age, sex, scan(tissue, "CT", random))
            continue
        anatomy = folder / label / "anat"
        anatomy.mkdir(parents=True, exist_ok=True)
        for contrast in ("T1w", "FLAIR"):
            voxels = np.clip(scan(tissue, contrast, random), 0, None).astype(np.float32)
            nibabel.save(
                nibabel.Nifti1Image(voxels, affine()), anatomy / f"{label}_{contrast}.nii.gz"
            )
    if bids:
        description = {"Name": "Drawn heads", "BIDSVersion": "1.10.0"}
        (folder / "dataset_description.json").write_text(json.dumps(description))
        header = "participant_id\tage\tsex"
        (folder / "participants.tsv").write_text("\n".join([header, *people]) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bids", action="store_true", help="T1w and FLAIR as a BIDS data set")
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    options = parser.parse_args()
    write(options.folder, bids=options.bids, subjects=options.subjects)
    print(f"{options.subjects} subjects below {options.folder}")
