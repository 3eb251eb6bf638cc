"""Drawn heads in folders and files of BraTS's form: small ones, or of its own size."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

SIZE = (24, 24, 20)
CONTRASTS = ("t1c", "t1n", "t2f", "t2w")


def affine_of(size: Sequence[int]) -> np.ndarray:
    """That of BraTS: left and posterior, with the origin (0, -239, 0) of ITK for 240 voxels."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = size[1] - 1
    return affine


def head(size: Sequence[int], seed: int) -> np.ndarray:
    """(X, Y, Z) float32: an ellipsoid with a gradient and speckle in it, and 0 around it."""
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in size), indexing="ij")
    rng = np.random.default_rng(seed)
    inside = sum((axis / 0.8) ** 2 for axis in axes) < 1
    voxels = 500 + 200 * axes[0] + 100 * axes[1] * axes[2] + rng.normal(0, 20, size)
    return np.where(inside, voxels, 0).astype(np.float32)


def hole(size: Sequence[int], seed: int) -> np.ndarray:
    """(X, Y, Z) uint8: a ball of 1 within the head."""
    rng = np.random.default_rng(seed)
    centre = [side / 2 + rng.uniform(-0.1, 0.1) * side for side in size]
    axes = np.meshgrid(*(np.arange(side) for side in size), indexing="ij")
    radius = min(size) / 6
    distances = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
    return (distances < radius**2).astype(np.uint8)


def write(path: Path, voxels: np.ndarray, dtype: str = "f4", slope: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels.astype(dtype), affine_of(voxels.shape))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"drawn"
    image.set_data_dtype(dtype)
    if slope:
        image.header.set_slope_inter(slope, 0)
    image.to_filename(path)
    return path


def inpainting_cases(
    folder: Path, names: Sequence[str], size: Sequence[int] = SIZE, *, dtype: str = "f4",
    whole: bool = False,
) -> Path:  # fmt: skip
    """Folders of a voided T1 and its mask; `whole`: and of the T1 itself, as for a training."""
    for seed, name in enumerate(names):
        image, mask = head(size, seed), hole(size, seed)
        start = folder / name / name
        write(Path(f"{start}-t1n-voided.nii.gz"), np.where(mask, 0, image), dtype)
        write(Path(f"{start}-mask.nii.gz"), mask, "u1")
        if whole:
            write(Path(f"{start}-t1n.nii.gz"), image, dtype)
    return folder


def contrast_cases(
    folder: Path, names: Sequence[str], size: Sequence[int] = SIZE, *, missing: Sequence[str] = ()
) -> Path:
    """Folders of four contrasts, without that which `missing` names for each case."""
    for seed, name in enumerate(names):
        image = head(size, seed)
        for number, contrast in enumerate(CONTRASTS, start=1):
            if not missing or contrast != missing[seed]:
                path = folder / name / f"{name}-{contrast}.nii.gz"
                write(path, np.where(image > 0, image / number + 100 * number, 0))
    return folder


def manifest(folder: Path, suffixes: Sequence[str]) -> Path:
    """A CSV of the cases below a folder, with a channel for each suffix."""
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*(f"Channel_{i}" for i in range(len(suffixes))), "SubjectID"])
        for case in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            files = (case / f"{case.name}-{suffix}.nii.gz" for suffix in suffixes)
            rows.writerow([*files, case.name])
    return path
