"""Real pictures and volumes, where the machine has them beside the project."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from scipy import ndimage

from synthcube.data.images import image_fault, read_image, write_image
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.data.preparation import prepare
from synthcube.data.preprocessing import DataConfig, to_intensities


def test_mednist_is_prepared_as_six_classes(mednist: Path, tmp_path: Path) -> None:
    prepared = prepare(mednist, tmp_path, paradigm="custom", validation=0.1)
    assert prepared.labels == dict.fromkeys(
        ["AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"], 1500
    )
    assert prepared.splits == {"train": 8100, "validation": 900}
    assert len(read_manifest(tmp_path).rows) == 9000


def test_pictures_are_read_as_pillow_reads_them(mednist: Path) -> None:
    for path in sorted((mednist / "Hand").iterdir())[:20]:
        expected = np.asarray(Pillow.open(path)).T
        assert np.array_equal(read_image([path]).tensor[0, :, :, 0].numpy(), expected)
        assert image_fault(path) == ""


def test_blank_pictures_of_the_real_set_are_found(mednist: Path) -> None:
    assert image_fault(mednist / "HeadCT" / "000380.jpeg") == "constant image: every voxel is 25"


def extent(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Outer corners of the first and the last voxel, in millimetres."""
    first = affine @ [-0.5, -0.5, -0.5, 1]
    last = affine @ [*(np.array(shape[:3]) - 0.5), 1]
    return np.stack([first[:3], last[:3]])


def test_downsampled_volumes_stay_in_their_place(volumes: Path, tmp_path: Path) -> None:
    """Written back, each covers the same millimetres as its source, and looks the same."""
    manifest = read_manifest(volumes)
    config = DataConfig(size=(24, 24, 24))
    data = DataModule(manifest, config, batch_size=2, seed=0, cache=tmp_path / "cache")
    for index, row in enumerate(manifest.rows):
        image = torch.from_numpy(data.cache.read([index])[0])
        ranges = tuple(map(tuple, data.cache.intensity_ranges[index].tolist()))
        path = tmp_path / f"{row.name}.nii.gz"
        write_image(path, to_intensities(image, ranges), data.cache.affines[index])
        source = nib.as_closest_canonical(nib.load(row.channels[0]))
        written = nib.load(path)
        np.testing.assert_allclose(
            extent(written.affine, written.shape), extent(source.affine, source.shape), atol=1e-2
        )
        assert nib.aff2axcodes(written.affine) == ("R", "A", "S")
        places = nib.affines.apply_affine(
            np.linalg.inv(source.affine),
            nib.affines.apply_affine(written.affine, np.argwhere(np.ones(written.shape[:3]))),
        )
        voxels = np.clip(source.get_fdata().reshape(*source.shape[:3], -1)[..., 0], *ranges[0])
        averaged = ndimage.uniform_filter(voxels, np.array(voxels.shape) / 24)
        there = ndimage.map_coordinates(averaged, places.T, order=1, mode="nearest")
        generated = written.get_fdata()
        likeness = np.corrcoef(there, generated.ravel())[0, 1]
        assert likeness > 0.94, row.name
        for axis in range(3):  # a head is nearly, but not quite, its own mirror image
            mirrored = np.corrcoef(there, np.flip(generated, axis).ravel())[0, 1]
            assert mirrored < likeness - 0.005, row.name


def test_every_real_volume_survives_a_round_trip(volumes: Path, tmp_path: Path) -> None:
    for path in sorted(volumes.iterdir()):
        image = read_image([path])
        write_image(tmp_path / "copy.nii.gz", image.tensor, image.affine, integer=image.integer)
        source, copy = nib.load(path), nib.load(tmp_path / "copy.nii.gz")
        np.testing.assert_allclose(copy.affine, source.affine, atol=1e-4)
        assert np.array_equal(
            copy.get_fdata(dtype=np.float32).squeeze(), source.get_fdata(dtype=np.float32).squeeze()
        )


@pytest.mark.parametrize("size", [(32, 32)])
def test_a_volume_is_no_picture(volumes: Path, size: tuple[int, int], tmp_path: Path) -> None:
    from synthcube.errors import ImageError

    with pytest.raises(
        ImageError, match=r"data.size \[32, 32\] has 2 sides, the image is a volume"
    ):
        DataModule(
            read_manifest(volumes), DataConfig(size=size), batch_size=1, seed=0, cache=tmp_path
        )
