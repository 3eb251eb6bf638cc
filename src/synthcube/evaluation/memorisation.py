"""Whether predictions are training images again: nearest neighbours, near-copies, duplicates.

The share of near-copies at a threshold that held-out images calibrate follows Dar et al.,
"Unconditional Latent Diffusion Models Memorize Patient Imaging Data" (arXiv 2402.01054); that a
distance finds no copies is no proof of privacy: Yao et al., "The DCR Delusion" (arXiv 2505.01524).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthcube import environment
from synthcube.evaluation import neighbours
from synthcube.evaluation.arrays import Array, Floats, Ints, Mask
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.intervals import auc, auc_interval, share_interval
from synthcube.evaluation.nearest_images import (
    DownsampledCopies,
    downsampled_copies,
    nearest_images,
)
from synthcube.evaluation.results import Cell, Measure, Picture, Plot, Section, missing, upright
from synthcube.evaluation.sets import ImageSet, Overlap, overlap

log = logging.getLogger("synthcube")


NO_COPIES = "No copies found at this threshold."
FEWEST = 10  # held-out images below which no threshold is set
_FOLDS = 20
_SAME = 1e-5  # held-out images nearer than this to a training image are copies of it themselves
_PAIRS_SHOWN = 8


def memorisation(
    predictions: ImageSet, labels: ImageSet, train_data: ImageSet,
    features: Mapping[str, Array] | None, config: EvaluationConfig, seed: int,
) -> Section:  # fmt: skip
    """Near-copies of training images among the predictions, and duplicates among predictions.

    In pixel space the distance is 1 minus the correlation of the images, blurred by a voxel of at
    most 64 (volumes 32) on a side, mirrored along any spatial axes and shifted by at most 1/16 of
    each side; in feature space it is Euclidean, of the images as they are.

    Args:
        labels: held-out images of subjects that are not in the training data; they show how near
            to a training image an image is that cannot be a copy.
        features: (N, D) of "predictions", "labels" and "train_data", one row for each image.
    """
    shared = overlap(labels, train_data)
    if shared:
        log.warning("Labels are not held out: %s.", shared.named(labels))
    known = set(train_data.digests)
    exact = tuple(i for i, digest in enumerate(predictions.digests) if digest in known)
    with downsampled_copies(predictions, labels, train_data) as (p, held_out, t):
        distances = [nearest_in_pixels(p, held_out, t)]
        duplicates = _duplicate_distances(p, t, seed)
    if features is not None:
        distances.append(nearest_in_features(features))
    searches = [search(nearest, labels, shared, exact, config, seed) for nearest in distances]
    section = Section("memorisation")
    for result in searches:
        section.measures |= search_measures(result, labels, len(train_data))
    section.measures["exact_copies"] = _share(len(exact), len(predictions))
    section.measures |= _duplicates(predictions, duplicates, searches[0].calibration)
    section.facts = _facts(searches, config, predictions, labels, train_data)
    section.notes = _notes(searches, shared)
    section.plots = [_plot(result) for result in searches]
    section.pictures = [_closest_pairs(predictions, train_data, distances[0])]
    section.cases = _cases(predictions, train_data, searches)
    return section


@dataclass(frozen=True, slots=True)
class TrainingDistances:
    """Distances of each prediction and each held-out image to its nearest training image."""

    space: str  # pixels or features
    predictions: Floats
    labels: Floats
    index: Ints  # training image nearest to each prediction
    mirrored: tuple[tuple[int, ...], ...] = ()
    """Axes along which each prediction was mirrored; empty where that was not tried."""


def nearest_in_pixels(
    p: DownsampledCopies, held_out: DownsampledCopies, t: DownsampledCopies
) -> TrainingDistances:
    """1 minus the correlation, at the best mirroring and shift."""
    of_p, of_labels = (nearest_images(images, t, flips=True) for images in (p, held_out))
    far, far_labels = (1 - n.similarity.astype(np.float64) for n in (of_p, of_labels))
    return TrainingDistances("pixels", far, far_labels, of_p.index, of_p.mirrored)


def nearest_in_features(features: Mapping[str, Array]) -> TrainingDistances:
    """Euclidean distance of (N, D) of "predictions" and "labels" to those of "train_data"."""
    of_p, index = neighbours.nearest(features["predictions"], features["train_data"], 1)
    of_labels, _ = neighbours.nearest(features["labels"], features["train_data"], 1)
    far, far_labels = (values[:, 0].astype(np.float64) for values in (of_p, of_labels))
    return TrainingDistances("features", far, far_labels, index[:, 0])


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold on the distance to the nearest training image."""

    threshold: float  # an image nearer than this is a near-copy
    false_alarms: float
    """Share of held-out images below the threshold that those of other subjects set."""
    num_images: int
    reason: str  # a caution; empty where there is none

    def flagged(self, distances: Floats) -> Mask:
        return distances < self.threshold


def calibrate(distances: Floats, subjects: Ints, allowed: float, seed: int) -> Calibration | None:
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
            f"{total} held-out images are too few for a false alarm rate of {allowed:g}, "
            f"{math.ceil(1 / allowed) - 1} are needed: expect about {1 / (total + 1):.2g}"
        )
    elif num_subjects < total and math.floor(allowed * (num_subjects + 1)) < 1:
        reason = (
            f"the {total} held-out images are of {num_subjects} subjects: the threshold depends on "
            "few of them"
        )
    false_alarms = _false_alarms(distances, subjects, allowed, seed)
    threshold = _threshold(distances, allowed)
    return Calibration(threshold, false_alarms, total, reason)


def _threshold(distances: Floats, allowed: float) -> float:
    rank = max(1, math.floor(allowed * (len(distances) + 1)))
    return float(np.partition(distances, rank - 1)[rank - 1])


def _false_alarms(distances: Floats, subjects: Ints, allowed: float, seed: int) -> float:
    names, owner = np.unique(subjects, return_inverse=True)
    rng = np.random.default_rng(environment.derived_seed(seed, "folds"))
    fold = (rng.permutation(len(names)) % min(_FOLDS, len(names)))[owner]
    hits = 0
    for number in np.unique(fold):
        inside = fold == number
        hits += int((distances[inside] < _threshold(distances[~inside], allowed)).sum())
    return hits / len(distances)


def share_measures(flagged: Mask, calibration: Calibration) -> tuple[Measure, Measure]:
    """The share of near-copies beside the false alarms, and the share that is left without these.

    The second is the prevalence estimate of Rogan and Gladen (Am. J. Epidemiol. 1978) for a test
    that misses none: a lower bound where copies are changed too much to be seen.
    """
    total, alarms = len(flagged), calibration.false_alarms
    hits, reason = int(flagged.sum()), calibration.reason or None
    low, high = share_interval(hits, total)
    num_alarms = round(alarms * calibration.num_images)
    chance_low, chance_high = share_interval(num_alarms, calibration.num_images)
    share = Measure(hits / total, alarms, low, high, total, reason)
    beyond = Measure(
        _beyond(hits / total, alarms), low=_beyond(low, chance_high),
        high=_beyond(high, chance_low), count=total, reason=reason,
    )  # fmt: skip
    return share, beyond


def _beyond(share: float, chance: float) -> float:
    return max(0.0, (share - chance) / (1 - chance)) if chance < 1 else 0.0


@dataclass(frozen=True, slots=True)
class CopySearch:
    """Distances, and the threshold below which an image counts as a near-copy."""

    nearest: TrainingDistances
    calibration: Calibration | None
    invalid_reason: str  # why there is no threshold
    exact: tuple[int, ...]  # predictions that are near-copies whatever the threshold

    @property
    def space(self) -> str:
        return self.nearest.space

    @property
    def flagged(self) -> Mask:
        """(N,): which predictions are near-copies."""
        far = self.nearest.predictions
        flags = self.calibration.flagged(far) if self.calibration else np.zeros(len(far), np.bool_)
        flags[list(self.exact)] = True
        return flags


def search(
    nearest: TrainingDistances, labels: ImageSet, shared: Overlap, exact: tuple[int, ...],
    config: EvaluationConfig, seed: int,
) -> CopySearch:  # fmt: skip
    """The distances with the threshold that held-out images calibrate, or why they cannot."""
    invalid, calibration = "", None
    if shared:
        invalid = (
            f"the labels cannot calibrate a threshold: {shared.anonymous()}; hold out other images"
        )
    else:
        seed = environment.derived_seed(seed, nearest.space)
        calibration = calibrate(nearest.labels, labels.subjects(), config.copy_false_alarms, seed)
        if calibration is None:
            invalid = (
                f"at least {FEWEST} held-out images, of two subjects, are needed for a threshold"
            )
        # a threshold among copies would pass every copy
        elif calibration.threshold < _SAME * max(1.0, float(np.median(nearest.labels))):
            number = int((nearest.labels <= calibration.threshold).sum())
            invalid = (
                f"{number} of the labels are copies of training images themselves (mirrored, "
                "shifted or with other intensities): hold out other images"
            )
    return CopySearch(nearest, None if invalid else calibration, invalid, exact)


def search_measures(result: CopySearch, labels: ImageSet, num_trained: int) -> dict[str, Measure]:
    """How near the predictions are beside the labels, and the share of near-copies."""
    space, far, far_labels = result.space, result.nearest.predictions, result.nearest.labels
    low, high = auc_interval(-far, -far_labels, (np.arange(len(far)), labels.subjects()))
    # labels that are not held out do not show what is near
    reason, count = result.invalid_reason or None, len(far)
    medians = float(np.median(far)), float(np.median(far_labels))
    measures = {
        f"distance_{space}": Measure(*medians, count=count, reason=reason),
        f"nearer_than_labels_{space}": Measure(
            auc(-far, -far_labels), 0.5, low, high, count, reason=reason
        ),
    }
    names = (f"near_copies_{space}", f"beyond_chance_{space}", f"copied_share_{space}")
    if result.calibration is None:
        return measures | dict.fromkeys(names, missing(result.invalid_reason))
    flagged = result.flagged
    copied = len(np.unique(result.nearest.index[flagged]))
    shares = (
        *share_measures(flagged, result.calibration),
        Measure(copied / num_trained, count=num_trained),
    )
    return measures | dict(zip(names, shares, strict=True))


def _duplicate_distances(
    p: DownsampledCopies, t: DownsampledCopies, seed: int
) -> tuple[Floats, Floats]:
    """Distances to the nearest other image within predictions and within as many real ones."""
    count = min(len(p), len(t))
    if count < 2:
        return np.empty(0), np.empty(0)
    distances = []
    for images, name in ((p, "predictions"), (t, "train_data")):
        rng = np.random.default_rng(environment.derived_seed(seed, "twins", name))
        chosen = np.sort(rng.permutation(len(images))[:count])
        some = images if count == len(images) else images.subset(chosen)
        similarity = nearest_images(some, some, flips=False, exclude_self=True).similarity
        distances.append(1 - similarity.astype(np.float64))
    return distances[0], distances[1]


def _duplicates(
    predictions: ImageSet, distances: tuple[Floats, Floats], calibration: Calibration | None
) -> dict[str, Measure]:
    counts = Counter(predictions.digests)
    num_repeated = sum(counts[digest] > 1 for digest in predictions.digests)
    if not len(distances[0]):
        near = missing("two predictions are needed")
    elif calibration is None:
        near = missing("there is no threshold; see near_copies_pixels")
    else:
        share, real_share = (float((far < calibration.threshold).mean()) for far in distances)
        near = Measure(share, real_share, count=len(distances[0]))
    exact = _share(num_repeated, len(predictions))
    return {"exact_duplicates": exact, "near_duplicates": near}


def _share(hits: int, total: int) -> Measure:
    low, high = share_interval(hits, total)
    return Measure(hits / total, low=low, high=high, count=total)


def _facts(searches: list[CopySearch], config: EvaluationConfig, *sets: ImageSet) -> dict[str, Any]:
    facts: dict[str, Any] = {f"num_{images.name}": len(images) for images in sets}
    facts |= {
        "allowed_false_alarms": config.copy_false_alarms,
        "num_exact_copies": len(searches[0].exact),
    }
    for result in searches:
        if result.calibration:
            facts[f"threshold_{result.space}"] = result.calibration.threshold
            facts[f"num_near_copies_{result.space}"] = int(result.flagged.sum())
    mirrored = searches[0].nearest.mirrored
    flagged = np.flatnonzero(searches[0].flagged)
    return facts | {"num_mirrored_near_copies": sum(bool(mirrored[i]) for i in flagged)}


def _verdict(result: CopySearch) -> str:
    if result.calibration is None:
        return f"near-copies could not be looked for: {result.invalid_reason}."
    hits, total = int(result.flagged.sum()), len(result.flagged)
    if not hits:
        return NO_COPIES
    chance = max(result.calibration.false_alarms, 1 / (result.calibration.num_images + 1))
    if share_interval(hits, total)[0] > chance:
        return (
            f"{hits} of {total} predictions are near-copies of training images; of real images "
            f"that are not copies, {chance * total:.3g} would be flagged."
        )
    return (
        f"{hits} of {total} predictions are flagged, no more than of real images that are not "
        "copies; look at the closest pairs."
    )


def _notes(searches: list[CopySearch], shared: Overlap) -> list[str]:
    notes = []
    if shared:
        notes.append(f"The calibration is invalid: of the labels, {shared.anonymous()}.")
    if exact := searches[0].exact:
        notes.append(f"{len(exact)} predictions are training images, voxel for voxel.")
    notes += [f"In {result.space}: {_verdict(result)}" for result in searches]
    notes.append(
        "The search is for whole images, mirrored, shifted a little or noisy. Parts of images, or "
        "copies changed more than that, are not found. It does not show that nothing of a patient "
        "can be learned from the predictions or the model."
    )
    return notes


def _plot(result: CopySearch) -> Plot:
    label = "1 - correlation" if result.space == "pixels" else "distance of features"
    series = {
        "predictions": result.nearest.predictions.tolist(),
        "held-out real images": result.nearest.labels.tolist(),
    }
    lines = {"threshold": result.calibration.threshold} if result.calibration else {}
    title = f"To the nearest training image, in {result.space}"
    return Plot(title, "histogram", series, label, "images", lines=lines)


def _closest_pairs(
    predictions: ImageSet, train_data: ImageSet, nearest: TrainingDistances
) -> Picture:
    order = np.argsort(nearest.predictions, kind="stable")[:_PAIRS_SHOWN]
    rows, captions, titles = [], [], []
    for place in order:
        pair = predictions.read([place])[0], train_data.read([nearest.index[place]])[0]
        rows.append([upright(image, train_data.bounds, raster=train_data.raster) for image in pair])
        mirrored = "mirrored, " if nearest.mirrored[place] else ""
        distance = f"{mirrored}distance {nearest.predictions[place]:.3g}"
        captions.append(["prediction", f"training image; {distance}"])
        titles.append(predictions.rows[place].channels[0].name)
    title = "Closest pairs of prediction and training image"
    return Picture(title, rows, tuple(titles), captions)


def _cases(
    predictions: ImageSet, train_data: ImageSet, searches: list[CopySearch]
) -> list[dict[str, Cell]]:
    cases = []
    flags = [result.flagged for result in searches]
    mirrored = searches[0].nearest.mirrored
    for place, row in enumerate(predictions.rows):
        case: dict[str, Cell] = {
            "prediction": str(row.channels[0]),
            "mirrored": "".join("xyz"[axis] for axis in mirrored[place]),
        }
        for result, flagged in zip(searches, flags, strict=True):
            nearest = train_data.rows[result.nearest.index[place]]
            case[f"nearest_{result.space}"] = str(nearest.channels[0])
            case[f"distance_{result.space}"] = float(result.nearest.predictions[place])
            case[f"near_copy_{result.space}"] = int(flagged[place])
        cases.append(case)
    return cases
