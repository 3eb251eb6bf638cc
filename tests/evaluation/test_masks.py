"""Sizes and overlap of the classes of masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from synthcube.evaluation.gallery import gallery
from synthcube.evaluation.masks import compare_masks

CLASSES = {1: (0, 1, 3)}


def masks(sizes: list[tuple[int, int]], side: int = 8) -> np.ndarray:
    """(N, 2, side, side): noise, and a mask with so many voxels of class 1 and of class 3."""
    images = np.zeros((len(sizes), 2, side * side), np.float32)
    images[:, 0] = np.random.default_rng(0).normal(100, 9, images[:, 0].shape)
    for image, (ones, threes) in zip(images, sizes, strict=True):
        image[1, :ones] = 1
        image[1, ones : ones + threes] = 3
    return images.reshape(len(sizes), 2, side, side)


def test_sizes_beside_those_of_the_labels(image_set) -> None:
    ours = [(4, 2), (8, 0), (6, 1), (2, 0)]
    theirs = [(10, 2), (12, 2), (14, 4), (8, 0)]
    predictions = replace(image_set("predictions", masks(ours)), masks=CLASSES)
    labels = replace(image_set("labels", masks(theirs)), masks=CLASSES)
    section = compare_masks(predictions, labels, None, seed=0)
    area = section.measures["area_channel_1_class_1"]
    assert (area.value, area.real_baseline) == (5, 11)
    assert section.measures["area_channel_1_class_3"].value == 0.75
    present = section.measures["present_channel_1_class_3"]
    assert (present.value, present.real_baseline) == (0.5, 0.75)
    distance = section.measures["area_distance_channel_1_class_1"]
    assert distance.value == pytest.approx(wasserstein_distance([4, 8, 6, 2], [10, 12, 14, 8]) / 11)
    assert distance.real_baseline is not None
    assert not any(name.startswith("dice") for name in section.measures)
    assert "area_channel_1_class_0" not in section.measures


def test_volumes_are_millilitres(image_set) -> None:
    voxels = np.zeros((3, 1, 4, 4, 4), np.float32)
    voxels[:, 0, 0] = 1
    sets = [
        replace(image_set(name, voxels), masks={0: (0, 1)}, spacing_mm=(2.0, 3.0, 5.0))
        for name in ("predictions", "labels")
    ]
    section = compare_masks(*sets, None, seed=0)
    assert section.measures["volume_channel_0_class_1"].value == pytest.approx(16 * 30 / 1000)


def test_dice_of_pairs(image_set) -> None:
    """Of voxels from the first on: 4 of 8 overlap, 6 of 6, and class 3 is in one of them alone."""
    predictions = replace(image_set("predictions", masks([(4, 0), (6, 0)])), masks=CLASSES)
    labels = replace(image_set("labels", masks([(8, 0), (6, 2)])), masks=CLASSES)
    section = compare_masks(predictions, labels, [(0, 0), (1, 1)], seed=0)
    dice = section.measures["dice_channel_1_class_1"]
    assert dice.value == pytest.approx((2 * 4 / 12 + 1) / 2)
    assert dice.real_baseline == pytest.approx(2 * 6 / 14)
    other = section.measures["dice_channel_1_class_3"]
    assert (other.value, other.count) == (0, 1)
    assert "1 of 2 pairs have the class in neither image" in other.reason
    assert section.cases[0]["dice_channel_1_class_3"] is None


def test_a_class_that_no_label_has(image_set) -> None:
    predictions = replace(image_set("predictions", masks([(4, 1), (6, 1)])), masks=CLASSES)
    labels = replace(image_set("labels", masks([(8, 0), (6, 0)])), masks=CLASSES)
    section = compare_masks(predictions, labels, None, seed=0)
    assert section.measures["area_distance_channel_1_class_3"].reason == "no label has the class"


def test_images_are_judged_without_their_masks(image_set) -> None:
    images = replace(image_set("labels", masks([(4, 1), (6, 1)])), masks=CLASSES)
    alone = images.without_masks()
    assert alone.shape == (1, 8, 8)
    assert np.array_equal(alone.read([0, 1])[:, 0], images.read([0, 1])[:, 0])
    assert alone.bounds == images.bounds[:1]
    assert image_set("labels", masks([(4, 1)])).without_masks().shape == (2, 8, 8)
    only_mask = replace(image_set("labels", masks([(4, 1)])[:, 1:]), masks={0: (0, 1, 3)})
    assert only_mask.without_masks() is only_mask


def test_masks_stand_beside_their_image_in_the_gallery(image_set) -> None:
    """Three channels, one of them a mask, are no colours; of a colour picture it stands beside."""
    images = np.concatenate([masks([(4, 1), (6, 1)])[:, :1], masks([(4, 1), (6, 1)])], axis=1)
    labels = replace(image_set("labels", images), masks={2: (0, 1, 3)})
    picture = gallery(labels, labels, None, seed=0)
    shown = picture.rows[0][0]
    assert shown.shape == (8, 24)
    assert np.allclose(np.unique(shown[:, 16:]), [0, 1 / 3, 1])
    colours = np.concatenate([images[:, :1]] * 3 + [images[:, 2:]], axis=1)
    labels = replace(image_set("coloured", colours), masks={3: (0, 1, 3)})
    assert gallery(labels, labels, None, seed=0).rows[0][0].shape == (8, 16, 3)
