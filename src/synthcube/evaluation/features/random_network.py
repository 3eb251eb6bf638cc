"""Features of convolutions that were trained on nothing."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_CHANNELS = (1, 32, 64, 128)
_SEED = 20_240_229


class RandomNetwork(nn.Module):
    """Three layers of random 3x3 convolutions with stride 2; means over the image of each.

    That untrained convolutions see texture and shape is known since Ulyanov et al., "Deep Image
    Prior" (CVPR 2018); as a feature space for Frechet distances they are weaker than trained ones
    (Naeem et al., ICML 2020, use them where ImageNet is far from the data).
    """

    dimension = 2 * sum(_CHANNELS[1:])

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(_SEED)
        digest = hashlib.sha256()
        self.layers = nn.ModuleList()
        for c_in, c_out in pairwise(_CHANNELS):
            layer = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, padding_mode="reflect")
            weight = rng.standard_normal((c_out, c_in, 3, 3)) * (2 / (9 * c_in)) ** 0.5
            bias = rng.standard_normal(c_out) * 0.1
            for target, values in ((layer.weight, weight), (layer.bias, bias)):
                numbers = values.astype("<f4")
                digest.update(numbers.tobytes())
                if target is not None:
                    target.data = torch.from_numpy(numbers)
            self.layers.append(layer)
        self.sha256 = digest.hexdigest()
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1, H, W) in [0, 1] to (N, dimension): mean and deviation of every channel."""
        x, found = images, []
        for layer in self.layers:
            x = functional.relu(layer(x))
            found += [x.mean(dim=(2, 3)), x.std(dim=(2, 3), unbiased=False)]
        return torch.cat(found, dim=1)
