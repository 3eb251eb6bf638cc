"""Whether sets of images can be compared at all: everything that is wrong, before any number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from synthcube.errors import EvaluationError
from synthcube.evaluation.images import ImageSet

_LEAST = 2  # images on each side
_WIDER = 20.0  # times the range of the real images: other units
_NARROWER = 100.0  # a model that has learned little makes grey images, which are to be judged
_FLAT = 5.0
_SAME_SPACING = 0.01  # relative


def check(sets: Mapping[str, ImageSet], faults: list[str]) -> None:
    """Compare the sets with the predictions among them.

    Args:
        faults: what is wrong with single images, to be told with the rest.

    Raises:
        EvaluationError: all that keeps the sets from being compared.
    """
    found = list(faults)
    for name, images in sets.items():
        if len(images) < _LEAST:
            found.append(f"{name}: {len(images)} image; at least {_LEAST} are needed")
        elif images.distinct == 1:
            found.append(f"{name}: all {len(images)} images are identical")
    predictions = sets.get("predictions")
    for name, images in sets.items():
        if predictions and name != "predictions":
            found += _difference(predictions, images)
    if found:
        raise EvaluationError("These images cannot be compared:", found)


def _difference(predictions: ImageSet, real: ImageSet) -> list[str]:
    if predictions.shape != real.shape:
        return [
            f"predictions have the shape {list(predictions.shape)}, {real.name} "
            f"{list(real.shape)} (channels first): give the config of the training as -c, whose "
            "data section brings real images to the predictions' grid"
        ]
    faults = []
    for channel, (made, known) in enumerate(zip(predictions.bounds, real.bounds, strict=True)):
        width, own = known[1] - known[0], made[1] - made[0]
        apart = made[0] > known[1] + width or made[1] < known[0] - width
        if width > 0 and (apart or own > _WIDER * width or own * _NARROWER < width):
            faults.append(
                f"predictions lie in [{made[0]:g}, {made[1]:g}], {real.name} in [{known[0]:g}, "
                f"{known[1]:g}] (channel {channel}): they are not in the same units"
            )
    return faults


def notes(sets: Mapping[str, ImageSet]) -> list[str]:
    """What does not keep the sets from being compared, and should be known by who reads on."""
    told = []
    predictions = sets["predictions"]
    for images in sets.values():
        if images.distinct < len(images):
            told.append(
                f"{len(images) - images.distinct} of the {len(images)} images of {images.name} "
                "are exact duplicates of others among them."
            )
        if images.constant:
            told.append(f"{images.constant} images of {images.name} are constant.")
        for known, made in zip(images.bounds, predictions.bounds, strict=True):
            if (made[1] - made[0]) * _FLAT < known[1] - known[0]:
                told.append(
                    f"Predictions lie in [{made[0]:g}, {made[1]:g}] only, {images.name} in "
                    f"[{known[0]:g}, {known[1]:g}]."
                )
        if not images.raster and not np.allclose(
            images.spacing_mm, predictions.spacing_mm, rtol=_SAME_SPACING
        ):
            told.append(
                f"Voxels of {images.name} measure {_millimetres(images)} mm, those of the "
                f"predictions {_millimetres(predictions)}: shapes differ by that much."
            )
    return told


def _millimetres(images: ImageSet) -> str:
    return " x ".join(f"{each:g}" for each in images.spacing_mm)
