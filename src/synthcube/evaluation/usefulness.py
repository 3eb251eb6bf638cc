"""Whether a classifier learns from predictions what it would have learned from real images.

Train on synthetic, test on real, beside train on real, test on real: Esteban et al., "Real-valued
(Medical) Time Series Generation" (2017); the classification accuracy score of Ravuri and Vinyals
(NeurIPS 2019).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from synthcube import environment
from synthcube.data.conditions import LABEL, cell
from synthcube.data.module import split_subjects
from synthcube.evaluation.arrays import Floats, Ints
from synthcube.evaluation.intervals import auc, mean_interval
from synthcube.evaluation.results import Measure, Plot, Section
from synthcube.evaluation.sets import ImageSet, overlap

_NOT_CLASSES = ("Seed", "Source")
_MOST_CLASSES = 20
_FEWEST = 5
"""Images of each class that are needed to train, and to test."""
_MOST = 2000  # training images of each side, at most
BARELY = 0.1
"""Balanced accuracy above guessing that a classifier trained on real images must reach to be
meaningful."""
TOO_EASY = 0.98
"""Balanced accuracy of a classifier trained on real images from which the task is too easy."""
_RESAMPLES = 500
_NOTE = (
    "The real baseline of a classifier trained on synthetic images is one trained on as many real "
    "ones; that of the latter is guessing. The classifier is small: the difference matters."
)
_EASY = (
    "the task is too easy: the classifier trained on real images is nearly perfect (balanced "
    "accuracy {:.3g}), so poor images may teach it as well, and a high number says nothing"
)

# The classifier. Voxels along each side of its input, at most; channels of its layers.
_SIDE = {2: 32, 3: 16}
_CHANNELS = {2: (16, 32, 64), 3: (8, 16, 32)}
_STEPS, _BATCH, _RATE, _DECAY = 200, 32, 5e-3, 1e-2
_SHIFT = 1 / 16  # largest random shift of a training image, as a share of each side


@dataclass(frozen=True, slots=True)
class _Examples:
    """Images of one set, with the number of each one's class."""

    images: ImageSet
    rows: Ints
    classes: Ints

    def subset(self, places: Ints) -> _Examples:
        return _Examples(self.images, self.rows[places], self.classes[places])


def usefulness(
    predictions: ImageSet, labels: ImageSet, train_data: ImageSet | None, seed: int
) -> Section | str:
    """A small classifier trained on predictions, and one on as many real images of the same
    classes, tested on the same held-out images.

    The classes are those of the column Label, else of another column that both manifests have.
    The real training images are `train_data`, without what the labels share with it; where there
    are none, half of the labels' subjects, and the other half tests.

    Returns:
        The section, or the reason why there is none.
    """
    column = class_column(predictions, labels)
    if column is None:
        return (
            f"predictions and labels share no column with 2 to {_MOST_CLASSES} classes in every "
            "row (Label, or a condition)"
        )
    names = sorted({cell(row, column) for row in labels.rows})
    if absent := _absent_classes(names, column, predictions):
        text = f"predictions have no image of {', '.join(absent)} (column {column})"
        return f"{text}, which the labels have"
    use_train_data = train_data is not None and not _absent_classes(names, column, train_data)
    real_source = train_data if use_train_data else None
    real, tests = _real_examples(real_source, labels, column, names, seed)
    synthetic = _examples(predictions, column, names)
    for title, examples in (
        ("predictions", synthetic), ("real images to train on", real),
        ("real images to test on", tests),
    ):  # fmt: skip
        counts = Counter(examples.classes.tolist())
        few = [f"{name}: {counts[i]}" for i, name in enumerate(names) if counts[i] < _FEWEST]
        if few:
            return f"at least {_FEWEST} {title} of each class are needed ({', '.join(few)})"
    synthetic, real = _equal_counts(synthetic, real, len(names), seed)
    seed_of_training = environment.derived_seed(seed, "classifier")
    scores = {
        name: _probabilities(examples, tests, len(names), seed_of_training)
        for name, examples in (("synthetic", synthetic), ("real", real))
    }
    subjects = tests.images.subjects()[tests.rows]
    section = Section("usefulness", notes=[_NOTE])
    _compare_classifiers(section, scores, tests.classes, subjects, names, seed)
    section.facts |= {
        "classes": list(names), "num_training_images": len(synthetic.rows),
        "num_test_images": len(tests.rows), "column": column,
        "real_training_images": "train_data" if use_train_data else "half of the labels",
    }  # fmt: skip
    return section


def class_column(predictions: ImageSet, labels: ImageSet) -> str | None:
    """The column of classes that both manifests have in every row: Label, else a condition."""
    others = [name for name in labels.rows[0].conditions if name not in _NOT_CLASSES]
    label_is_subject = all(row.label_name == row.subject for row in labels.rows)
    for column in others if label_is_subject else (LABEL, *others):
        cells = [{cell(row, column) for row in images.rows} for images in (predictions, labels)]
        if all("" not in names for names in cells) and 2 <= len(cells[1]) <= _MOST_CLASSES:
            return column
    return None


def _absent_classes(names: Sequence[str], column: str, images: ImageSet) -> list[str]:
    return sorted({*names} - {cell(row, column) for row in images.rows})


def _examples(images: ImageSet, column: str, names: Sequence[str]) -> _Examples:
    cells = [cell(row, column) for row in images.rows]
    rows = [place for place, name in enumerate(cells) if name in names]
    classes = [names.index(cells[row]) for row in rows]
    return _Examples(images, np.array(rows, np.int64), np.array(classes, np.int64))


def _real_examples(
    train_data: ImageSet | None, labels: ImageSet, column: str, names: Sequence[str], seed: int
) -> tuple[_Examples, _Examples]:
    """Real images to train on, and to test on."""
    held_out = _examples(labels, column, names)
    if train_data is not None:
        shared = overlap(labels, train_data)
        seen = [row in shared.images or labels.rows[row].subject in shared.subjects
                for row in held_out.rows]  # fmt: skip
        unseen = np.flatnonzero(~np.array(seen, np.bool_))
        return _examples(train_data, column, names), held_out.subset(unseen)
    subjects = [labels.rows[row].subject for row in held_out.rows]
    halves = split_subjects(subjects, held_out.classes.tolist(), {"test": 0.5}, seed)
    tested = np.array([halves[subject] == "test" for subject in subjects])
    return held_out.subset(np.flatnonzero(~tested)), held_out.subset(np.flatnonzero(tested))


def _equal_counts(
    synthetic: _Examples, real: _Examples, num_classes: int, seed: int
) -> tuple[_Examples, _Examples]:
    """As many images of each class on both sides, drawn at random."""
    chosen: list[list[Ints]] = [[], []]
    for number in range(num_classes):
        of_class = [np.flatnonzero(side.classes == number) for side in (synthetic, real)]
        count = min(*map(len, of_class), max(_FEWEST, _MOST // num_classes))
        for side, candidates in enumerate(of_class):
            rng = np.random.default_rng(environment.derived_seed(seed, "class", number, side))
            chosen[side].append(np.sort(rng.permutation(candidates)[:count]))
    return synthetic.subset(np.concatenate(chosen[0])), real.subset(np.concatenate(chosen[1]))


def _compare_classifiers(
    section: Section, scores: Mapping[str, Floats], truth: Ints, subjects: Ints,
    names: Sequence[str], seed: int,
) -> None:  # fmt: skip
    """Add to `section` the accuracy, recall and area under the curve of two classifiers.

    Args:
        scores: (N, classes) of the classifiers trained on "synthetic" and on "real" images.
        truth: (N,), class from 0.
        subjects: (N,), number of each image's subject.
        names: of the classes.
    """
    correct = {name: (values.argmax(axis=1) == truth) * 1.0 for name, values in scores.items()}
    recalls = {
        name: [float(hits[truth == i].mean()) for i in range(len(names))]
        for name, hits in correct.items()
    }
    measured = {
        "accuracy": {name: float(hits.mean()) for name, hits in correct.items()},
        "balanced_accuracy": {name: float(np.mean(values)) for name, values in recalls.items()},
        "auc": {name: _macro_auc(values, truth) for name, values in scores.items()},
    }
    guessing = {"accuracy": float(np.bincount(truth).max() / len(truth))}
    guessing |= {"balanced_accuracy": 1 / len(names), "auc": 0.5}
    for metric, values in measured.items():
        for name, value in values.items():
            low, high = None, None
            if metric == "accuracy":
                low, high = mean_interval(correct[name], subjects, seed) or (None, None)
            elif metric == "balanced_accuracy":
                low, high = _balanced_interval(correct[name], truth, subjects, seed)
            baseline = guessing[metric] if name == "real" else values["real"]
            section.measures[f"{metric}_{name}"] = Measure(value, baseline, low, high, len(truth))
    difference = correct["synthetic"] - correct["real"]
    low, high = mean_interval(difference, subjects, seed) or (None, None)
    measure = Measure(float(difference.mean()), None, low, high, len(truth))
    section.measures["accuracy_difference"] = measure
    if (real := float(np.mean(recalls["real"]))) >= TOO_EASY:
        for name in ("accuracy_synthetic", "accuracy_difference"):
            section.measures[name] = replace(section.measures[name], reason=_EASY.format(real))
        section.notes.insert(0, f"Warning: {_EASY.format(real)}.")
    _describe_recalls(section, recalls, names)


def _describe_recalls(
    section: Section, recalls: Mapping[str, list[float]], names: Sequence[str]
) -> None:
    section.facts["recall"] = {
        name: dict(zip(names, values, strict=True)) for name, values in recalls.items()
    }
    series = {f"trained on {name} images": values for name, values in recalls.items()}
    title = "Recall of each class"
    section.plots.append(Plot(title, "bars", series, "class", "recall", tuple(names)))
    if np.mean(recalls["real"]) < 1 / len(names) + BARELY:
        section.notes.append(
            "Trained on real images, this classifier is hardly better than guessing: the "
            "comparison says nothing about the synthetic ones."
        )


def _balanced_interval(
    correct: Floats, truth: Ints, subjects: Ints, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Interval of the mean recall, by a percentile bootstrap over subjects."""
    _, owner = np.unique(subjects, return_inverse=True)
    num_subjects, num_classes = int(owner.max()) + 1, int(truth.max()) + 1
    if num_subjects < 2:
        return None, None
    hits, counts = np.zeros((num_subjects, num_classes)), np.zeros((num_subjects, num_classes))
    np.add.at(hits, (owner, truth), correct)
    np.add.at(counts, (owner, truth), 1)
    rng = np.random.default_rng(environment.derived_seed(seed, "recall"))
    means = []
    for _ in range(_RESAMPLES):
        drawn = np.bincount(rng.integers(num_subjects, size=num_subjects), minlength=num_subjects)
        present = drawn @ counts
        means.append(((drawn @ hits)[present > 0] / present[present > 0]).mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _macro_auc(scores: Floats, truth: Ints) -> float:
    """Mean over the classes of the area of one class against the rest."""
    areas = [auc(scores[truth == i, i], scores[truth != i, i]) for i in range(scores.shape[1])]
    return float(np.mean(areas))


def _probabilities(training: _Examples, tests: _Examples, num_classes: int, seed: int) -> Floats:
    """(len(tests), num_classes): the probabilities that a small convolutional classifier, trained
    on `training`, gives `tests`; the same on every run.

    Both are scaled by the range of `tests`, so that predictions of another range teach what they
    would teach anyone. Every class weighs the same, however many images it has.
    """
    images, test = (_network_input(examples, tests.images) for examples in (training, tests))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(training.images.shape[0], training.images.rank, num_classes)
        _train(network, images, torch.from_numpy(training.classes), num_classes)
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(batch) for batch in test.split(256)])
    softmax: Floats = logits.double().softmax(dim=1).numpy()
    return softmax


def _network_input(examples: _Examples, scale: ImageSet) -> torch.Tensor:
    """(N, C, *small), the range of `scale` from -1 to 1."""
    images = examples.images
    sides = [min(side, _SIDE[images.rank]) for side in images.shape[1:]]
    pool = nn.AdaptiveAvgPool2d if images.rank == 2 else nn.AdaptiveAvgPool3d
    reduce = pool(tuple(sides))
    shape = (1, -1, *[1] * images.rank)
    low, high = (torch.tensor([pair[end] for pair in scale.bounds]).view(shape) for end in (0, 1))
    width = (high - low).clamp(min=1e-12)
    small = []
    for rows in images.portions(examples.rows.tolist(), 1 << 20):
        batch = torch.from_numpy(images.read(rows))
        small.append(reduce((batch - low) / width * 2 - 1))
    return torch.cat(small)


def _network(channels: int, rank: int, num_classes: int) -> nn.Sequential:
    convolution = nn.Conv2d if rank == 2 else nn.Conv3d
    pool = nn.AdaptiveAvgPool2d if rank == 2 else nn.AdaptiveAvgPool3d
    layers: list[nn.Module] = []
    for level, width in enumerate(_CHANNELS[rank]):
        stride = 2 if level else 1
        layers += [convolution(channels, width, 3, stride, 1), nn.GroupNorm(4, width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, pool(4), nn.Flatten(), nn.LazyLinear(num_classes))


def _train(
    network: nn.Sequential, images: torch.Tensor, truth: torch.Tensor, num_classes: int
) -> None:
    network(images[:1])  # the last layer learns its size
    counts = torch.bincount(truth, minlength=num_classes).clamp(min=1)
    weight = len(truth) / (num_classes * counts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    criterion = nn.CrossEntropyLoss(weight=weight)
    for _ in range(_STEPS):
        chosen = torch.randint(len(images), (min(_BATCH, len(images)),))
        optimizer.zero_grad()
        criterion(network(_shifted(images[chosen])), truth[chosen]).backward()
        optimizer.step()
        schedule.step()


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """All images moved by the same random few voxels; the border is repeated."""
    for axis in range(2, images.ndim):
        side = images.shape[axis]
        most = round(side * _SHIFT)
        shift = int(torch.randint(-most, most + 1, ()))
        places = (torch.arange(side) + shift).clamp(0, side - 1)
        images = images.index_select(axis, places)
    return images
