"""Models that are trained on random patches of images."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthcube import config
from synthcube.data.manifest import read_manifest
from synthcube.data.module import CachedImages, DataModule
from synthcube.errors import ConfigError, ImageError

AFFINE = np.array([[2.0, 0, 0, -9], [0, 2.0, 0, 20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
CHANNELS = {1: {"kind": "mask", "classes": [0, 1, 3]}}


def write_volumes(folder: Path, number: int = 6, side: int = 12) -> Path:
    """Volumes of side x side x 10 voxels with a mask of three classes, and their manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(number):
        voxels = rng.normal(100, 20, (side, side, 10)).astype(np.float32)
        mask = np.where(voxels > 120, 3, voxels > 90).astype(np.uint8)
        nib.save(nib.Nifti1Image(voxels, AFFINE), folder / f"p{i}.nii.gz")
        nib.save(nib.Nifti1Image(mask, AFFINE), folder / f"p{i}_seg.nii.gz")
        split = "validation" if i >= number - 2 else "train"
        files = {"Channel_0": f"p{i}.nii.gz", "Channel_1": f"p{i}_seg.nii.gz"}
        rows.append({**files, "SubjectID": f"p{i}", "Split": split})
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"))


def opened(volumes: Path, cache: Path, *, seed: int = 0, **data: object) -> DataModule:
    settings = config.build({"data": {"channels": CHANNELS, **data}}).data
    return DataModule(read_manifest(volumes), settings, batch_size=4, seed=seed, cache=cache)


def epoch_of(data: DataModule, epoch: int, start: int = 0) -> list[torch.Tensor]:
    """The batches of an epoch, from one of them on, as a resumed run takes them."""
    data.position = (epoch, start)
    return [batch["image"] for batch in data.train_dataloader()]


def test_a_patch_is_that_part_of_the_image(volumes: Path, tmp_path: Path) -> None:
    """Image and mask alike, at a place that seed, epoch and row alone decide."""
    data = opened(volumes, tmp_path, patches=[8, 4, 6])
    images = data.train_dataloader().dataset
    assert isinstance(images, CachedImages)
    assert data.image.size == (8, 4, 6)
    places = [(epoch, row) for epoch in range(30) for row in data.rows("train")]
    starts = np.array([images.start_of(*place) for place in places])
    # every place is drawn, and none that leaves the image
    assert starts.min(axis=0).tolist() == [0, 0, 0]
    assert starts.max(axis=0).tolist() == [4, 8, 4]
    batch = images.__getitems__(places)
    assert batch["augmented"]  # so that no latent of another patch is used for it
    assert batch["image"].shape == (120, 4, 8, 4, 6)  # a mask of three classes is three channels
    for (_, row), image, (x, y, z) in zip(places, batch["image"], starts, strict=True):
        whole = data.cache.read([row])[0, :, x : x + 8, y : y + 4, z : z + 6]
        assert np.array_equal(image[0], whole[0])
        assert np.array_equal(image[1:].argmax(dim=0), whole[1] + 1)
    again = opened(volumes, tmp_path, patches=[8, 4, 6]).train_dataloader().dataset
    assert [again.start_of(*place) for place in places] == [*map(tuple, starts.tolist())]


def test_epochs_seeds_and_resumed_runs(volumes: Path, tmp_path: Path) -> None:
    data = opened(volumes, tmp_path, patches=[8, 8, 8])
    data.batch_size = 2
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    assert len(first) == 2
    assert not torch.equal(torch.cat(first).sort(dim=0).values, torch.cat(second).sort(0).values)
    resumed = opened(volumes, tmp_path, patches=[8, 8, 8])
    resumed.batch_size = 2
    (rest,) = epoch_of(resumed, 1, start=1)
    assert torch.equal(rest, second[1])
    other = opened(volumes, tmp_path, patches=[8, 8, 8], seed=1)
    places = [(0, row) for row in range(4)]
    starts = [
        [images.start_of(*place) for place in places]
        for images in (data.train_dataloader().dataset, other.train_dataloader().dataset)
    ]
    assert starts[0] != starts[1]
    # one cache serves all sizes of patches, and whole images
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {data.cache._folder.name}
    whole = opened(volumes, tmp_path)
    assert whole.cache._folder == data.cache._folder
    assert not whole.train_dataloader().dataset.random_patches
    assert whole.image.patches is False


def test_validation_and_pictures_take_the_middle(volumes: Path, tmp_path: Path) -> None:
    data = opened(volumes, tmp_path, patches=[8, 4, 6], source_channels=[1])
    middle = data.cache.read(range(6))[..., 2:10, 4:8, 2:8]
    batch = data.examples(range(6))
    assert np.array_equal(batch["image"], middle[:, :1])
    assert np.array_equal(batch["condition"]["source"], middle[:, 1:])
    assert not batch["augmented"]
    validated = torch.cat([batch["image"] for batch in data.val_dataloader()])
    assert np.array_equal(validated, middle[4:, :1])
    assert np.array_equal(torch.cat([b["image"] for b in data.every_image()]), middle[:, :1])


def test_geometry_of_patches(volumes: Path, tmp_path: Path) -> None:
    """They are centred, as they may be of any part; patches as large as the images lie there."""
    image = opened(volumes, tmp_path, patches=[8, 4, 6]).image
    assert image.spacing_mm == (2, 2, 3)
    assert image.patches
    centre = np.array(image.affine) @ [3.5, 1.5, 2.5, 1]
    assert np.allclose(centre, [0, 0, 0, 1])
    assert np.allclose(np.diag(image.affine), [2, 2, 3, 1])
    assert np.allclose(opened(volumes, tmp_path, patches=[12, 12, 10]).image.affine, AFFINE)


def test_augmentation_acts_on_the_patch(volumes: Path, tmp_path: Path) -> None:
    flip = [{"name": "RandomFlip", "axes": 0, "flip_probability": 1}]
    plain = opened(volumes, tmp_path, patches=[8, 8, 8]).train_dataloader().dataset
    flipped = opened(volumes, tmp_path, patches=[8, 8, 8], augmentation=flip)
    places = [(3, 0), (3, 2)]
    batch = flipped.train_dataloader().dataset.__getitems__(places)
    assert torch.equal(batch["image"], plain.__getitems__(places)["image"].flip(2))


def test_patches_of_slices(volumes: Path, tmp_path: Path) -> None:
    data = opened(volumes, tmp_path, slices="axial", patches=[8, 8])
    assert len(data.rows("train")) == 40
    batch = data.train_dataloader().dataset.__getitems__([(0, 0), (0, 7)])
    assert batch["image"].shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"patches": [8]}, r"patches \[8\]: two or three positive values are needed"),
        ({"patches": [8, 0, 8]}, r"patches \[8, 0, 8\]: two or three positive values"),
        ({"patches": [8, 8, 8], "slices": "axial"}, r"patches \[8, 8, 8\]: a slice has two sides"),
        (
            {"patches": [8, 32, 16], "size": [16, 16, 16]},
            r"patches \[8, 32, 16\]: data.size is \[16, 16, 16\], and a patch cannot be larger: at "
            r"most \[8, 16, 16\]",
        ),
        (
            {"patches": [8, 8], "size": [16, 16, 16]},
            r"patches \[8, 8\]: data.size is \[16, 16, 16\], which has 3 sides: as many are needed",
        ),
    ],
)
def test_impossible_patches(data: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        config.build({"data": data})


def test_patches_that_the_images_do_not_have(volumes: Path, tmp_path: Path) -> None:
    fault = (
        r"data\.patches \[8, 16, 8\] cannot be taken of 6 of the images:\n  - \S+p0\.nii\.gz is "
        r"12 x 12 x 10 as the model sees it, and a patch cannot be larger: at most \[8, 12, 8\]"
    )
    with pytest.raises(ImageError, match=fault):
        opened(volumes, tmp_path, patches=[8, 16, 8])
    with pytest.raises(ImageError, match="which has 3 sides: as many are needed"):
        opened(volumes, tmp_path, patches=[8, 8])


def test_patches_of_images_of_several_sizes(volumes: Path, tmp_path: Path) -> None:
    """They share a cache; without patches it is refused, as before."""
    for i in range(3):
        voxels = np.arange(12.0 * (12 + i) * 10).reshape(12, 12 + i, 10)
        nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / f"p{i}.nii.gz")
    cache = tmp_path / "cache"
    settings = config.build({"data": {"patches": [8, 13, 8], "validation_fraction": 0}}).data
    open_them = partial(DataModule, read_manifest(tmp_path), batch_size=2, seed=0, cache=cache)
    with pytest.raises(ImageError, match=r"of 1 of the images:\n.*p0.*at most \[8, 12, 8\]"):
        open_them(settings)
    settings = settings.model_copy(update={"patches": (8, 12, 8)})
    data = open_them(settings)
    assert data.sides == "12 x 12 x 10 to 12 x 14 x 10 in patches of 8 x 12 x 8"
    assert data.cache.shape == (3, 1, 12, 12, 10)
    images = data.train_dataloader().dataset
    places = [(epoch, row) for epoch in range(20) for row in range(3)]
    starts = np.array([images.start_of(*place) for place in places])
    assert [starts[row::3, 1].max() for row in range(3)] == [0, 1, 2]
    for (_, row), image, (x, y, z) in zip(
        places, images.__getitems__(places)["image"], starts, strict=True
    ):
        whole = data.cache.read([row])[0]
        assert whole.shape == (1, 12, 12 + row, 10)
        assert np.array_equal(image, whole[:, x : x + 8, y : y + 12, z : z + 8])
    assert np.allclose(np.array(data.image.affine) @ [3.5, 5.5, 3.5, 1], [0, 0, 0, 1])
    fault = r"shape \(12, 13, 10\), the others \(12, 12, 10\); data\.size: .* data\.patches"
    with pytest.raises(ImageError, match=fault):
        open_them(settings.model_copy(update={"patches": None}))
    with pytest.raises(
        ImageError, match=r"several sizes, such as \[12, 12, 10\] and \[12, 13, 10\]"
    ):
        data.cache.read([0, 1])
