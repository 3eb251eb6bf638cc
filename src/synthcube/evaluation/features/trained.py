"""Networks trained by others, whose last features are averaged over the image."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from synthcube.errors import ArtifactError
from synthcube.legacy import read_weights
from synthcube.models.nets.perceptual import enlarged, load_efficientnet
from synthcube.storage import sha256


@dataclass(frozen=True, slots=True)
class Trained:
    """A network and how images are handed to it."""

    what: str
    sha256: str
    dimension: int
    network: Any
    forward: Callable[[Any, torch.Tensor], torch.Tensor]

    def to(self, device: torch.device | str) -> Trained:
        self.network.to(device)
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward(self.network, images)


def efficientnet() -> Trained:
    """EfficientNet-Lite0: the 1280 channels before its classifier."""
    network, path = load_efficientnet()
    _fuse(network, ("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
    for block in network._blocks:
        _fuse(
            block, ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
        )
    network.to(memory_format=torch.channels_last)
    return Trained(
        "EfficientNet-Lite0 trained on the photographs of ImageNet, 1280 features before its "
        "classifier; not the Inception of published FIDs.",
        sha256(path), 1280, network, _through_efficientnet,
    )  # fmt: skip


def inception(path: Path) -> Trained:
    """InceptionV3 of the original FID (Heusel et al., NeurIPS 2017), as torch-fidelity has it.

    Raises:
        ArtifactError: not the weights that torch-fidelity and pytorch-fid distribute.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity would unpickle the file; what it gets is written here, from tensors alone
    file = io.BytesIO()
    torch.save(read_weights(path), file)
    file.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file)
    except RuntimeError as error:
        raise other_network(path, "the InceptionV3 of torch-fidelity", str(error)) from error
    return Trained(
        "InceptionV3 trained on the photographs of ImageNet, 2048 features: that of most "
        "published FIDs.",
        sha256(path), 2048, network, _through_inception,
    )  # fmt: skip


def _through_efficientnet(network: Any, images: torch.Tensor) -> torch.Tensor:
    x = enlarged(images * 2 - 1).contiguous(memory_format=torch.channels_last)
    features: torch.Tensor = network.extract_features(x)
    return features.mean(dim=(2, 3))


def _through_inception(network: Any, images: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = network((images * 255).round().to(torch.uint8))[0]
    return features


def _fuse(module: Any, *pairs: tuple[str, str]) -> None:
    """Norms into their convolutions and padding into those that can: the same numbers to 1e-4,
    in half the time."""
    for conv, norm in pairs:
        if hasattr(module, conv):
            fused: Any = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
            padding = getattr(getattr(fused, "static_padding", None), "padding", (0, 1, 0, 1))
            if len(set(padding)) == 1:
                fused.padding, fused.static_padding = (padding[0],) * 2, nn.Identity()
            setattr(module, conv, fused)
            setattr(module, norm, nn.Identity())
    module._swish = nn.ReLU6(inplace=True)


def other_network(path: Path, wanted: str, why: str) -> ArtifactError:
    """The refusal of weights that are not those of `wanted`."""
    short = " ".join(why.split())[:300]
    return ArtifactError(
        f"evaluation.extractor.weights: {path} holds not the weights of {wanted}: {short}"
    )
