"""Generated images beside held-out real ones of the same classes, drawn at random."""

from __future__ import annotations

from functools import partial

import numpy as np

from synthcube.data.conditions import cell
from synthcube.data.pictures import PLANES
from synthcube.environment import derived_seed
from synthcube.evaluation.results import Picture, upright
from synthcube.evaluation.sets import ImageSet

_IN_A_ROW = 4  # rows of so many stand side by side on the page
_WITHOUT_CLASSES = 12
_MOST_CLASSES = 10


def gallery(predictions: ImageSet, labels: ImageSet, column: str | None, seed: int) -> Picture:
    """A row of generated and a row of real images for each class; of all where there are none.

    Both sides are drawn at random, so that nothing is picked for its looks, and both are shown in
    the range of the real images. Masks stand beside the image.

    Args:
        column: of the classes, in both manifests.
    """
    show = partial(
        upright, bounds=_bounds(labels), raster=labels.raster, spacing_mm=labels.spacing_mm,
        masks=tuple(labels.masks),
    )  # fmt: skip
    names = sorted({cell(row, column) for row in labels.rows}) if column else [""]
    rows, titles = [], []
    for name in names[:_MOST_CLASSES]:
        for images, side in ((predictions, "generated"), (labels, "real")):
            places = [
                place
                for place, row in enumerate(images.rows)
                if column is None or cell(row, column) == name
            ]
            rng = np.random.default_rng(derived_seed(seed, "gallery", side, name))
            most = _IN_A_ROW if column else _WITHOUT_CLASSES
            chosen = np.sort(rng.permutation(places)[:most]).astype(int).tolist()
            if chosen:
                rows.append([show(image) for image in images.read(chosen)])
                titles.append(f"{name}: {side}" if column else side.capitalize())
    title = "Generated beside held-out real images"
    if len(names) > _MOST_CLASSES:
        title += f", of the first {_MOST_CLASSES} of {len(names)} classes"
    elif column:
        title += " of the same classes"
    title += ", drawn at random"
    if labels.rank == 3:
        title += f" ({', '.join(PLANES)}; the patient's right is on the left)"
    return Picture(title, rows, tuple(titles))


def _bounds(images: ImageSet) -> list[tuple[float, float]]:
    """What is shown black and white: of a mask, its lowest and highest class."""
    bounds = list(images.bounds)
    for channel, classes in images.masks.items():
        bounds[channel] = float(min(classes)), float(max(classes))
    return bounds
