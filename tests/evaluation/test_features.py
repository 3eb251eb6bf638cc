"""Tables of features: scaled alike, in order, of three planes, and no larger in memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from synthcube.data.manifest import Manifest, Row
from synthcube.errors import ImageError
from synthcube.evaluation.config import EvaluationConfig, ExtractorConfig
from synthcube.evaluation.features.extractors import Extractor, load_extractor
from synthcube.evaluation.features.tables import extract, scaled
from synthcube.evaluation.images import ImageSet

UNIT = ((0.0, 1.0),)


def corners(images: torch.Tensor) -> torch.Tensor:
    """The first pixel, the one to its right, the one below, and the sum."""
    x = images[:, 0]
    return torch.stack([x[:, 0, 0], x[:, 0, 1], x[:, 1, 0], x.sum(dim=(1, 2))], dim=1)


LOOK = Extractor("radiomic", "Pixels of a corner.", "", 4, False, False, False, corners)


def test_intensities_are_those_of_the_bounds():
    images = np.array([[[[-10.0, 0.0, 50.0, 100.0, 300.0]]]], np.float32)
    assert scaled(images, ((0, 100),)).ravel().tolist() == [0, 0, 0.5, 1, 1]


def test_each_channel_has_its_own_bounds():
    images = np.ones((2, 2, 3, 3), np.float32)
    found = scaled(images, ((0, 2), (-1, 1)))
    assert found[:, 0].tolist() == np.full((2, 3, 3), 0.5).tolist()
    assert (found[:, 1] == 1).all()


def test_rows_of_a_picture_run_down(image_set, tmp_path):
    """The first axis of a set runs to the right."""
    voxels = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4) / 20
    table = extract(image_set("p", voxels), LOOK, UNIT, EvaluationConfig(), tmp_path).planes[
        "image"
    ]
    right, below = voxels[0, 0, 1, 0], voxels[0, 0, 0, 1]
    assert table.rows()[0, :3].tolist() == [0, right, below]


def test_a_volume_is_seen_in_three_planes(image_set, tmp_path):
    voxels = np.random.default_rng(0).random((3, 1, 11, 12, 13)).astype(np.float32)
    config = EvaluationConfig(slices_per_plane=3)
    found = extract(image_set("v", voxels, raster=False), LOOK, UNIT, config, tmp_path)
    places = {"yz": (1, 5, 9), "xz": (1, 6, 10), "xy": (1, 6, 11)}
    for axis, (plane, cuts) in enumerate(places.items()):
        table = found.planes[plane]
        assert table.owners().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert table.rows_of(np.array([2, 0])).tolist() == [6, 7, 8, 0, 1, 2]
        sums = voxels.take(cuts, axis=2 + axis).sum(axis=tuple({2, 3, 4} - {2 + axis}))[:, 0]
        assert np.allclose(table.rows()[:, 3].reshape(3, 3), sums, rtol=1e-5)


def test_thin_volumes_have_fewer_slices(image_set, tmp_path):
    voxels = np.random.default_rng(0).random((2, 1, 9, 9, 3)).astype(np.float32)
    found = extract(image_set("v", voxels), LOOK, UNIT, EvaluationConfig(), tmp_path)
    assert [table.slices for table in found.planes.values()] == [7, 7, 3]


def test_a_volume_stays_whole_for_an_extractor_of_volumes(image_set, tmp_path):
    def volume_means(volumes: torch.Tensor) -> torch.Tensor:
        return volumes.mean(dim=(2, 3, 4))

    whole = replace(LOOK, volumes=True, dimension=1, compute=volume_means)
    voxels = np.random.default_rng(0).random((2, 2, 5, 6, 7)).astype(np.float32)
    found = extract(image_set("v", voxels), whole, UNIT * 2, EvaluationConfig(), tmp_path)
    assert list(found.planes) == ["image"]
    assert np.allclose(found.planes["image"].rows(), voxels.mean(axis=(2, 3, 4)), rtol=1e-5)


@pytest.mark.parametrize("number", [1, 127, 128, 300])
def test_every_image_is_there_once_and_in_order(image_set, tmp_path, number):
    voxels = np.random.default_rng(0).random((number, 1, 8, 8)).astype(np.float32)
    rows = extract(image_set("p", voxels), LOOK, UNIT, EvaluationConfig(), tmp_path)
    assert np.allclose(rows.planes["image"].rows()[:, 3], voxels.sum(axis=(1, 2, 3)), rtol=1e-5)


def test_colours_of_pictures_only(image_set, tmp_path):
    extractor = load_extractor(ExtractorConfig(), rank=2)
    voxels = np.random.default_rng(0).random((1, 3, 64, 64)).astype(np.float32)
    for raster, dimension in ((True, 1280), (False, 3840)):
        images = image_set("p", voxels, raster=raster)
        found = extract(images, extractor, UNIT * 3, EvaluationConfig(), tmp_path)
        assert found.planes["image"].dimension == dimension


def test_features_that_are_not_finite_are_refused(image_set, tmp_path):
    broken = replace(LOOK, compute=lambda x: corners(x) * torch.nan)
    images = image_set("p", np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(ImageError, match="p: the features of radiomic are not finite"):
        extract(images, broken, UNIT, EvaluationConfig(), tmp_path)


def test_the_same_images_give_the_same_features(image_set, tmp_path):
    extractor = load_extractor(ExtractorConfig(), rank=2)
    voxels = np.random.default_rng(0).random((3, 1, 32, 32)).astype(np.float32)
    found = [
        extract(image_set("p", voxels), extractor, UNIT, EvaluationConfig(), tmp_path)
        .planes["image"].rows().copy()
        for _ in range(2)
    ]  # fmt: skip
    assert np.array_equal(*found)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """What Python and numpy hold at most, of 4 and of 34 MB of images."""
    peaks = []
    for number in (256, 2048):
        path = tmp_path / f"{number}.f32"
        np.zeros((number, 64 * 64), np.float32).tofile(path)
        rows = tuple(Row((path,), str(i)) for i in range(number))
        images = ImageSet(
            "p", Manifest(path, rows), (1, 64, 64), (1.0, 1.0, 1.0), True, 0, (), "", UNIT, path
        )
        tracemalloc.start()
        extract(images, LOOK, UNIT, EvaluationConfig(), tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
