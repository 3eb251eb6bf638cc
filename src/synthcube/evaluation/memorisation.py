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
from functools import partial
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
        nearest_p, nearest_l = (nearest_images(images, t, flips=True) for images in (p, held_out))
        duplicates = _duplicate_distances(p, t, seed)
    far, far_labels = (1 - n.similarity.astype(np.float64) for n in (nearest_p, nearest_l))
    searches = [CopySearch("pixels", far, far_labels, nearest_p.index, exact, nearest_p.mirrored)]
    if features is not None:
        (far_p, index), (far_l, _) = (
            neighbours.nearest(features[name], features["train_data"], 1)
            for name in ("predictions", "labels")
        )
        far, far_labels = (values[:, 0].astype(np.float64) for values in (far_p, far_l))
        searches.append(CopySearch("features", far, far_labels, index[:, 0], exact))
    section = Section("memorisation")
    for search in searches:
        _calibrate(search, labels, shared, config, seed)
        section.measures |= _search_measures(search, labels, len(train_data))
        section.plots.append(_plot(search))
    section.measures["exact_copies"] = _share(len(exact), len(predictions))
    section.measures |= _duplicates(predictions, duplicates, searches[0].calibration)
    sets = (predictions, labels, train_data)
    section.facts = {f"num_{images.name}": len(images) for images in sets}
    section.facts |= _facts(searches, config)
    section.notes = _notes(searches, shared)
    section.pictures = [_closest_pairs(predictions, train_data, searches[0])]
    section.cases = _cases(predictions, train_data, searches)
    return section


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold on the distance to the nearest training image."""

    threshold: float  # an image nearer than this is a near-copy
    false_alarms: float  # share of held-out images below the threshold that other subjects set
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
    return Calibration(_threshold(distances, allowed), false_alarms, total, reason)


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


@dataclass(slots=True)
class CopySearch:
    """Distances to the nearest training image, and the threshold of near-copies among them."""

    space: str  # pixels or features
    predictions: Floats  # (N,), distance of each prediction
    labels: Floats  # (M,), of each held-out image
    index: Ints  # (N,), training image nearest to each prediction
    exact: tuple[int, ...]  # predictions that are near-copies whatever the threshold
    mirrored: tuple[tuple[int, ...], ...] = ()  # axes of each prediction, where they were tried
    calibration: Calibration | None = None
    invalid_reason: str = ""  # why there is no calibration

    @property
    def flagged(self) -> Mask:
        """(N,): which predictions are near-copies."""
        flags = np.zeros(len(self.predictions), np.bool_)
        if self.calibration:
            flags = self.calibration.flagged(self.predictions)
        flags[list(self.exact)] = True
        return flags


def _calibrate(
    search: CopySearch, labels: ImageSet, shared: Overlap, config: EvaluationConfig, seed: int
) -> None:
    """Add the threshold that held-out images set, or why they cannot."""
    if shared:
        search.invalid_reason = (
            f"the labels cannot calibrate a threshold: {shared.anonymous()}; hold out other images"
        )
        return
    seed = environment.derived_seed(seed, search.space)
    calibration = calibrate(search.labels, labels.subjects(), config.copy_false_alarms, seed)
    if calibration is None:
        search.invalid_reason = (
            f"at least {FEWEST} held-out images, of two subjects, are needed for a threshold"
        )
    # a threshold among copies would pass every copy
    elif calibration.threshold < _SAME * max(1.0, float(np.median(search.labels))):
        number = int((search.labels <= calibration.threshold).sum())
        search.invalid_reason = (
            f"{number} of the labels are copies of training images themselves (mirrored, "
            "shifted or with other intensities): hold out other images"
        )
    else:
        search.calibration = calibration


def _search_measures(search: CopySearch, labels: ImageSet, num_trained: int) -> dict[str, Measure]:
    """How near the predictions are beside the labels, and the share of near-copies."""
    space, far, far_labels = search.space, search.predictions, search.labels
    low, high = auc_interval(-far, -far_labels, (np.arange(len(far)), labels.subjects()))
    # labels that are not held out do not show what is near
    reason, count = search.invalid_reason or None, len(far)
    medians = float(np.median(far)), float(np.median(far_labels))
    area = auc(-far, -far_labels)
    measures = {
        f"distance_{space}": Measure(*medians, count=count, reason=reason),
        f"nearer_than_labels_{space}": Measure(area, 0.5, low, high, count, reason),
    }
    names = (f"near_copies_{space}", f"beyond_chance_{space}", f"copied_share_{space}")
    if search.calibration is None:
        return measures | dict.fromkeys(names, missing(search.invalid_reason))
    copied = Measure(len(np.unique(search.index[search.flagged])) / num_trained, count=num_trained)
    shares = (*share_measures(search.flagged, search.calibration), copied)
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
    return {"exact_duplicates": _share(num_repeated, len(predictions)), "near_duplicates": near}


def _share(hits: int, total: int) -> Measure:
    low, high = share_interval(hits, total)
    return Measure(hits / total, low=low, high=high, count=total)


def _facts(searches: list[CopySearch], config: EvaluationConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "allowed_false_alarms": config.copy_false_alarms, "num_exact_copies": len(searches[0].exact)
    }  # fmt: skip
    for search in searches:
        if search.calibration:
            facts[f"threshold_{search.space}"] = search.calibration.threshold
            facts[f"num_near_copies_{search.space}"] = int(search.flagged.sum())
    mirrored = np.array([bool(axes) for axes in searches[0].mirrored])
    return facts | {"num_mirrored_near_copies": int((mirrored & searches[0].flagged).sum())}


def _verdict(search: CopySearch) -> str:
    if search.calibration is None:
        return f"near-copies could not be looked for: {search.invalid_reason}."
    hits, total = int(search.flagged.sum()), len(search.flagged)
    if not hits:
        return NO_COPIES
    chance = max(search.calibration.false_alarms, 1 / (search.calibration.num_images + 1))
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
    notes += [f"In {search.space}: {_verdict(search)}" for search in searches]
    notes.append(
        "The search is for whole images, mirrored, shifted a little or noisy. Parts of images, or "
        "copies changed more than that, are not found. It does not show that nothing of a patient "
        "can be learned from the predictions or the model."
    )
    return notes


def _plot(search: CopySearch) -> Plot:
    label = "1 - correlation" if search.space == "pixels" else "distance of features"
    predictions, held_out = search.predictions.tolist(), search.labels.tolist()
    series = {"predictions": predictions, "held-out real images": held_out}
    lines = {"threshold": search.calibration.threshold} if search.calibration else {}
    title = f"To the nearest training image, in {search.space}"
    return Plot(title, "histogram", series, label, "images", lines=lines)


def _closest_pairs(predictions: ImageSet, train_data: ImageSet, search: CopySearch) -> Picture:
    rows, captions, titles = [], [], []
    show = partial(
        upright, bounds=train_data.bounds, raster=train_data.raster,
        spacing_mm=train_data.spacing_mm,
    )  # fmt: skip
    for row in np.argsort(search.predictions, kind="stable")[:_PAIRS_SHOWN].tolist():
        pair = predictions.read([row])[0], train_data.read([search.index[row]])[0]
        rows.append([show(image) for image in pair])
        mirrored = "mirrored, " if search.mirrored[row] else ""
        distance = f"{mirrored}distance {search.predictions[row]:.3g}"
        captions.append(["prediction", f"training image; {distance}"])
        titles.append(predictions.rows[row].channels[0].name)
    title = "Closest pairs of prediction and training image"
    return Picture(title, rows, tuple(titles), captions)


def _cases(
    predictions: ImageSet, train_data: ImageSet, searches: list[CopySearch]
) -> list[dict[str, Cell]]:
    cases: list[dict[str, Cell]] = [
        {"prediction": str(row.channels[0]), "mirrored": "".join("xyz"[axis] for axis in axes)}
        for row, axes in zip(predictions.rows, searches[0].mirrored, strict=True)
    ]
    for search in searches:
        space, flagged = search.space, search.flagged
        for number, case in enumerate(cases):
            case[f"nearest_{space}"] = str(train_data.rows[search.index[number]].channels[0])
            case[f"distance_{space}"] = float(search.predictions[number])
            case[f"near_copy_{space}"] = int(flagged[number])
    return cases
