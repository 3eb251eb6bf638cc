"""Extractors and tables of features: which, with which weights, in which order."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch

from synthcube.data.cache import Float32Rows
from synthcube.data.manifest import Manifest, Row
from synthcube.errors import ArtifactError, ConfigError, FamilyError, ImageError
from synthcube.evaluation.config import EvaluationConfig, ExtractorConfig
from synthcube.evaluation.extractors import Extractor, load_extractor
from synthcube.evaluation.features import extract, scaled
from synthcube.evaluation.sets import ImageSet
from synthcube.models.nets.perceptual import load_efficientnet
from synthcube.storage import sha256

OFFLINE = ("efficientnet-lite0", "radiomic")


def pictures(number: int = 3, channels: int = 1, side: int = 32) -> torch.Tensor:
    return torch.rand(number, channels, side, side, generator=torch.Generator().manual_seed(0))


def resnet50_weights() -> dict[str, torch.Tensor]:
    from monai.networks.nets.resnet import resnet50

    torch.manual_seed(0)
    network = resnet50(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, feed_forward=False,
        bias_downsample=False,
    )  # fmt: skip
    return network.state_dict()


@pytest.mark.parametrize("name", OFFLINE)
def test_features_of_an_image_do_not_hang_on_the_others(name):
    extractor = load_extractor(ExtractorConfig(name=name), rank=2)
    images = pictures(5)
    together = extractor(images, colour=False)
    alone = torch.cat([extractor(image[None], colour=False) for image in images])
    assert together.shape == (5, extractor.dimension)
    assert torch.allclose(together, alone, atol=1e-4)
    assert together.std(dim=0).max() > 1e-3


@pytest.mark.parametrize("name", OFFLINE)
def test_channels_that_changed_places_are_seen(name):
    extractor = load_extractor(ExtractorConfig(name=name), rank=2)
    images = pictures(2, channels=2)
    features, turned = extractor(images, False), extractor(images.flip(1), False)
    size = extractor.dimension
    assert features.shape == (2, 2 * size)
    assert torch.allclose(features[:, :size], turned[:, size:], atol=1e-4)
    assert not torch.allclose(features, turned, atol=1e-2)


def test_colours_are_seen_together_where_the_network_knows_them():
    images = pictures(2, channels=3, side=64)
    network = load_extractor(ExtractorConfig(), rank=2)
    assert network(images, colour=True).shape == (2, 1280)
    assert network(images, colour=False).shape == (2, 3 * 1280)
    assert load_extractor(ExtractorConfig(name="radiomic"), 2)(images, True).shape == (2, 90)


def test_efficientnet_gives_the_features_of_its_package():
    network, path = load_efficientnet()
    extractor = load_extractor(ExtractorConfig(), rank=2)
    images = pictures(2, channels=3, side=64)
    with torch.inference_mode():
        expected = network.extract_features(images * 2 - 1).mean(dim=(2, 3))
        features = extractor(images, colour=True)
    assert torch.allclose(features, expected, atol=1e-3)
    assert extractor.sha256 == sha256(path)


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("synthcube.models.nets.perceptual.find_spec", lambda name: None)
    with pytest.raises(FamilyError, match=r"pip install 'synthcube\[perceptual\]', or choose"):
        load_extractor(ExtractorConfig(), rank=2)


@pytest.mark.parametrize(
    ("name", "comparable"),
    [("efficientnet-lite0", True), ("radiomic", False)],
)
def test_what_compares_with_other_peoples_numbers(name, comparable):
    facts = load_extractor(ExtractorConfig(name=name), rank=2).record
    assert facts["comparable"] is comparable
    assert ("nobody else" in facts["what"]) is not comparable


def test_radiomic_features_of_known_images():
    extractor = load_extractor(ExtractorConfig(name="radiomic"), rank=2)
    flat = torch.full((1, 1, 16, 16), 0.5)
    ramp = torch.linspace(0, 1, 16).repeat(1, 1, 16, 1)
    of_flat, of_ramp = extractor(flat, False)[0], extractor(ramp, False)[0]
    assert of_flat[[0, 1, 8]].tolist() == pytest.approx([0.5, 0, 0.5])  # mean, deviation, median
    assert of_flat[12:18].abs().max() == 0  # no gradient
    assert of_flat[18:24].tolist() == pytest.approx([0, 0, 1, 1, 1, 0])  # one grey level
    assert of_ramp[1] == pytest.approx(
        torch.linspace(0, 1, 16).std(unbiased=False).item(), abs=1e-5
    )
    assert of_ramp[12] == pytest.approx(1 / 15, abs=1e-5)  # of a slope
    # 16 levels, of which neighbours across differ by one in 3 of 4 directions
    pairs = np.array([15 * 16, 15 * 15, 15 * 15])
    share = pairs.sum() / (pairs.sum() + 16 * 15)
    assert of_ramp[19] == pytest.approx(share / 15, abs=1e-5)


@pytest.mark.parametrize("prefix", ["module.", "backbone."])
def test_radimagenet_takes_the_names_of_its_weights(tmp_path, prefix):
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    weights = resnet50_weights()
    if prefix == "backbone.":
        first = {name: name.split(".", 1) for name in weights}
        named = {f"backbone.{numbers[a]}.{b}": weights[name] for name, (a, b) in first.items()}
    else:
        named = {prefix + name: value for name, value in weights.items()}
        named["fc.weight"] = torch.zeros(165, 2048)
    path = tmp_path / "weights.pt"
    torch.save(named, path)
    extractor = load_extractor(ExtractorConfig(name="radimagenet", weights=str(path)), rank=2)
    from monai.networks.nets.resnet import ResNet

    assert isinstance(extractor.network, ResNet)
    loaded = extractor.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert extractor.sha256 == sha256(path)
    with torch.inference_mode():
        assert extractor(pictures(1), False).shape == (1, 2048)


class KerasBottleneck(torch.nn.Module):
    """A block as Keras has it, written out: stride first, biases everywhere."""

    def __init__(self, num_in: int, planes: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        for i, (a, b, side, step) in enumerate(
            ((num_in, planes, 1, stride), (planes, planes, 3, 1), (planes, 4 * planes, 1, 1)), 1
        ):
            self.add_module(f"conv{i}", torch.nn.Conv2d(a, b, side, step, side // 2))
            self.add_module(f"bn{i}", torch.nn.BatchNorm2d(b, eps=1.001e-5))
        self.downsample = shortcut and torch.nn.Sequential(
            torch.nn.Conv2d(num_in, 4 * planes, 1, stride),
            torch.nn.BatchNorm2d(4 * planes, eps=1.001e-5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + (self.downsample(x) if self.downsample else x)).relu()


def keras_resnet() -> torch.nn.Sequential:
    layers = {
        "conv1": torch.nn.Conv2d(3, 64, 7, 2, 3),
        "bn1": torch.nn.BatchNorm2d(64, eps=1.001e-5),
        "relu": torch.nn.ReLU(),
        "maxpool": torch.nn.MaxPool2d(3, 2, 1),
    }
    num_in = 64
    for i, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        blocks_in_layer = []
        for block in range(blocks):
            blocks_in_layer.append(
                KerasBottleneck(num_in, planes, 1 + (i > 1 and not block), not block)
            )
            num_in = 4 * planes
        layers[f"layer{i}"] = torch.nn.Sequential(*blocks_in_layer)
    return torch.nn.Sequential(OrderedDict(layers))


def test_radimagenet_of_monai_is_the_network_of_keras(tmp_path):
    torch.manual_seed(0)
    reference = keras_resnet().eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path / "RadImageNet-ResNet50_notop.pth"
    torch.save(reference.state_dict(), path)
    extractor = load_extractor(ExtractorConfig(name="radimagenet", weights=str(path)), rank=2)
    images = pictures(2, channels=3, side=64)
    mean = torch.tensor([0.406, 0.456, 0.485])[:, None, None]
    with torch.inference_mode():
        expected = reference(images.flip(1) - mean).mean(dim=(2, 3))
        assert torch.allclose(extractor(images, colour=True), expected, rtol=1e-3, atol=1e-5)
    assert "MONAI" in extractor.what


@pytest.mark.parametrize("depth", [10, 50])
def test_medicalnet_is_of_the_depth_of_its_weights(tmp_path, depth):
    from monai.networks.nets.resnet import ResNetFeatures

    torch.manual_seed(0)
    reference = ResNetFeatures(f"resnet{depth}", pretrained=False)
    path = tmp_path / "medicalnet.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, path)
    extractor = load_extractor(ExtractorConfig(name="medicalnet", weights=str(path)), rank=3)
    assert f"ResNet{depth} " in extractor.what
    volumes = torch.rand(2, 1, 16, 16, 16)
    with torch.inference_mode():
        features = extractor(volumes, colour=False)
        expected = reference.eval()((volumes[1:] - volumes[1].mean()) / volumes[1].std())[-1]
    assert features.shape == (2, 2048 if depth == 50 else 512)
    assert torch.allclose(features[1], expected.mean(dim=(2, 3, 4))[0], atol=1e-4)


def test_medicalnet_refuses_pictures(tmp_path):
    config = ExtractorConfig(name="medicalnet", weights=str(tmp_path / "w.pth"))
    with pytest.raises(ConfigError, match="these images are 2D"):
        load_extractor(config, rank=2)


@pytest.mark.parametrize("name", ["radimagenet", "medicalnet"])
def test_wrong_weights_are_refused_with_their_names(tmp_path, name):
    def refusal(content: object, error: type[Exception] = ArtifactError) -> str:
        path = tmp_path / "weights.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(error, match=r"weights\.pt") as caught:
            load_extractor(ExtractorConfig(name=name, weights=str(path)), rank=3)
        return str(caught.value)

    assert "there is no file" in refusal(None, ConfigError)
    assert "cannot be read as plain weights" in refusal(b"damaged")
    assert "does not hold the weights of" in refusal({"a.weight": torch.zeros(2)})
    assert "cannot be read as plain weights" in refusal(torch.nn.Linear(2, 2))


def test_a_missing_and_a_strange_weight_are_named(tmp_path):
    weights = resnet50_weights()
    del weights["layer4.2.bn3.bias"]
    weights["layer1.0.conv1.bias"] = torch.zeros(64)
    path = tmp_path / "weights.pt"
    torch.save(weights, path)
    expected = "layer4.2.bn3.bias is missing, layer1.0.conv1.bias is unknown"
    with pytest.raises(ArtifactError, match=expected):
        load_extractor(ExtractorConfig(name="radimagenet", weights=str(path)), rank=2)


def test_inception_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("synthcube.evaluation.extractors.find_spec", lambda name: None)
    config = ExtractorConfig(name="inception", weights=str(tmp_path / "w.pth"))
    with pytest.raises(ConfigError, match="pip install torch-fidelity"):
        load_extractor(config, rank=2)


def test_inception_is_that_of_torch_fidelity(tmp_path, monkeypatch):
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:
        patch.setattr(package, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        reference = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(reference.state_dict(), path)
    extractor = load_extractor(ExtractorConfig(name="inception", weights=str(path)), rank=2)
    images = pictures(2)
    with torch.inference_mode():
        features = extractor(images, colour=False)
        expected = reference((images.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8))[0]
    assert torch.equal(features, expected)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="does not hold the weights of the InceptionV3"):
        load_extractor(ExtractorConfig(name="inception", weights=str(path)), rank=2)


UNIT = ((0.0, 1.0),)


def corners(images: torch.Tensor) -> torch.Tensor:
    """The first pixel, the one to its right, the one below, and the sum."""
    x = images[:, 0]
    return torch.stack([x[:, 0, 0], x[:, 0, 1], x[:, 1, 0], x.sum(dim=(1, 2))], dim=1)


CORNERS = Extractor(
    "radiomic", "Pixels of a corner.", "", 4, corners, comparable=False, colours=False
)


def test_intensities_are_those_of_the_bounds():
    images = np.array([[[[-10.0, 0.0, 50.0, 100.0, 300.0]]]], np.float32)
    assert scaled(images, ((0, 100),)).ravel().tolist() == [0, 0, 0.5, 1, 1]


def test_each_channel_has_its_own_bounds():
    images = np.ones((2, 2, 3, 3), np.float32)
    features = scaled(images, ((0, 2), (-1, 1)))
    assert features[:, 0].tolist() == np.full((2, 3, 3), 0.5).tolist()
    assert (features[:, 1] == 1).all()


def test_rows_of_a_picture_run_down(image_set, tmp_path):
    """The first axis of a set runs to the right."""
    voxels = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4) / 20
    table = extract(image_set("p", voxels), CORNERS, UNIT, EvaluationConfig(), tmp_path).planes[
        "image"
    ]
    right, below = voxels[0, 0, 1, 0], voxels[0, 0, 0, 1]
    assert table.rows()[0, :3].tolist() == [0, right, below]


def test_a_volume_is_seen_in_three_planes(image_set, tmp_path):
    voxels = np.random.default_rng(0).random((3, 1, 11, 12, 13)).astype(np.float32)
    config = EvaluationConfig(slices_per_plane=3)
    features = extract(image_set("v", voxels, raster=False), CORNERS, UNIT, config, tmp_path)
    places = {"yz": (1, 5, 9), "xz": (1, 6, 10), "xy": (1, 6, 11)}
    for axis, (plane, cuts) in enumerate(places.items()):
        table = features.planes[plane]
        assert table.owners().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert table.rows_of(np.array([2, 0])).tolist() == [6, 7, 8, 0, 1, 2]
        sums = voxels.take(cuts, axis=2 + axis).sum(axis=tuple({2, 3, 4} - {2 + axis}))[:, 0]
        assert np.allclose(table.rows()[:, 3].reshape(3, 3), sums, rtol=1e-5)


def test_thin_volumes_have_fewer_slices(image_set, tmp_path):
    voxels = np.random.default_rng(0).random((2, 1, 9, 9, 3)).astype(np.float32)
    features = extract(image_set("v", voxels), CORNERS, UNIT, EvaluationConfig(), tmp_path)
    assert [table.slices for table in features.planes.values()] == [7, 7, 3]


def test_a_volume_stays_whole_for_an_extractor_of_volumes(image_set, tmp_path):
    def volume_means(volumes: torch.Tensor) -> torch.Tensor:
        return volumes.mean(dim=(2, 3, 4))

    whole = replace(CORNERS, volumes=True, dimension=1, compute=volume_means)
    voxels = np.random.default_rng(0).random((2, 2, 5, 6, 7)).astype(np.float32)
    features = extract(image_set("v", voxels), whole, UNIT * 2, EvaluationConfig(), tmp_path)
    assert list(features.planes) == ["image"]
    assert np.allclose(features.planes["image"].rows(), voxels.mean(axis=(2, 3, 4)), rtol=1e-5)


@pytest.mark.parametrize("number", [1, 127, 128, 300])
def test_every_image_is_there_once_and_in_order(image_set, tmp_path, number):
    voxels = np.random.default_rng(0).random((number, 1, 8, 8)).astype(np.float32)
    rows = extract(image_set("p", voxels), CORNERS, UNIT, EvaluationConfig(), tmp_path)
    assert np.allclose(rows.planes["image"].rows()[:, 3], voxels.sum(axis=(1, 2, 3)), rtol=1e-5)


def test_colours_of_pictures_only(image_set, tmp_path):
    extractor = load_extractor(ExtractorConfig(), rank=2)
    voxels = np.random.default_rng(0).random((1, 3, 64, 64)).astype(np.float32)
    for raster, dimension in ((True, 1280), (False, 3840)):
        images = image_set("p", voxels, raster=raster)
        features = extract(images, extractor, UNIT * 3, EvaluationConfig(), tmp_path)
        assert features.planes["image"].dimension == dimension


def test_features_that_are_not_finite_are_refused(image_set, tmp_path):
    broken = replace(CORNERS, compute=lambda x: corners(x) * torch.nan)
    images = image_set("p", np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(ImageError, match="p: the features of radiomic are not finite"):
        extract(images, broken, UNIT, EvaluationConfig(), tmp_path)


def test_the_same_images_give_the_same_features(image_set, tmp_path):
    extractor = load_extractor(ExtractorConfig(), rank=2)
    voxels = np.random.default_rng(0).random((3, 1, 32, 32)).astype(np.float32)
    features = [
        extract(image_set("p", voxels), extractor, UNIT, EvaluationConfig(), tmp_path)
        .planes["image"].rows().copy()
        for _ in range(2)
    ]  # fmt: skip
    assert np.array_equal(*features)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """What Python and numpy hold at most, of 4 and of 34 MB of images."""
    peaks = []
    for number in (256, 2048):
        path = tmp_path / f"{number}.f32"
        np.zeros((number, 64 * 64), np.float32).tofile(path)
        rows = tuple(Row((path,), str(i)) for i in range(number))
        images = ImageSet(
            "p",
            Manifest(path, rows),
            (1.0, 1.0, 1.0),
            True,
            0,
            (),
            "",
            UNIT,
            Float32Rows(path, (1, 64, 64)),
        )
        tracemalloc.start()
        extract(images, CORNERS, UNIT, EvaluationConfig(), tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
