"""A procedural data set of bright shapes, for demos and for checks of whole runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from synthcube.data.images import write_image
from synthcube.data.manifest import FILE_NAME, write_manifest
from synthcube.errors import ConfigError
from synthcube.storage import make_folder

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

KINDS = {2: ("disc", "square", "ring"), 3: ("ball", "cube", "shell")}
"""Names of the shapes by number of axes; the place in the tuple is the class id."""

MIN_SIZE = 8
_RADIUS = (6 / 32, 11 / 32)  # of the shortest side: large enough to be learned in minutes
_BRIGHTNESS = (170.0, 240.0)
_BACKGROUND = (25.0, 45.0)
_NOISE = 3.0
_WALL = 0.5  # inner radius of a ring or shell, as a share of the outer one


@dataclass(frozen=True)
class Phantom:
    """One image with its ground truth."""

    image: torch.Tensor  # (C, *size) float32, intensities in 0..255
    label: int
    label_name: str
    truth: dict[str, float]  # radius (half a square's side), centre_x, ... in voxels; brightness
    mask: torch.Tensor  # (*size) bool, where the shape is


def phantom(
    index: int, *, size: Sequence[int], channels: int = 1, seed: int = 0, kind: str | None = None
) -> Phantom:
    """The image number `index` of the endless data set that `seed` names. Raises ConfigError.

    Args:
        index: from 0; the shapes take turns.
        size: two or three sides of at least 8 voxels.
        channels: every second one shows the same shape dark on a bright background.
        seed: a different seed gives a different data set.
        kind: one of KINDS for as many axes; by `index` where it is None.
    """
    _check(size, channels, kind)
    kinds = KINDS[len(size)]
    label = index % len(kinds) if kind is None else kinds.index(kind)
    random = np.random.default_rng((seed, index))
    radius = float(random.uniform(*_RADIUS)) * min(size)
    slack = [(side - 1) / 2 - radius - 1 for side in size]
    reach = [min(max(free, 0.0), side / 8) for free, side in zip(slack, size, strict=True)]
    centre = [(n - 1) / 2 + float(random.uniform(-r, r)) for n, r in zip(size, reach, strict=True)]
    brightness = float(random.uniform(*_BRIGHTNESS))
    mask = _mask(label, size, centre, radius)
    layers = []
    for channel in range(channels):
        layer = np.where(mask, brightness, _background(random, size))
        layer = 255 - layer if channel % 2 else layer
        layers.append(layer + random.normal(0, _NOISE, tuple(size)))
    image = np.stack(layers).clip(0, 255).astype(np.float32)
    truth = {"radius": radius, "brightness": brightness}
    truth |= {f"centre_{axis}": place for axis, place in zip("xyz", centre, strict=False)}
    return Phantom(torch.from_numpy(image), label, kinds[label], truth, torch.from_numpy(mask))


def write_phantoms(
    folder: Path,
    *,
    num: int,
    size: Sequence[int],
    channels: int = 1,
    spacing_mm: Sequence[float] = (1, 1, 1),
    seed: int = 0,
) -> Path:
    """Write `num` phantoms, one PNG (2D) or .nii.gz (3D) per channel, and their manifest.

    The same arguments give the same bytes.

    Returns:
        The path of the manifest: paths relative to it, SubjectID, Label, LabelMapping, and
        the conditions Radius (voxels) and Brightness (intensity).
    """
    if num < 1:
        raise ConfigError(f"num is {num}; at least 1 phantom is needed.")
    spacing = np.array([*spacing_mm, 1.0, 1.0][:3])
    if not (spacing > 0).all():
        raise ConfigError(f"spacing_mm is {list(spacing_mm)}; positive millimetres are needed.")
    affine = np.diag([*spacing, 1.0])
    suffix = ".png" if len(size) == 2 else ".nii.gz"
    drawn = (phantom(i, size=size, channels=channels, seed=seed) for i in range(num))
    first = next(drawn)  # refuses what cannot be drawn before a folder is made
    make_folder(folder)
    rows = []
    for index, item in enumerate(itertools.chain([first], drawn)):
        row = {}
        for channel in range(channels):
            ending = f"_c{channel}" if channels > 1 else ""
            name = f"phantom-{index:05d}{ending}{suffix}"
            write_image(folder / name, item.image[channel, None], affine, integer=True)
            row[f"Channel_{channel}"] = name
        row |= {"SubjectID": f"phantom-{index:05d}", "Label": str(item.label)}
        row |= {"LabelMapping": item.label_name, "Radius": f"{item.truth['radius']:.3f}"}
        rows.append({**row, "Brightness": f"{item.truth['brightness']:.3f}"})
    path = folder / FILE_NAME
    write_manifest(path, rows)
    return path


def _check(size: Sequence[int], channels: int, kind: str | None) -> None:
    kinds = KINDS.get(len(size))
    if kinds is None or min(size) < MIN_SIZE:
        raise ConfigError(
            f"A phantom cannot have the size {list(size)}; "
            f"two or three sides of at least {MIN_SIZE} voxels are needed."
        )
    if channels < 1:
        raise ConfigError(f"A phantom cannot have {channels} channels; at least 1 is needed.")
    if kind is not None and kind not in kinds:
        raise ConfigError(
            f"There is no phantom {kind!r} of {len(size)} axes; use {', '.join(kinds)}."
        )


def _mask(label: int, size: Sequence[int], centre: Sequence[float], radius: float) -> Mask:
    axes = np.meshgrid(*(np.arange(side) for side in size), indexing="ij")
    offsets = np.stack([axis - place for axis, place in zip(axes, centre, strict=True)])
    if label == 1:
        return np.asarray(np.abs(offsets).max(axis=0) <= radius)
    distance = np.sqrt((offsets**2).sum(axis=0))
    inside = distance <= radius
    return np.asarray(inside & (distance >= _WALL * radius) if label == 2 else inside)


def _background(random: np.random.Generator, size: Sequence[int]) -> Floats:
    """Dim and smooth: one slow wave along each axis."""
    level = np.full(tuple(size), random.uniform(*_BACKGROUND))
    for axis, side in enumerate(size):
        wave = 6 * np.sin(np.linspace(0, np.pi, side) + random.uniform(0, 2 * np.pi))
        level += wave.reshape([-1 if i == axis else 1 for i in range(len(size))])
    return level
