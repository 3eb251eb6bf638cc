"""How near images are to their nearest training image, and which are too near to be chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from synthcube import runtime
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.copies.calibration import FEWEST, Calibration, calibrated, share_measures
from synthcube.evaluation.copies.lookalikes import most_alike
from synthcube.evaluation.copies.overlap import Overlap
from synthcube.evaluation.copies.views import Views
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.intervals import auc, auc_interval
from synthcube.evaluation.neighbours import nearest
from synthcube.evaluation.results import Measure, missing

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SAME = 1e-5
"""Held-out images nearer than this to a training image are copies of it themselves."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """Of each prediction and of each held-out image to its nearest training image."""

    space: str
    """pixels or features."""
    predictions: Floats
    labels: Floats
    index: Ints
    """Training image nearest to each prediction."""
    mirrored: tuple[tuple[int, ...], ...] = ()
    """Axes along which each prediction was mirrored; empty where that was not tried."""


@dataclass(frozen=True, slots=True)
class CopySearch:
    """Distances, and the threshold below which an image counts as a near-copy."""

    near: Nearest
    calibration: Calibration | None
    void: str
    """Why there is no threshold."""
    exact: tuple[int, ...]
    """Predictions that are near-copies whatever the threshold."""

    @property
    def space(self) -> str:
        return self.near.space

    @property
    def flagged(self) -> npt.NDArray[np.bool_]:
        """(N,): which predictions are near-copies."""
        far = self.near.predictions
        found = self.calibration.flagged(far) if self.calibration else np.zeros(len(far), np.bool_)
        found[list(self.exact)] = True
        return found


def nearest_in_pixels(p: Views, held_out: Views, t: Views) -> Nearest:
    """Distance is 1 minus the correlation, mirrored and shifted as suits it best."""
    found, of_labels = (most_alike(each, t, flips=True) for each in (p, held_out))
    far, far_labels = (1 - each.similarity.astype(np.float64) for each in (found, of_labels))
    return Nearest("pixels", far, far_labels, found.index, found.mirrored)


def nearest_in_features(features: Mapping[str, Array]) -> Nearest:
    """Euclidean distance of (N, D) of "predictions" and "labels" to those of "train_data"."""
    far, index = nearest(features["predictions"], features["train_data"], 1)
    of_labels, _ = nearest(features["labels"], features["train_data"], 1)
    made, real = (each[:, 0].astype(np.float64) for each in (far, of_labels))
    return Nearest("features", made, real, index[:, 0])


def searched(
    near: Nearest,
    labels: ImageSet,
    shared: Overlap,
    exact: tuple[int, ...],
    config: EvaluationConfig,
    seed: int,
) -> CopySearch:
    """With the threshold that held-out images calibrate, or why they cannot."""
    if shared:
        void = f"the labels cannot calibrate a threshold: {shared.told()}; hold out other images"
        return CopySearch(near, None, void, exact)
    seed = runtime.derived_seed(seed, near.space)
    found = calibrated(near.labels, labels.subjects(), config.copy_false_alarms, seed)
    if found is None:
        void = f"at least {FEWEST} held-out images, of two subjects, are needed for a threshold"
        return CopySearch(near, None, void, exact)
    # a threshold among copies would pass every copy
    if found.threshold < _SAME * max(1.0, float(np.median(near.labels))):
        number = int((near.labels <= found.threshold).sum())
        void = (
            f"{number} of the labels are copies of training images themselves (mirrored, shifted "
            "or with other intensities): hold out other images"
        )
        return CopySearch(near, None, void, exact)
    return CopySearch(near, found, "", exact)


def search_measures(of: CopySearch, labels: ImageSet, num_trained: int) -> dict[str, Measure]:
    """How near the predictions are beside the labels, and the share of near-copies."""
    space, made, real = of.space, of.near.predictions, of.near.labels
    low, high = auc_interval(-made, -real, (np.arange(len(made)), labels.subjects()))
    # void labels are no measure of what is near
    reason, count = of.void or None, len(made)
    medians = float(np.median(made)), float(np.median(real))
    found = {
        f"distance_{space}": Measure(*medians, count=count, reason=reason),
        f"nearer_than_labels_{space}": Measure(
            auc(-made, -real), 0.5, low, high, count, reason=reason
        ),
    }
    names = (f"near_copies_{space}", f"beyond_chance_{space}", f"copied_share_{space}")
    if of.calibration is None:
        return found | dict.fromkeys(names, missing(of.void))
    flagged = of.flagged
    copied = len(np.unique(of.near.index[flagged]))
    shares = (
        *share_measures(flagged, of.calibration),
        Measure(copied / num_trained, count=num_trained),
    )
    return found | dict(zip(names, shares, strict=True))
