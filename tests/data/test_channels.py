"""Channels that are masks, and images with a range of their own."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from synthcube import config
from synthcube.data.channels import (
    class_indices,
    class_values,
    decoded,
    encoded,
    files_of,
    probable_masks,
    require_classes,
)
from synthcube.data.images import Image
from synthcube.data.preprocessing import DataConfig, Preprocessing
from synthcube.errors import ConfigError, ImageError
from synthcube.schema import ImageSpec

MASK = {"kind": "mask", "classes": [0, 1, 2]}


def image_of(tensor: torch.Tensor, spacing: float = 1.0) -> Image:
    return Image(tensor.float(), np.diag([spacing] * 3 + [1.0]), "nii.gz", (False,) * 9, False)


def data_config(channels: dict, **settings) -> DataConfig:
    return config.build({"data": {"channels": channels, **settings}}).data


def spec(masks: dict[int, tuple[int, ...]], channels: int = 2, **changes) -> ImageSpec:
    values = {
        "size": (4, 4, 4), "channels": channels, "spacing_mm": (1.0, 1.0, 1.0),
        "affine": np.eye(4).tolist(), "intensity_range": [(0.0, 1.0)] * channels,
        "file_format": "nii.gz", "masks": masks,
    }  # fmt: skip
    return ImageSpec(**values | changes)


def ct_and_mask() -> torch.Tensor:
    """A ball of three classes around the middle, (2, 12, 12, 12)."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(12)] * 3, indexing="ij")).float() - 5.5
    distance = grid.square().sum(0).sqrt()
    mask = (distance < 5).float() + (distance < 2.5)
    return torch.stack([torch.where(mask > 0, 40.0, -800.0) + distance, mask])


@pytest.mark.parametrize("classes", [(0, 1), (0, 1, 2), (0, 1, 2, 4), (3, -1, 7, 0, 255)])
def test_encoding_and_decoding_give_the_same_classes(classes: tuple[int, ...]) -> None:
    places = torch.randint(len(classes), (3, 1, 4, 5, 6)).float()
    images = torch.cat([torch.rand(3, 1, 4, 5, 6), places / (len(classes) - 1) * 2 - 1], dim=1)
    network = encoded(images, {1: classes})
    assert network.shape[1] == 1 + (1 if len(classes) == 2 else len(classes))
    assert set(network[:, 1:].unique().tolist()) == {-1.0, 1.0}
    assert torch.allclose(decoded(network, {1: classes}), images)
    noisy = network + 0.3 * torch.randn(network.shape).clamp(-2, 2)
    assert torch.allclose(decoded(noisy, {1: classes})[:, 1], images[:, 1])
    values = class_values(places, classes)
    assert set(values.unique().tolist()) <= set(map(float, classes))
    assert torch.equal(class_indices(values, classes), places)


def test_a_network_sees_as_many_channels_as_it_is_told() -> None:
    image = spec({0: (0, 1), 2: (0, 1, 2, 4)}, channels=3)
    batch = torch.rand(2, 3, 4, 4, 4) * 2 - 1
    assert image.encoded.channels == encoded(batch, image.masks).shape[1] == 6
    assert image.encoded.masks == {}
    assert image.encoded.encoded == image.encoded
    plain = spec({}, channels=3)
    assert plain.encoded is plain


def test_masks_keep_their_classes_and_images_their_range() -> None:
    ct = {"kind": "image", "intensity_range": [-1000, 400]}
    settings = data_config({0: ct, 1: MASK}, size=[7, 9, 5])
    prepared = Preprocessing(settings)(image_of(ct_and_mask()))
    assert set(prepared.tensor[1].unique().tolist()) == {-1.0, 0.0, 1.0}
    assert prepared.intensity_range == ((-1000.0, 400.0), (0.0, 2.0))
    assert len(prepared.tensor[0].unique()) > 20


def test_resampling_takes_the_nearest_voxel_of_a_mask() -> None:
    tensor = ct_and_mask()
    settings = data_config({1: MASK}, spacing_mm=[3, 3, 3])
    placed, affine = Preprocessing(settings).placed(image_of(tensor))
    assert placed.shape == (2, 4, 4, 4)
    assert torch.equal(placed[1], tensor[1, 1::3, 1::3, 1::3])
    assert np.allclose(affine[:3, 3], 1)
    finer, _ = Preprocessing(data_config({1: MASK}, spacing_mm=[0.5] * 3)).placed(image_of(tensor))
    assert torch.equal(finer[1, ::2, ::2, ::2], tensor[1])
    assert torch.equal(finer[1, 1::2, 1::2, 1::2], tensor[1])


def test_what_is_padded_is_background_in_a_mask_and_the_minimum_in_an_image() -> None:
    tensor = ct_and_mask()[:, 4:8, 4:8, 4:8]
    assert tensor[1].min() > 0
    settings = data_config({1: MASK}, size=[6, 6, 6], fit="crop_or_pad")
    placed, _ = Preprocessing(settings).placed(image_of(tensor))
    assert (placed[1, 0] == 0).all()
    assert (placed[0, 0] == tensor[0].min()).all()


def test_torchio_transforms_masks_as_labels() -> None:
    tensor = ct_and_mask()
    steps = [
        {"name": "Affine", "scales": 1.3, "degrees": 20, "translation": 0},
        {"name": "Gamma", "gamma": 1.5},
    ]
    settings = data_config({1: MASK}, preprocessing=steps)
    placed, _ = Preprocessing(settings).placed(image_of(tensor))
    assert set(placed[1].unique().tolist()) == {0.0, 1.0, 2.0}
    # the ball is larger in both channels alike, and the gamma changed the image alone
    assert (placed[1] > 0).sum() > (tensor[1] > 0).sum() * 1.5
    inside, outside = placed[0][placed[1] == 2], placed[0][placed[1] == 0]
    assert inside.mean() > outside.mean() + 300


def test_z_score_and_percentiles_of_a_channel() -> None:
    tensor = torch.stack([torch.randn(20, 20, 20) * 50 + 1000, torch.rand(20, 20, 20)])
    channels = {
        0: {"kind": "image", "normalisation": "z_score"},
        1: {"kind": "image", "percentiles": [10, 90]},
    }
    prepared = Preprocessing(data_config(channels, intensity_range=[0, 5]))(image_of(tensor))
    (low, high), (first, last) = prepared.intensity_range
    assert (low, high) == pytest.approx((850, 1150), abs=10)
    assert (first, last) == pytest.approx((0.1, 0.9), abs=0.02)


def test_an_empty_mask_is_no_fault_and_a_flat_image_is() -> None:
    tensor = ct_and_mask()
    tensor[1] = 0
    assert (Preprocessing(data_config({1: MASK}))(image_of(tensor)).tensor[1] == -1).all()
    tensor[0] = 7
    with pytest.raises(ImageError, match="constant image: every voxel is 7"):
        Preprocessing(data_config({1: MASK}))(image_of(tensor))


def test_other_values_in_a_mask_are_named() -> None:
    tensor = ct_and_mask()
    tensor[1, 0, 0, :2] = torch.tensor([0.5, 4.0])
    with pytest.raises(
        ImageError,
        match=r"channel 1 is a mask and holds 0\.5, 4; data\.channels\.1\.classes are \[0, 1, 2\]",
    ):
        Preprocessing(data_config({1: MASK})).placed(image_of(tensor))
    with pytest.raises(
        ImageError, match=r"has 2 channel\(s\), counted from 0; data.channels names 5"
    ):
        Preprocessing(data_config({5: MASK})).placed(image_of(ct_and_mask()))
    rounded = require_classes(torch.full((1, 2, 2), 0.9999), {0: (0, 1)})
    assert (rounded == 1).all()


def test_files_of_an_image_with_masks() -> None:
    assert files_of(spec({}, 3)) == [([0, 1, 2], "")]
    assert files_of(spec({1: (0, 1)}, 3)) == [
        ([0], "_image_0"), ([1], "_mask_1"), ([2], "_image_2"),
    ]  # fmt: skip
    picture = spec({3: (0, 1)}, 4, size=(4, 4), file_format="png")
    assert files_of(picture) == [([0, 1, 2], "_image_0"), ([3], "_mask_3")]


def test_probable_masks_are_channels_of_few_whole_numbers() -> None:
    images = [ct_and_mask(), ct_and_mask()]
    images[1][1] *= 2  # 4 is in the second image alone
    assert probable_masks(images) == {1: (0, 1, 2, 4)}
    assert probable_masks([torch.zeros(1, 4, 4)]) == {}
    assert probable_masks([torch.arange(64.0).view(1, 8, 8)]) == {}


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        ({1: {"kind": "mask", "classes": [0]}}, r"data\.channels\.1\.classes: .*at least 2 items"),
        (
            {1: {"kind": "mask", "classes": [0, 1, 1]}},
            r"classes \[0, 1, 1\]: none may be there twice",
        ),
        ({0: {"kind": "label"}}, r"data\.channels\.0: .*'image', 'mask'"),
        ({0: {"kind": "image", "intensity_range": [3, 1]}}, r"the first must be below the second"),
        (
            {0: {"kind": "image", "intensity_range": [0, 1], "percentiles": [1, 99]}},
            r"intensity_range and percentiles: only one of them",
        ),
        (
            {1: {"kind": "mask", "interpolation": 1}},
            r"data\.channels\.1\.interpolation: unknown key; known: kind, classes",
        ),
        ({-1: {"kind": "mask"}}, r"data\.channels\.-1"),
    ],
)
def test_faulty_channels_are_explained(channels: dict, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.build({"data": {"channels": channels}})
    assert re.search(text, str(error.value)), str(error.value)


def test_channels_survive_json_and_overrides() -> None:
    settings = config.build({"data": {"channels": {1: MASK}}}, ["data.channels.1.classes=[0, 5]"])
    assert settings.data.masks == {1: (0, 5)}
    assert config.build(settings.dump()).data == settings.data
    image = spec({1: (0, 5)})
    assert ImageSpec.model_validate_json(image.model_dump_json()) == image


def test_masks_of_the_channels_that_are_made() -> None:
    settings = data_config({0: MASK, 2: {"kind": "mask", "classes": [0, 1]}})
    settings = settings.model_copy(update={"source_channels": (0,)})
    assert settings.target_masks == {1: (0, 1)}
    assert settings.selected([2, 1]).masks == {0: (0, 1)}
