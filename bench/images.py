"""Images to measure with, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_jpegs(folder: Path, num: int, side: int = 64) -> Path:
    """Grey noise, `num` files of side x side; returns `folder`."""
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(num):
        pixels = random.integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def write_volumes(folder: Path, num: int, side: int = 128) -> Path:
    """Float32 noise, `num` .nii.gz of side x side x side (the worst case for gzip)."""
    import nibabel

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(num):
        voxels = random.standard_normal((side, side, side), dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / f"{index:05d}.nii.gz")
    return folder
