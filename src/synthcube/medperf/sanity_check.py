"""Task `sanity_check`: check prepared images for damage, and for leaks between subjects."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from synthcube.data.cache import shape_faults
from synthcube.data.geometry import spacing_of
from synthcube.data.images import read_images
from synthcube.data.manifest import Manifest, Row, read_manifest, split_faults
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ManifestError, SynthCubeError
from synthcube.medperf.infer import PreparatorConfig, read_parameters
from synthcube.medperf.prepared_folder import changed_files, read_digests, read_index, voxel_digest
from synthcube.medperf.raw_images import RawImages, condition_faults

log = logging.getLogger("synthcube")

_TOLERANCE_MM = 1e-3  # an affine in a file is float32

Owners = dict[str, dict[str, str]]  # by voxel digest: each subject with that image, and its file


def sanity_check(
    data_path: Path,
    labels_path: Path,
    *,
    parameters_file: Path | None = None,
    additional_files: Path | None = None,
) -> str:
    """Check every prepared image of both folders, and return a line with their numbers.

    Args:
        additional_files: folder with lists (voxels.json, or any .json like it) of images that are
            used elsewhere, such as in the training of a model. The prepared images must be others.

    Raises:
        ConfigError: the parameters are not valid.
        ManifestError: every fault, with files and subjects.
    """
    config = read_parameters(parameters_file, PreparatorConfig).data
    owners: Owners = {}
    faults: list[str] = []
    splits: dict[str, set[str]] = {}
    counts = []
    for name, folder in (("data_path", data_path), ("labels_path", labels_path)):
        try:
            faults += changed_files(folder)
            manifest = read_manifest(folder)
        except SynthCubeError as error:
            faults += [f"{name}: {text}" for text in error.faults or (str(error),)]
            continue
        log.info("Checking %d images of %s ...", len(manifest.rows), name)
        faults += _image_faults(manifest, config, owners)
        for row in manifest.rows:
            splits.setdefault(row.subject, set()).add(row.split)
        for path, image in read_index(folder).images.items():
            owners.setdefault(image.voxels, {}).setdefault(image.subject, path)
        if name == "data_path":
            faults += condition_faults(RawImages.of(manifest), config.conditions)
        counts.append(f"{len(manifest.rows)} images of {name}")
    lists = sorted(additional_files.rglob("*.json")) if additional_files else []
    elsewhere = {digest: path.name for path in lists for digest in read_digests(path)}
    faults += _leaks(owners, splits, elsewhere)
    if faults:
        faults = list(dict.fromkeys(faults))
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ManifestError(f"The prepared images have {count}:", faults)
    return ", ".join(counts)


def _image_faults(manifest: Manifest, config: DataConfig, owners: Owners) -> list[str]:
    faults: list[str] = []
    unreadable: dict[Row, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for row, image in read_images(manifest.rows, lambda _, image: image, unreadable):
        where = str(row.channels[0])
        owners.setdefault(voxel_digest(image.tensor), {}).setdefault(row.subject, where)
        low, high = float(image.tensor.min()), float(image.tensor.max())
        if low == high:
            faults.append(f"{where}: constant image: every voxel is {low:g}")
        shapes[where] = tuple(image.tensor.shape)
        if config.size and shapes[where][1:] != (*config.size, 1)[:3]:
            faults.append(
                f"{where}: size {list(shapes[where][1:])}, data.size is {list(config.size)}"
            )
        if not image.raster:
            faults += [f"{where}: {text}" for text in _spacing_faults(image.affine, config)]
    return [
        *unreadable.values(),
        *faults,
        *shape_faults(shapes, any_size=config.patches is not None),
    ]


def _spacing_faults(affine: npt.ArrayLike, config: DataConfig) -> list[str]:
    if not config.spacing_mm or (config.size and config.fit == "resize"):
        return []
    spacing = spacing_of(affine)[: len(config.spacing_mm)]
    if np.allclose(spacing, config.spacing_mm, rtol=0, atol=_TOLERANCE_MM):
        return []
    return [f"spacing {spacing.round(3).tolist()} mm, data.spacing_mm is {list(config.spacing_mm)}"]


def _leaks(owners: Owners, splits: dict[str, set[str]], elsewhere: dict[str, str]) -> list[str]:
    """What is wrong; `elsewhere` has the name of the list that holds an image, by voxel digest."""
    faults = split_faults(splits)
    for digest, files in owners.items():
        subjects = ", ".join(f"{subject!r} ({path})" for subject, path in files.items())
        if len(files) > 1:
            faults.append(f"the same image belongs to different subjects: {subjects}")
        if digest in elsewhere:
            faults.append(f"the image of {subjects} is used elsewhere ({elsewhere[digest]})")
    return faults
