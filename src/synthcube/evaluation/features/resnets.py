"""ResNets trained on medical images by others: RadImageNet and MedicalNet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synthcube.evaluation.features.trained import Trained, other_network
from synthcube.legacy import read_weights
from synthcube.models.nets.perceptual import enlarged
from synthcube.storage import sha256

_SHOWN = 3  # names of weights in an error
_BGR_MEAN = (0.406, 0.456, 0.485)
_BOTTLENECK: dict[tuple[int, ...], int] = {
    (3, 4, 6, 3): 50,
    (3, 4, 23, 3): 101,
    (3, 8, 36, 3): 152,
    (3, 24, 36, 3): 200,
}
_BASIC: dict[tuple[int, ...], int] = {(1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
_KERAS_EPSILON = 1.001e-5


def radimagenet(path: Path) -> Trained:
    """ResNet50 of RadImageNet (Mei et al., Radiology: AI 2022): the file of its authors
    (ResNet50.pt), or what MONAI's perceptual loss takes (RadImageNet-ResNet50_notop.pth). They are
    two trainings: each gets images as it was trained with, at the size they have.

    Raises:
        ArtifactError: the weights of another network.
    """
    from monai.networks.nets.resnet import resnet50

    network = resnet50(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, feed_forward=False,
        bias_downsample=False,
    )  # fmt: skip
    weights = {_resnet_name(name): value for name, value in read_weights(path).items()}
    keras = "conv1.bias" in weights
    if keras:
        _as_in_keras(network)
    _fill(network, weights, path, "RadImageNet's ResNet50")
    whose = "MONAI's conversion" if keras else "its authors' PyTorch weights"
    return Trained(
        f"ResNet50 trained on the radiological images of RadImageNet, 2048 features ({whose}).",
        sha256(path), 2048, network, _less_mean if keras else _signed,
    )  # fmt: skip


def medicalnet(path: Path) -> Trained:
    """3D ResNet of MedicalNet (Chen et al., "Med3D", arXiv 1904.00625), of the depth that the
    weights have.

    Raises:
        ArtifactError: the weights of another network.
    """
    from monai.networks.nets.resnet import ResNetFeatures

    weights = {_resnet_name(name): value for name, value in read_weights(path).items()}
    bottleneck = "layer1.0.conv3.weight" in weights
    blocks = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{layer}.")})
        for layer in (1, 2, 3, 4)
    )
    depth = (_BOTTLENECK if bottleneck else _BASIC).get(blocks)
    if depth is None:
        raise other_network(path, "a ResNet of MedicalNet", f"it has {blocks} blocks in 4 layers")
    network = ResNetFeatures(f"resnet{depth}", pretrained=False)
    _fill(network, weights, path, f"MedicalNet's ResNet{depth}")
    dimension = 2048 if bottleneck else 512
    return Trained(
        f"3D ResNet{depth} trained on the CT and MR volumes of MedicalNet, {dimension} features; "
        "every volume is standardised, so that its brightness and contrast are not seen.",
        sha256(path), dimension, network, _through_medicalnet,
    )  # fmt: skip


def _signed(network: Any, images: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = network(enlarged(images)[:, [2, 1, 0]] * 2 - 1)
    return features


def _less_mean(network: Any, images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(_BGR_MEAN, device=images.device)[:, None, None]
    features: torch.Tensor = network(enlarged(images)[:, [2, 1, 0]] - mean)
    return features


def _through_medicalnet(network: Any, volumes: torch.Tensor) -> torch.Tensor:
    mean, deviation = volumes.mean((1, 2, 3, 4), True), volumes.std((1, 2, 3, 4), keepdim=True)
    deep: torch.Tensor = network((volumes - mean) / deviation.clamp_min(1e-6))[-1]
    return deep.mean(dim=(2, 3, 4))


def _as_in_keras(network: nn.Module) -> None:
    """Biases everywhere, and the stride in the first convolution of a block."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
            if re.fullmatch(r"layer[234]\.0\.conv[12]", name):
                module.stride = (2, 2) if name.endswith("conv1") else (1, 1)
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = _KERAS_EPSILON


def _resnet_name(name: str) -> str:
    """Names of torchvision's ResNet for those of a network in a Sequential or in parallel."""
    name = re.sub(r"^(module|backbone|model|encoder)\.", "", name)
    name = re.sub(r"^0\.", "conv1.", re.sub(r"^1\.", "bn1.", name))
    return re.sub(r"^([4-7])\.", lambda found: f"layer{int(found[1]) - 3}.", name)


def _fill(network: nn.Module, weights: dict[str, torch.Tensor], path: Path, wanted: str) -> None:
    """Every weight of the network, and none left over but those of a classifier."""
    needed = network.state_dict()
    counters = {name for name in needed if name.endswith("num_batches_tracked")}
    given = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    faults = [f"{name} is missing" for name in needed if name not in given and name not in counters]
    faults += [f"{name} is too many" for name in given if name not in needed]
    faults += [
        f"{name} is {list(given[name].shape)} and not {list(value.shape)}"
        for name, value in needed.items()
        if name in given and given[name].shape != value.shape
    ]
    if faults:
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise other_network(path, wanted, ", ".join(faults[:_SHOWN]) + more)
    network.load_state_dict({name: given.get(name, value) for name, value in needed.items()})
    network.eval().requires_grad_(False)
