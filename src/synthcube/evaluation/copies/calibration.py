"""From which distance on an image is called a near-copy, and how often that is a false alarm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from synthcube import runtime
from synthcube.evaluation.intervals import share_interval
from synthcube.evaluation.results import Measure

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FEWEST = 10
"""Held-out images below which no threshold is set."""
_FOLDS = 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold on the distance to the nearest training image."""

    threshold: float
    """An image nearer than this is a near-copy."""
    false_alarms: float
    """Share of held-out images below the threshold that those of other subjects set."""
    num_images: int
    num_subjects: int
    reason: str
    """What to mind; empty where nothing."""

    def flagged(self, distances: Floats) -> npt.NDArray[np.bool_]:
        return distances < self.threshold


def calibrated(distances: Floats, subjects: Ints, allowed: float, seed: int) -> Calibration | None:
    """The threshold that the share `allowed` of held-out real images falls below.

    A rank among the held-out distances, as of a conformal test (Vovk et al., "Algorithmic
    Learning in a Random World", 2005): an image drawn like them is flagged with a probability of
    at most `allowed`. Fewer than 1 / allowed - 1 images cannot set it: then their nearest one is
    the threshold, and the reason says what false alarms to expect.

    Args:
        distances: (N,) of held-out images to their nearest training image.
        subjects: (N,), number of each image's subject.

    Returns:
        None where there are fewer than FEWEST images, or all are of one subject.
    """
    total, num_subjects = len(distances), len(np.unique(subjects))
    if total < FEWEST or num_subjects < 2:
        return None
    reason = ""
    if math.floor(allowed * (total + 1)) < 1:
        reason = (
            f"{total} held-out images cannot tell {allowed:g} false alarms, "
            f"{math.ceil(1 / allowed) - 1} are needed: about {1 / (total + 1):.2g} are to be "
            "expected"
        )
    elif num_subjects < total and math.floor(allowed * (num_subjects + 1)) < 1:
        reason = (
            f"the {total} held-out images are of {num_subjects} subjects: the threshold hangs on "
            "few of them"
        )
    return Calibration(
        _threshold(distances, allowed), _false_alarms(distances, subjects, allowed, seed), total,
        num_subjects, reason,
    )  # fmt: skip


def share_measures(flagged: npt.NDArray[np.bool_], found: Calibration) -> tuple[Measure, Measure]:
    """The share of near-copies beside the false alarms, and what is left without these.

    The second is the prevalence estimate of Rogan and Gladen (Am. J. Epidemiol. 1978) for a test
    that misses none: a lower bound where copies are changed too much to be seen.
    """
    total, alarms = len(flagged), found.false_alarms
    hits = int(flagged.sum())
    low, high = share_interval(hits, total)
    chance = share_interval(round(alarms * found.num_images), found.num_images)
    share = Measure(
        hits / total, floor=alarms, low=low, high=high, count=total, reason=found.reason or None
    )
    excess = Measure(
        _beyond(hits / total, alarms), low=_beyond(low, chance[1]), high=_beyond(high, chance[0]),
        count=total, reason=found.reason or None,
    )  # fmt: skip
    return share, excess


def _beyond(share: float, chance: float) -> float:
    return max(0.0, (share - chance) / (1 - chance)) if chance < 1 else 0.0


def _threshold(distances: Floats, allowed: float) -> float:
    rank = max(1, math.floor(allowed * (len(distances) + 1)))
    return float(np.partition(distances, rank - 1)[rank - 1])


def _false_alarms(distances: Floats, subjects: Ints, allowed: float, seed: int) -> float:
    names, owner = np.unique(subjects, return_inverse=True)
    rng = np.random.default_rng(runtime.derived_seed(seed, "folds"))
    fold = (rng.permutation(len(names)) % min(_FOLDS, len(names)))[owner]
    hits = 0
    for number in np.unique(fold):
        inside = fold == number
        hits += int((distances[inside] < _threshold(distances[~inside], allowed)).sum())
    return hits / len(distances)
