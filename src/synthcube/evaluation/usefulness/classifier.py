"""A small convolutional classifier, trained in seconds, the same on every run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from synthcube.evaluation.images import ImageSet

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SIDE = {2: 32, 3: 16}
"""Voxels along each side of what it sees, at most."""
_CHANNELS = {2: (16, 32, 64), 3: (8, 16, 32)}
_STEPS, _BATCH, _RATE, _DECAY = 200, 32, 5e-3, 1e-2
_SHIFT = 1 / 16
"""Largest random shift of a training image, as a share of each side."""


def probabilities(
    images: ImageSet,
    rows: Ints,
    classes: Ints,
    tested: ImageSet,
    tested_rows: Ints,
    num_classes: int,
    seed: int,
) -> Floats:
    """(len(tested_rows), num_classes): what a classifier makes of `tested` that was trained on
    `images`.

    Both are scaled by the range of `tested`, so that predictions of another range teach what they
    would teach anyone. Every class weighs the same, however many images it has.

    Args:
        rows, classes: places of the training images, and the class of each, from 0.
    """
    known, asked = _small(images, rows, tested), _small(tested, tested_rows, tested)
    truth = torch.from_numpy(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(images.shape[0], images.rank, num_classes)
        _train(network, known, truth, num_classes)
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(each) for each in asked.split(256)])
    found: Floats = logits.double().softmax(dim=1).numpy()
    return found


def _small(images: ImageSet, rows: Ints, scale: ImageSet) -> torch.Tensor:
    """(len(rows), C, *small), the range of `scale` from -1 to 1."""
    sides = [min(side, _SIDE[images.rank]) for side in images.shape[1:]]
    pool = nn.AdaptiveAvgPool2d if images.rank == 2 else nn.AdaptiveAvgPool3d
    reduce = pool(tuple(sides))
    shape = (1, -1, *[1] * images.rank)
    low, high = (torch.tensor([pair[end] for pair in scale.bounds]).view(shape) for end in (0, 1))
    width = (high - low).clamp(min=1e-12)
    size = max(1, (1 << 20) // int(np.prod(images.shape)))
    found = []
    for start in range(0, len(rows), size):
        batch = torch.from_numpy(images.read(rows[start : start + size].tolist()))
        found.append(reduce((batch - low) / width * 2 - 1))
    return torch.cat(found)


def _network(channels: int, rank: int, num_classes: int) -> nn.Sequential:
    convolution = nn.Conv2d if rank == 2 else nn.Conv3d
    pool = nn.AdaptiveAvgPool2d if rank == 2 else nn.AdaptiveAvgPool3d
    layers: list[nn.Module] = []
    for level, width in enumerate(_CHANNELS[rank]):
        stride = 2 if level else 1
        layers += [convolution(channels, width, 3, stride, 1), nn.GroupNorm(4, width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, pool(4), nn.Flatten(), nn.LazyLinear(num_classes))


def _train(
    network: nn.Sequential, images: torch.Tensor, truth: torch.Tensor, num_classes: int
) -> None:
    network(images[:1])  # the last layer learns its size
    counts = torch.bincount(truth, minlength=num_classes).clamp(min=1)
    weight = len(truth) / (num_classes * counts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    criterion = nn.CrossEntropyLoss(weight=weight)
    for _ in range(_STEPS):
        chosen = torch.randint(len(images), (min(_BATCH, len(images)),))
        optimizer.zero_grad()
        criterion(network(_shifted(images[chosen])), truth[chosen]).backward()
        optimizer.step()
        schedule.step()


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """By the same random few voxels; the border is repeated."""
    for axis in range(2, images.ndim):
        side = images.shape[axis]
        most = round(side * _SHIFT)
        by = int(torch.randint(-most, most + 1, ()))
        places = (torch.arange(side) + by).clamp(0, side - 1)
        images = images.index_select(axis, places)
    return images
