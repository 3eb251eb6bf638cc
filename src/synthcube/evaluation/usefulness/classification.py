"""How well two classifiers do on the same images: accuracy, recall, area under the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from synthcube import runtime
from synthcube.evaluation.intervals import auc, mean_interval
from synthcube.evaluation.results import Measure, Plot, Section

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_RESAMPLES = 500
_HARDLY = 0.1
"""Recall above guessing that a classifier trained on real images must reach to say anything."""


def judge(
    section: Section,
    scores: Mapping[str, Floats],
    truth: Ints,
    owners: Ints,
    names: Sequence[str],
    seed: int,
) -> None:
    """Add to `section` what classifiers trained on "synthetic" and on "real" images reach.

    Args:
        scores: (N, classes) of each.
        truth: (N,), class from 0.
        owners: (N,), number of each image's subject.
        names: of the classes.
    """
    right = {name: (each.argmax(axis=1) == truth) * 1.0 for name, each in scores.items()}
    _add_measures(section, scores, right, truth, owners, seed)
    recalls = {
        name: [float(each[truth == i].mean()) for i in range(len(names))]
        for name, each in right.items()
    }
    section.facts["recall"] = {
        name: dict(zip(names, each, strict=True)) for name, each in recalls.items()
    }
    series = {f"trained on {name} images": each for name, each in recalls.items()}
    section.plots.append(
        Plot("Recall of each class", "bars", series, "class", "recall", tuple(names))
    )
    if np.mean(recalls["real"]) < 1 / len(names) + _HARDLY:
        section.notes.append(
            "Real images teach this classifier hardly more than guessing: the comparison says "
            "nothing about the synthetic ones."
        )


def _add_measures(
    section: Section, scores: Mapping[str, Floats], right: Mapping[str, Floats], truth: Ints,
    owners: Ints, seed: int,
) -> None:  # fmt: skip
    classes = np.unique(truth)
    reached = {
        "accuracy": {name: float(each.mean()) for name, each in right.items()},
        "balanced_accuracy": {
            name: float(np.mean([each[truth == i].mean() for i in classes]))
            for name, each in right.items()
        },
        "auc": {name: _macro_auc(each, truth) for name, each in scores.items()},
    }
    guessed = {"accuracy": float(np.bincount(truth).max() / len(truth)), "auc": 0.5}
    guessed["balanced_accuracy"] = 1 / len(classes)
    for what, values in reached.items():
        for name, value in values.items():
            floor = guessed[what] if name == "real" else values["real"]
            low, high = _interval(what, right[name], truth, owners, seed)
            measure = Measure(value, floor, low, high, len(truth))
            section.measures[f"{what}_{name}"] = measure
    difference = right["synthetic"] - right["real"]
    low, high = mean_interval(difference, owners, seed) or (None, None)
    section.measures["accuracy_difference"] = Measure(
        float(difference.mean()), None, low, high, len(truth)
    )


def _interval(
    what: str, right: Floats, truth: Ints, owners: Ints, seed: int
) -> tuple[float | None, float | None]:
    if what == "auc":
        return None, None
    if what == "accuracy":
        return mean_interval(right, owners, seed) or (None, None)
    return _balanced_interval(right, truth, owners, seed)


def _balanced_interval(
    right: Floats, truth: Ints, owners: Ints, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Percentile bootstrap over subjects of the mean recall."""
    _, owner = np.unique(owners, return_inverse=True)
    num, num_classes = int(owner.max()) + 1, int(truth.max()) + 1
    if num < 2:
        return None, None
    hits, counts = np.zeros((num, num_classes)), np.zeros((num, num_classes))
    np.add.at(hits, (owner, truth), right)
    np.add.at(counts, (owner, truth), 1)
    rng = np.random.default_rng(runtime.derived_seed(seed, "recall"))
    means = []
    for _ in range(_RESAMPLES):
        drawn = np.bincount(rng.integers(num, size=num), minlength=num)
        found = drawn @ counts
        means.append(((drawn @ hits)[found > 0] / found[found > 0]).mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _macro_auc(scores: Floats, truth: Ints) -> float:
    """Mean over the classes of each against the rest."""
    areas = [auc(scores[truth == i, i], scores[truth != i, i]) for i in range(scores.shape[1])]
    return float(np.mean(areas))
