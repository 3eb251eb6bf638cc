"""Feature extractors by name: pretrained networks, averaged over the image, and radiomics."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from synthcube.errors import ArtifactError, ConfigError, first_faults
from synthcube.evaluation import radiomic
from synthcube.evaluation.config import ExtractorConfig, ExtractorName
from synthcube.models.legacy import read_weights
from synthcube.models.nets.perceptual import enlarged, load_efficientnet, require_efficientnet
from synthcube.storage import sha256

_KEY = "evaluation.extractor"
_FAULTS_SHOWN = 3
_BGR_MEAN = (0.406, 0.456, 0.485)
# depth of a ResNet by the blocks of its layers; with bottlenecks and without
_BOTTLENECK: dict[tuple[int, ...], int] = {
    (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152, (3, 24, 36, 3): 200
}  # fmt: skip
_BASIC: dict[tuple[int, ...], int] = {(1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
_KERAS_EPSILON = 1.001e-5


@dataclass(frozen=True, slots=True)
class Extractor:
    """A function from images to features, and what a reader must know about it."""

    name: ExtractorName
    what: str  # in a sentence
    sha256: str  # of the file of its weights; empty for none
    dimension: int
    """Numbers for each grey (or colour) image; several channels give as many times more."""
    compute: Callable[[torch.Tensor], torch.Tensor]
    """(N, C, *spatial) in [0, 1], C 3 for a network of photographs and 1 else, to (N, dimension)"""
    network: Any = None  # with the weights that `compute` uses; None for none
    comparable: bool = True
    """Whether others use the same features, so that numbers may stand beside theirs."""
    volumes: bool = False  # takes whole volumes, (N, 1, X, Y, Z), instead of slices
    colours: bool = True  # sees RGB together; otherwise each channel is a grey image

    def __call__(self, images: torch.Tensor, colour: bool) -> torch.Tensor:
        """(N, C, *spatial), float32 in [0, 1], pictures with rows down, to (N, D), float32.

        Args:
            colour: the three channels are red, green and blue. Otherwise every channel is a grey
                image and their features stand side by side, D = C * dimension, so that swapped
                channels are noticed.
        """
        if colour and self.colours:
            return self.compute(images)
        grey = images.flatten(0, 1)[:, None]
        if self.colours:
            grey = grey.expand(-1, 3, *[-1] * (grey.ndim - 2))
        return self.compute(grey).reshape(len(images), -1)

    @property
    def record(self) -> dict[str, Any]:
        """For results.yaml."""
        return {
            "name": self.name, "what": self.what, "sha256": self.sha256 or None,
            "dimension": self.dimension, "comparable": self.comparable,
        }  # fmt: skip


def require_extractor(config: ExtractorConfig, rank: int) -> None:
    """Check before any image is read that the extractor is available.

    Args:
        rank: number of spatial axes of the images.
    """
    if config.name == "efficientnet-lite0":
        require_efficientnet(f"{_KEY} {config.name}", "choose another extractor, such as radiomic")
    if config.name == "inception" and not find_spec("torch_fidelity"):
        raise ConfigError(
            f"{_KEY} inception needs the package torch-fidelity, which is not installed: "
            "pip install torch-fidelity, or choose another extractor."
        )
    if config.name == "medicalnet" and rank != 3:
        raise ConfigError(
            f"{_KEY} medicalnet takes volumes, and these images are 2D: choose another extractor, "
            "such as efficientnet-lite0 or radimagenet."
        )
    if config.weights is not None and not Path(config.weights).is_file():
        raise ConfigError(f"{_KEY}.weights: there is no file {config.weights}")


def load_extractor(
    config: ExtractorConfig, rank: int, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor that `config` names, ready on `device`."""
    require_extractor(config, rank)
    load: dict[ExtractorName, Callable[[Path], Extractor]] = {
        "efficientnet-lite0": lambda _: efficientnet(),
        "inception": inception,
        "radimagenet": radimagenet,
        "medicalnet": medicalnet,
        "radiomic": lambda _: Extractor(
            "radiomic",
            "Statistics of intensities, gradients and co-occurring grey levels: no weights; "
            "nobody else uses this extractor, so its numbers compare with no others.",
            "", radiomic.DIMENSION, radiomic.radiomic_features, comparable=False, colours=False,
        ),
    }  # fmt: skip
    extractor = load[config.name](Path(config.weights or ""))
    if extractor.network is not None:
        extractor.network.to(device)
    return extractor


def efficientnet() -> Extractor:
    """EfficientNet-Lite0: the 1280 channels before its classifier."""
    network, path = load_efficientnet()
    _fuse(network, ("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
    for block in network._blocks:
        _fuse(
            block, ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
        )
    network.to(memory_format=torch.channels_last)

    def compute(images: torch.Tensor) -> torch.Tensor:
        x = enlarged(images * 2 - 1).contiguous(memory_format=torch.channels_last)
        features: torch.Tensor = network.extract_features(x)
        return features.mean(dim=(2, 3))

    return Extractor(
        "efficientnet-lite0",
        "EfficientNet-Lite0 trained on the photographs of ImageNet, 1280 features before its "
        "classifier; not the Inception of published FIDs.",
        sha256(path), 1280, compute, network,
    )  # fmt: skip


def inception(path: Path) -> Extractor:
    """InceptionV3 of the original FID (Heusel et al., NeurIPS 2017), as torch-fidelity has it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity would unpickle the file; it gets one written here, from tensors alone
    file = io.BytesIO()
    torch.save(read_weights(path), file)
    file.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file)
    except RuntimeError as error:
        raise _other_network(path, "the InceptionV3 of torch-fidelity", str(error)) from error

    def compute(images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = network((images * 255).round().to(torch.uint8))[0]
        return features

    return Extractor(
        "inception",
        "InceptionV3 trained on the photographs of ImageNet, 2048 features: that of most "
        "published FIDs.",
        sha256(path), 2048, compute, network,
    )  # fmt: skip


def radimagenet(path: Path) -> Extractor:
    """ResNet50 of RadImageNet (Mei et al., Radiology: AI 2022): the file of its authors
    (ResNet50.pt), or the file of MONAI's perceptual loss (RadImageNet-ResNet50_notop.pth). They
    are two trainings: each gets images as it was trained with, at the size they have.
    """
    from monai.networks.nets.resnet import resnet50

    network = resnet50(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, feed_forward=False,
        bias_downsample=False,
    )  # fmt: skip
    weights = {_resnet_name(name): value for name, value in read_weights(path).items()}
    keras = "conv1.bias" in weights
    if keras:
        _turn_into_keras(network)
    _load_weights(network, weights, path, "RadImageNet's ResNet50")

    def compute(images: torch.Tensor) -> torch.Tensor:
        bgr = enlarged(images)[:, [2, 1, 0]]
        mean = torch.tensor(_BGR_MEAN, device=images.device)[:, None, None]
        features: torch.Tensor = network(bgr - mean if keras else bgr * 2 - 1)
        return features

    source = "MONAI's conversion" if keras else "its authors' PyTorch weights"
    return Extractor(
        "radimagenet",
        f"ResNet50 trained on the radiological images of RadImageNet, 2048 features ({source}).",
        sha256(path), 2048, compute, network,
    )  # fmt: skip


def medicalnet(path: Path) -> Extractor:
    """3D ResNet of MedicalNet (Chen et al., "Med3D", arXiv 1904.00625), as deep as its weights."""
    from monai.networks.nets.resnet import ResNetFeatures

    weights = {_resnet_name(name): value for name, value in read_weights(path).items()}
    bottleneck = "layer1.0.conv3.weight" in weights
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{layer}.")})
        for layer in (1, 2, 3, 4)
    )
    depth = (_BOTTLENECK if bottleneck else _BASIC).get(blocks)
    if depth is None:
        raise _other_network(path, "a ResNet of MedicalNet", f"it has {blocks} blocks in 4 layers")
    network = ResNetFeatures(f"resnet{depth}", pretrained=False)
    _load_weights(network, weights, path, f"MedicalNet's ResNet{depth}")

    def compute(volumes: torch.Tensor) -> torch.Tensor:
        mean, deviation = volumes.mean((1, 2, 3, 4), True), volumes.std((1, 2, 3, 4), keepdim=True)
        features: torch.Tensor = network((volumes - mean) / deviation.clamp_min(1e-6))[-1]
        return features.mean(dim=(2, 3, 4))

    dimension = 2048 if bottleneck else 512
    return Extractor(
        "medicalnet",
        f"3D ResNet{depth} trained on the CT and MR volumes of MedicalNet, {dimension} features; "
        "every volume is standardised, so its brightness and contrast have no effect.",
        sha256(path), dimension, compute, network, volumes=True, colours=False,
    )  # fmt: skip


def _fuse(module: Any, *pairs: tuple[str, str]) -> None:
    """Merge norms into their convolutions, and padding into those that can pad by themselves: the
    same numbers to 1e-4, in half the time."""
    for conv, norm in pairs:
        if hasattr(module, conv):
            fused: Any = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
            padding = getattr(getattr(fused, "static_padding", None), "padding", (0, 1, 0, 1))
            if len(set(padding)) == 1:
                fused.padding, fused.static_padding = (padding[0],) * 2, nn.Identity()
            setattr(module, conv, fused)
            setattr(module, norm, nn.Identity())
    module._swish = nn.ReLU6(inplace=True)


def _turn_into_keras(network: nn.Module) -> None:
    """Add biases everywhere, and move the stride to the first convolution of a block."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
            if re.fullmatch(r"layer[234]\.0\.conv[12]", name):
                module.stride = (2, 2) if name.endswith("conv1") else (1, 1)
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = _KERAS_EPSILON


def _resnet_name(name: str) -> str:
    """torchvision's name of a weight of a ResNet that was saved in a Sequential or in parallel."""
    name = re.sub(r"^(module|backbone|model|encoder)\.", "", name)
    name = re.sub(r"^0\.", "conv1.", re.sub(r"^1\.", "bn1.", name))
    return re.sub(r"^([4-7])\.", lambda match: f"layer{int(match[1]) - 3}.", name)


def _load_weights(
    network: nn.Module, weights: dict[str, torch.Tensor], path: Path, expected: str
) -> None:
    """Load every weight of the network, with none left over except those of a classifier."""
    needed = network.state_dict()
    counters = {name for name in needed if name.endswith("num_batches_tracked")}
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    faults = [
        f"{name} is missing" for name in needed if name not in weights and name not in counters
    ]
    faults += [f"{name} is unknown" for name in weights if name not in needed]
    faults += [
        f"{name} is {list(weights[name].shape)} and not {list(value.shape)}"
        for name, value in needed.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if faults:
        raise _other_network(path, expected, ", ".join(first_faults(faults, _FAULTS_SHOWN)))
    network.load_state_dict({name: weights.get(name, value) for name, value in needed.items()})
    network.eval().requires_grad_(False)


def _other_network(path: Path, expected: str, reason: str) -> ArtifactError:
    short = " ".join(reason.split())[:300]
    return ArtifactError(
        f"evaluation.extractor.weights: {path} does not hold the weights of {expected}: {short}"
    )
