"""Whether predictions are training images again: nearest neighbours, near-copies, duplicates.

The share of near-copies at a threshold that held-out images calibrate follows Dar et al.,
"Unconditional Latent Diffusion Models Memorize Patient Imaging Data" (arXiv 2402.01054); that a
distance finds no copies is no proof of privacy: Yao et al., "The DCR Delusion" (arXiv 2505.01524).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from synthcube import runtime
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.copies.calibration import Calibration
from synthcube.evaluation.copies.copy_distances import (
    CopySearch,
    Nearest,
    nearest_in_features,
    nearest_in_pixels,
    search_measures,
    searched,
)
from synthcube.evaluation.copies.lookalikes import most_alike
from synthcube.evaluation.copies.overlap import Overlap, overlap, repeated
from synthcube.evaluation.copies.views import Views, views
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.intervals import share_interval
from synthcube.evaluation.planes import plane
from synthcube.evaluation.results import Measure, Picture, Plot, Section, missing

log = logging.getLogger("synthcube")

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

NO_COPIES = "No copies found at this threshold."
_SHOWN = 8


def memorisation(
    predictions: ImageSet,
    labels: ImageSet,
    train_data: ImageSet,
    features: Mapping[str, Array] | None,
    config: EvaluationConfig,
    seed: int,
) -> Section:
    """Near-copies of training images among the predictions, and duplicates of each other.

    In pixel space the distance is 1 minus the correlation of the images, blurred by a voxel of at
    most 64 (volumes 32) on a side, mirrored along any spatial axes and shifted by at most 1/16 of
    each side; in feature space it is Euclidean, of the images as they are.

    Args:
        labels: held-out images of subjects that are not in the training data; they say how near
            to a training image an image is that cannot be a copy.
        features: (N, D) of "predictions", "labels" and "train_data", one row for each image.

    Raises:
        ImageError: the three sets differ in shape.
    """
    shared = overlap(labels, train_data)
    if shared:
        log.warning("Labels are not held out: %s.", shared.named(labels))
    exact = _exact(predictions, train_data)
    with views(predictions, labels, train_data) as (p, held_out, t):
        found = [nearest_in_pixels(p, held_out, t)]
        twins = _twins(p, t, seed)
    found += [nearest_in_features(features)] if features is not None else []
    searches = [searched(each, labels, shared, exact, config, seed) for each in found]
    section = Section("memorisation")
    for each in searches:
        section.measures |= search_measures(each, labels, len(train_data))
    section.measures["exact_copies"] = _share(len(exact), len(predictions))
    section.measures |= _duplicates(predictions, twins, searches[0].calibration)
    section.facts = _facts(searches, config, predictions, labels, train_data)
    section.notes = _notes(searches, shared)
    section.plots = [_plot(each) for each in searches]
    section.pictures = [_closest(predictions, train_data, found[0])]
    section.cases = _cases(predictions, train_data, searches)
    return section


def _exact(predictions: ImageSet, train_data: ImageSet) -> tuple[int, ...]:
    known = set(train_data.digests)
    return tuple(i for i, each in enumerate(predictions.digests) if each in known)


def _twins(p: Views, t: Views, seed: int) -> tuple[Floats, Floats]:
    """Distances to the nearest other image within predictions and within as many real ones."""
    count = min(len(p), len(t))
    if count < 2:
        return np.empty(0), np.empty(0)
    found = []
    for each, name in ((p, "predictions"), (t, "train_data")):
        rng = np.random.default_rng(runtime.derived_seed(seed, "twins", name))
        chosen = np.sort(rng.permutation(len(each))[:count])
        some = each if count == len(each) else each.taken(chosen)
        alike = most_alike(some, some, flips=False, exclude_self=True)
        found.append(1 - alike.similarity.astype(np.float64))
    return found[0], found[1]


def _duplicates(
    predictions: ImageSet, twins: tuple[Floats, Floats], calibration: Calibration | None
) -> dict[str, Measure]:
    doubled = repeated(predictions.digests)
    exact = _share(len(doubled), len(predictions))
    if not len(twins[0]):
        near = missing("two predictions are needed")
    elif calibration is None:
        near = missing("there is no threshold; see near_copies_pixels")
    else:
        made, real = (float((each < calibration.threshold).mean()) for each in twins)
        near = Measure(made, floor=real, count=len(twins[0]))
    return {"exact_duplicates": exact, "near_duplicates": near}


def _share(hits: int, total: int) -> Measure:
    low, high = share_interval(hits, total)
    return Measure(hits / total, low=low, high=high, count=total)


def _facts(searches: list[CopySearch], config: EvaluationConfig, *sets: ImageSet) -> dict[str, Any]:
    told: dict[str, Any] = {f"num_{each.name}": len(each) for each in sets}
    told |= {
        "allowed_false_alarms": config.copy_false_alarms,
        "num_exact_copies": len(searches[0].exact),
    }
    for each in searches:
        if each.calibration:
            told[f"threshold_{each.space}"] = each.calibration.threshold
            told[f"num_near_copies_{each.space}"] = int(each.flagged.sum())
    mirrored = searches[0].near.mirrored
    flagged = np.flatnonzero(searches[0].flagged)
    return told | {"num_mirrored_near_copies": sum(bool(mirrored[i]) for i in flagged)}


def _verdict(of: CopySearch) -> str:
    if of.calibration is None:
        return f"near-copies could not be looked for: {of.void}."
    hits, total = int(of.flagged.sum()), len(of.flagged)
    if not hits:
        return NO_COPIES
    chance = max(of.calibration.false_alarms, 1 / (of.calibration.num_images + 1))
    if share_interval(hits, total)[0] > chance:
        return (
            f"{hits} of {total} predictions are near-copies of training images; of real images "
            f"that are none, {chance * total:.3g} would be flagged."
        )
    return (
        f"{hits} of {total} predictions are flagged, no more than of real images that are no "
        "copies; look at the closest pairs."
    )


def _notes(searches: list[CopySearch], shared: Overlap) -> list[str]:
    told = []
    if shared:
        told.append(f"The calibration is void: of the labels, {shared.told()}.")
    if exact := searches[0].exact:
        told.append(f"{len(exact)} predictions are training images, voxel for voxel.")
    told += [f"In {each.space}: {_verdict(each)}" for each in searches]
    told.append(
        "What this looks for are whole images, mirrored, shifted a little or noisy: parts of "
        "images, or copies changed more than that, pass it. It does not show that nothing of a "
        "patient can be learned from the predictions or the model."
    )
    return told


def _plot(of: CopySearch) -> Plot:
    what = "1 - correlation" if of.space == "pixels" else "distance of features"
    series = {
        "predictions": of.near.predictions.tolist(),
        "held-out real images": of.near.labels.tolist(),
    }
    lines = {"threshold": of.calibration.threshold} if of.calibration else {}
    title = f"To the nearest training image, in {of.space}"
    return Plot(title, "histogram", series, what, "images", lines=lines)


def _closest(predictions: ImageSet, train_data: ImageSet, near: Nearest) -> Picture:
    order = np.argsort(near.predictions, kind="stable")[:_SHOWN]
    rows, captions, titles = [], [], []
    for place in order:
        pair = predictions.read([place])[0], train_data.read([near.index[place]])[0]
        rows.append([plane(each, train_data.bounds, raster=train_data.raster) for each in pair])
        way = "mirrored, " if near.mirrored[place] else ""
        far = f"{way}distance {near.predictions[place]:.3g}"
        captions.append(["prediction", f"training image; {far}"])
        titles.append(predictions.rows[place].channels[0].name)
    title = "Closest pairs of prediction and training image"
    return Picture(title, rows, tuple(titles), captions)


def _cases(
    predictions: ImageSet, train_data: ImageSet, searches: list[CopySearch]
) -> list[dict[str, float | int | str | None]]:
    cases: list[dict[str, float | int | str | None]] = []
    flagged = [each.flagged for each in searches]
    mirrored = searches[0].near.mirrored
    for place, row in enumerate(predictions.rows):
        case: dict[str, float | int | str | None] = {
            "prediction": str(row.channels[0]),
            "mirrored": "".join("xyz"[axis] for axis in mirrored[place]),
        }
        for each, flags in zip(searches, flagged, strict=True):
            known = train_data.rows[each.near.index[place]]
            case[f"nearest_{each.space}"] = str(known.channels[0])
            case[f"distance_{each.space}"] = float(each.near.predictions[place])
            case[f"near_copy_{each.space}"] = int(flags[place])
        cases.append(case)
    return cases
