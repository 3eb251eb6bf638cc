"""Write a data set that is laid out like BraTS, of heads that nobody has: for the tutorial.

    python examples/brats_like.py my-brats

HGG and LGG hold a folder for each case, with T1, FLAIR and a segmentation (1 core, 2 oedema, 4
enhancing rim). Tumours of HGG are larger and have a rim. The same number gives the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

SHAPE, SPACING_MM = (48, 48, 32), 4.0
CASES = 40  # of each grade
# of background, brain, ventricle, core, oedema and rim
T1 = np.array([0.0, 620, 260, 330, 520, 900])
FLAIR = np.array([0.0, 430, 140, 380, 860, 640])
SEGMENTATION = np.array([0, 0, 0, 1, 2, 4], np.uint8)


def case(grade: str, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T1, FLAIR and segmentation of one head, each of SHAPE."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")).astype(float)
    middle = (np.array(SHAPE) - 1) / 2 + random.uniform(-1, 1, 3)
    half_axes = np.array([17.0, 20.5, 13.0]) * random.uniform(0.93, 1.07, 3)
    place = (grid - middle[:, None, None, None]) / half_axes[:, None, None, None]
    tissue = np.zeros(SHAPE, int)
    tissue[(place**2).sum(0) < 1] = 1
    for side in (-0.22, 0.22):  # the ventricles
        offset = place - np.array([side, -0.05, 0.1])[:, None, None, None]
        tissue[((offset / np.array([0.12, 0.42, 0.3])[:, None, None, None]) ** 2).sum(0) < 1] = 2
    centre = random.uniform([0.35, -0.4, -0.25], [0.55, 0.4, 0.25])
    centre[0] *= random.choice([-1, 1])
    ragged = ndimage.gaussian_filter(random.normal(0, 1, SHAPE), 2.5)
    from_centre = (place - centre[:, None, None, None]) * half_axes[:, None, None, None]
    distance = np.linalg.norm(from_centre, axis=0) + 6 * ragged  # mm / 4, with a ragged border
    radius = random.uniform(6, 8.5) if grade == "HGG" else random.uniform(3.5, 5.5)
    inside = tissue > 0
    tissue[inside & (distance < radius)] = 4
    if grade == "HGG":
        tissue[inside & (distance < 0.62 * radius)] = 5
        tissue[inside & (distance < 0.38 * radius)] = 3
    else:
        tissue[inside & (distance < 0.55 * radius)] = 3
    gain = random.uniform(0.85, 1.15, 2)  # every scanner has its own scale
    scans = []
    for values, factor in zip((T1, FLAIR), gain, strict=True):
        texture = 1 + 0.25 * ndimage.gaussian_filter(random.normal(0, 1, SHAPE), 1.5)
        scan = ndimage.gaussian_filter(values[tissue] * texture, 0.6) * factor
        scan[~inside] = 0
        scans.append((scan + np.abs(random.normal(0, 8, SHAPE)) * inside).astype(np.float32))
    return *scans, SEGMENTATION[tissue]


def write(folder: Path, cases: int = CASES) -> None:
    """Write `cases` of each grade below `folder`."""
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    affine[:3, 3] = -(np.array(SHAPE) - 1) / 2 * SPACING_MM
    for place, grade in enumerate(("HGG", "LGG")):
        for number in range(cases):
            name = f"Brats_{grade}_{number:03d}"
            (folder / grade / name).mkdir(parents=True, exist_ok=True)
            scans = case(grade, np.random.default_rng((place, number)))
            for kind, voxels in zip(("t1", "flair", "seg"), scans, strict=True):
                path = folder / grade / name / f"{name}_{kind}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=CASES, help="of each grade")
    options = parser.parse_args()
    write(options.folder, options.cases)
    print(f"{2 * options.cases} cases below {options.folder}")
