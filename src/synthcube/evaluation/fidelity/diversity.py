"""How alike the images of one set are among themselves, beside how alike real ones are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.features.tables import Bounds, scaled
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.results import Measure, Plot, Section, missing
from synthcube.evaluation.similarity import WINDOW, num_scales, structural
from synthcube.runtime import derived_seed

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_MOST_PAIRS, _LEAST_PAIRS = 1000, 32
_VOXELS = 1 << 24  # of all pairs together: those of volumes are fewer
_AT_ONCE = 1 << 18  # voxels
_FEWEST = 10  # subjects
_NORMAL = 1.959964  # 97.5th percentile of the standard normal


def diversity(
    predictions: ImageSet, labels: ImageSet, config: EvaluationConfig, seed: int
) -> Section:
    """MS-SSIM of random pairs of predictions; the floor is that of pairs of labels.

    Odena et al., "Conditional Image Synthesis with Auxiliary Classifier GANs" (ICML 2017). Pairs
    are of two subjects, and every image is in one pair at most; intensities are scaled by the
    bounds of the labels. Small images have fewer than the five scales of MS-SSIM.
    """
    section = Section("diversity")
    size = labels.shape[1:]
    scales = num_scales(size)
    pairs = [
        _pairs(each.subjects(), derived_seed(seed, "diversity", each.name))
        for each in (predictions, labels)
    ]
    most = max(_LEAST_PAIRS, min(_MOST_PAIRS, _VOXELS // int(np.prod(size))))
    number = min(most, *map(len, pairs))
    if not scales or number < _FEWEST // 2:
        section.measures["ms_ssim"] = missing(
            f"{number} pairs of different subjects; {_FEWEST // 2} are needed in both sets"
            if scales
            else f"an axis of {min(size)} voxels; {WINDOW} are needed for its window"
        )
        return section
    found = [
        _of_pairs(images, chosen[:number], labels.bounds, scales)
        for images, chosen in zip((predictions, labels), pairs, strict=True)
    ]
    value, floor = (float(each.mean()) for each in found)
    wide = _NORMAL * float(found[0].std(ddof=1)) / number**0.5
    section.measures["ms_ssim"] = Measure(
        value, floor, max(0.0, value - wide), min(1.0, value + wide), number
    )
    section.facts["scales"] = scales
    section.notes.append(
        "MS-SSIM of two random images, 1 for identical ones: well above its floor, predictions are "
        "more alike than real images are (mode collapse); well below, they vary in ways real ones "
        f"do not, such as noise. It was taken at {scales} of its 5 scales."
    )
    section.plots.append(
        Plot(
            "MS-SSIM of random pairs", "histogram",
            {"predictions": found[0].tolist(), "real images": found[1].tolist()},
            x_label="MS-SSIM", y_label="pairs",
        )
    )  # fmt: skip
    return section


def _pairs(subjects: Ints, seed: int) -> Ints:
    """(P, 2): images of different subjects, each in one pair at most."""
    order = np.random.default_rng(seed).permutation(len(subjects))
    pairs = order[: len(order) // 2 * 2].reshape(-1, 2)
    apart: Ints = pairs[subjects[pairs[:, 0]] != subjects[pairs[:, 1]]]
    return apart


def _of_pairs(images: ImageSet, pairs: Ints, bounds: Bounds, scales: int) -> Floats:
    step = max(1, _AT_ONCE // int(np.prod(images.shape)))
    found = []
    for start in range(0, len(pairs), step):
        both = pairs[start : start + step]
        one, other = (
            scaled(images.read(both[:, side].tolist()), bounds).astype(np.float64)
            for side in (0, 1)
        )
        found.append(structural(one, other, scales)[1])
    return np.concatenate(found)
