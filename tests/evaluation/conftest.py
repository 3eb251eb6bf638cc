"""Sets of images made of arrays, as an evaluation reads them from disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from synthcube.data.cache import Float32Rows
from synthcube.data.manifest import Manifest, Row
from synthcube.evaluation.sets import ImageSet


@pytest.fixture
def image_set(tmp_path: Path):
    """Make the set of an array (N, C, *spatial); each image is of a subject of its own."""

    def make(
        name: str,
        voxels: np.ndarray,
        *,
        subjects: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        conditions: Sequence[dict[str, str]] | None = None,
        raster: bool = True,
        files: Sequence[str] | None = None,
    ) -> ImageSet:
        path = tmp_path / f"{name}.f32"
        voxels = np.ascontiguousarray(voxels, np.float32)
        voxels.tofile(path)
        class_names = sorted(set(classes)) if classes else []
        rows = tuple(
            Row(
                channels=(tmp_path / name / (files[i] if files else f"{i:05d}.png"),),
                subject=subjects[i] if subjects else f"{name}-{i}",
                label=class_names.index(classes[i]) if classes else -1,
                label_name=classes[i] if classes else "",
                conditions=conditions[i] if conditions else {},
                number=i + 2,
            )
            for i in range(len(voxels))
        )
        flat = voxels.swapaxes(0, 1).reshape(voxels.shape[1], -1)
        bounds = tuple((float(a), float(b)) for a, b in np.percentile(flat, (0.1, 99.9), axis=1).T)
        constant = sum(image.min() == image.max() for image in voxels)
        manifest = Manifest(tmp_path / name / "manifest.csv", rows)
        digests = tuple(hashlib.blake2b((image + 0.0).tobytes()).digest() for image in voxels)
        return ImageSet(
            name, manifest, (1.0, 1.0, 1.0), raster, constant, digests, "", bounds,
            Float32Rows(path, voxels.shape[1:]),
        )  # fmt: skip

    return make
