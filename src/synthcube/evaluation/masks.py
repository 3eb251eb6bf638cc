"""Masks of predictions beside real ones: how large each class is, and how far it overlaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from synthcube.environment import derived_seed
from synthcube.evaluation.arrays import Array, Floats, Ints, Mask
from synthcube.evaluation.fidelity import draw_splits
from synthcube.evaluation.intervals import mean_measure
from synthcube.evaluation.pairs import Pairs
from synthcube.evaluation.results import BASELINE_NOTE, Measure, Plot, Section, missing
from synthcube.evaluation.sets import ImageSet, subject_numbers

_VOXELS_AT_ONCE = 1 << 22
_SPLITS = 20
_UNRELATED = 200  # pairs behind the baseline of Dice
_MM3_IN_ML = 1000.0

Class = tuple[int, int]  # channel, and value of its voxels


def compare_masks(
    predictions: ImageSet, labels: ImageSet, pairs: Pairs | None, seed: int
) -> Section:
    """Of every class but the background: size, presence and, where images are paired, Dice.

    Names end in the channel and the class: `dice_channel_1_class_2`. Sizes are millilitres of a
    volume and voxels of a 2D image. Their distance is the first Wasserstein distance between the
    sizes in predictions and in labels, divided by the mean size in the labels; its baseline is that
    of two halves of the labels, of different subjects. Dice (Biometrics 1945) is the mean over the
    pairs where the class is in either image; its baseline is that of labels of different subjects.
    """
    section = Section("masks")
    size_name, unit = "area", 1.0
    if labels.rank == 3:
        size_name, unit = "volume", float(np.prod(labels.spacing_mm[:3])) / _MM3_IN_ML
    classes = [(channel, value) for channel, values in labels.masks.items() for value in values[1:]]
    sizes = [_sizes(images, classes) * unit for images in (predictions, labels)]
    subjects = predictions.subjects(), labels.subjects()
    splits = _halves(predictions, labels, seed)
    for number, (channel, value) in enumerate(classes):
        name = f"channel_{channel}_class_{value}"
        ours, theirs = sizes[0][:, number], sizes[1][:, number]
        section.measures |= {
            f"{size_name}_{name}": mean_measure(
                ours, subjects[0], derived_seed(seed, name), real_baseline=float(theirs.mean())
            ),
            f"{size_name}_distance_{name}": _distance(ours, theirs, splits),
            f"present_{name}": mean_measure(
                (ours > 0).astype(np.float64), subjects[0], derived_seed(seed, name),
                real_baseline=float((theirs > 0).mean()),
            ),
        }  # fmt: skip
        series = {"predictions": ours.tolist(), "labels": theirs.tolist()}
        title = f"{size_name.capitalize()} of class {value}, channel {channel}"
        section.plots.append(
            Plot(title, "histogram", series, "ml" if labels.rank == 3 else "voxels", "images")
        )
    if pairs:
        _add_dice(section, predictions, labels, pairs, classes, seed)
    section.notes = [
        f"{BASELINE_NOTE} is what the labels themselves have: their mean size, their share of "
        "images with the class, the distance of sizes between two halves of them; for Dice, the "
        "overlap of labels of different subjects."
    ]
    return section


def _sizes(images: ImageSet, classes: Sequence[Class]) -> Floats:
    """(N, classes): voxels of each class in each image."""
    counts = []
    for rows in images.portions(range(len(images)), _VOXELS_AT_ONCE):
        voxels = images.read(rows)
        counts.append(np.stack([_inside(voxels, part).sum(axis=1) for part in classes], axis=1))
    return np.concatenate(counts).astype(np.float64)


def _inside(voxels: Array, part: Class) -> Mask:
    """(n, voxels of a channel): whether each is of that class."""
    channel, value = part
    inside: Mask = voxels[:, channel].reshape(len(voxels), -1) == value
    return inside


def _halves(predictions: ImageSet, labels: ImageSet, seed: int) -> list[tuple[Ints, Ints]]:
    """Places of two halves of the labels, of different subjects; empty of a single subject."""
    of_p, of_l = subject_numbers(predictions, labels)
    if len(np.unique(of_l)) < 2:
        return []
    splits = draw_splits((of_p, of_l), _SPLITS, seed)
    return [(split.half, split.other) for split in splits if len(split.half)]


def _distance(ours: Floats, theirs: Floats, splits: Sequence[tuple[Ints, Ints]]) -> Measure:
    from scipy.stats import wasserstein_distance

    mean = float(theirs.mean())
    if mean == 0:
        return missing("no label has the class")
    baseline = [wasserstein_distance(theirs[one], theirs[other]) / mean for one, other in splits]
    return Measure(
        float(wasserstein_distance(ours, theirs)) / mean,
        float(np.mean(baseline)) if baseline else None,
        count=len(ours),
    )


def _add_dice(
    section: Section, predictions: ImageSet, labels: ImageSet, pairs: Pairs,
    classes: Sequence[Class], seed: int,
) -> None:  # fmt: skip
    scores = _dice(predictions, labels, pairs, classes)
    of_labels = labels.subjects()
    subjects = of_labels[[label for _, label in pairs]]
    rng = np.random.default_rng(derived_seed(seed, "unrelated masks"))
    order = rng.permutation(sorted({label for _, label in pairs}))[: _UNRELATED + 1]
    couples = zip(order.tolist(), np.roll(order, 1).tolist(), strict=True)
    unrelated = [(a, b) for a, b in couples if of_labels[a] != of_labels[b]]
    baselines = _dice(labels, labels, unrelated, classes) if unrelated else None
    for number, (channel, value) in enumerate(classes):
        name = f"dice_channel_{channel}_class_{value}"
        ours = scores[:, number]
        known = np.isfinite(ours)
        others = baselines[:, number] if baselines is not None else np.array([np.nan])
        others = others[np.isfinite(others)]
        left_out = int((~known).sum())
        section.measures[name] = mean_measure(
            ours[known], subjects[known], derived_seed(seed, name),
            real_baseline=float(others.mean()) if len(others) else None,
            reason=f"{left_out} of {len(ours)} pairs have the class in neither image, they are "
            "left out" if left_out else "",
        )  # fmt: skip
    section.cases = [
        {"subject": labels.rows[j].subject, "prediction": str(predictions.rows[i].channels[0]),
         "label": str(labels.rows[j].channels[0])}
        | {
            f"dice_channel_{channel}_class_{value}":
                None if np.isnan(scores[row, number]) else float(scores[row, number])
            for number, (channel, value) in enumerate(classes)
        }
        for row, (i, j) in enumerate(pairs)
    ]  # fmt: skip


def _dice(
    predictions: ImageSet, labels: ImageSet, pairs: Pairs, classes: Sequence[Class]
) -> Floats:
    """(pairs, classes): 2 |A and B| / (|A| + |B|); NaN where the class is in neither image."""
    rows = []
    for some in labels.portions(pairs, _VOXELS_AT_ONCE):
        x, y = predictions.read([i for i, _ in some]), labels.read([j for _, j in some])
        scores = []
        for part in classes:
            ours, theirs = _inside(x, part), _inside(y, part)
            total = (ours.sum(axis=1) + theirs.sum(axis=1)).astype(np.float64)
            both = 2.0 * (ours & theirs).sum(axis=1)
            scores.append(np.divide(both, total, out=np.full(len(x), np.nan), where=total > 0))
        rows.append(np.stack(scores, axis=1))
    return np.concatenate(rows)
