"""Whether a classifier learns from predictions what it would have learned from real images.

Train on synthetic, test on real, beside train on real, test on real: Esteban et al., "Real-valued
(Medical) Time Series Generation" (2017); the classification accuracy score of Ravuri and Vinyals
(NeurIPS 2019).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from synthcube import runtime
from synthcube.data.manifest import Row
from synthcube.data.splitting import split_subjects
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.copies.overlap import overlap
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.results import Section
from synthcube.evaluation.usefulness.classification import judge
from synthcube.evaluation.usefulness.classifier import probabilities

Ints = npt.NDArray[np.int64]

_LABEL = "Label"
_OURS = ("Seed", "Source")
_MOST_CLASSES = 20
_FEWEST = 5
"""Images of each class that are needed to train, and to test."""
_MOST = 2000
"""Training images of each side, at most."""
_NOTES = (
    "The floor of what was trained on synthetic images is what as many real ones teach; that of "
    "real ones is guessing. The classifier is a small one: what matters is the difference.",
)


@dataclass(frozen=True, slots=True)
class _Side:
    """Images of one origin, with the number of each one's class."""

    images: ImageSet
    rows: Ints
    classes: Ints

    def taken(self, places: Ints) -> _Side:
        return _Side(self.images, self.rows[places], self.classes[places])


def usefulness(
    predictions: ImageSet,
    labels: ImageSet,
    train_data: ImageSet | None,
    config: EvaluationConfig,
    seed: int,
) -> Section | str:
    """A small classifier trained on predictions, and one on as many real images of the same
    classes, tested on the same held-out images.

    The classes are those of the column Label, else of another column that both manifests have.
    The real training images are `train_data`, without what the labels share with it; where there
    are none, half of the labels' subjects, and the other half tests.

    Returns:
        The section, or why there is none.
    """
    column = _column(predictions, labels)
    if column is None:
        return (
            f"predictions and labels share no column with 2 to {_MOST_CLASSES} classes in every "
            "row (Label, or a condition)"
        )
    names = sorted({_cell(row, column) for row in labels.rows})
    if absent := _absent(names, column, predictions, "predictions"):
        return absent
    real = train_data
    if train_data is not None and _absent(names, column, train_data, "train_data"):
        real = None
    made = _side(predictions, column, names)
    known, held_out = _real_sides(real, labels, column, names, seed)
    if reason := _too_few(names, made, known, held_out):
        return reason
    made, known = _alike(made, known, len(names), seed)
    section = _compared(made, known, held_out, names, seed)
    section.facts |= {
        "column": column,
        "real_training_images": "train_data" if real is not None else "half of the labels",
    }
    return section


def _compared(
    made: _Side, known: _Side, held_out: _Side, names: Sequence[str], seed: int
) -> Section:
    scores = {
        name: probabilities(
            side.images, side.rows, side.classes, held_out.images, held_out.rows, len(names),
            runtime.derived_seed(seed, "classifier"),
        )
        for name, side in (("synthetic", made), ("real", known))
    }  # fmt: skip
    owners = held_out.images.subjects()[held_out.rows]
    section = Section("usefulness", notes=list(_NOTES))
    judge(section, scores, held_out.classes, owners, names, seed)
    section.facts |= {
        "classes": list(names),
        "num_training_images": len(made.rows),
        "num_test_images": len(held_out.rows),
    }
    return section


def _cell(row: Row, column: str) -> str:
    return row.label_name if column == _LABEL else row.conditions.get(column, "")


def _column(predictions: ImageSet, labels: ImageSet) -> str | None:
    others = [name for name in labels.rows[0].conditions if name not in _OURS]
    patients = all(row.label_name == row.subject for row in labels.rows)
    for column in others if patients else (_LABEL, *others):
        found = [{_cell(row, column) for row in each.rows} for each in (predictions, labels)]
        if all("" not in each for each in found) and 2 <= len(found[1]) <= _MOST_CLASSES:
            return column
    return None


def _absent(names: Sequence[str], column: str, images: ImageSet, whose: str) -> str:
    gone = sorted({*names} - {_cell(row, column) for row in images.rows})
    if not gone:
        return ""
    return f"{whose} have no image of {', '.join(gone)} (column {column}), which the labels have"


def _side(images: ImageSet, column: str, names: Sequence[str]) -> _Side:
    cells = [_cell(row, column) for row in images.rows]
    rows = [place for place, cell in enumerate(cells) if cell in names]
    classes = [names.index(cells[row]) for row in rows]
    return _Side(images, np.array(rows, np.int64), np.array(classes, np.int64))


def _real_sides(
    train_data: ImageSet | None, labels: ImageSet, column: str, names: Sequence[str], seed: int
) -> tuple[_Side, _Side]:
    """To train on, and to test on."""
    held_out = _side(labels, column, names)
    if train_data is not None:
        shared = overlap(labels, train_data)
        known = {*shared.subjects}
        strange = [
            place
            for place, row in enumerate(held_out.rows)
            if row not in shared.images and labels.rows[row].subject not in known
        ]
        return _side(train_data, column, names), held_out.taken(np.array(strange, np.int64))
    subjects = [labels.rows[row].subject for row in held_out.rows]
    halves = split_subjects(subjects, held_out.classes.tolist(), {"test": 0.5}, seed)
    tested = np.array([halves[subject] == "test" for subject in subjects])
    return held_out.taken(np.flatnonzero(~tested)), held_out.taken(np.flatnonzero(tested))


def _too_few(names: Sequence[str], made: _Side, known: _Side, held_out: _Side) -> str:
    whose = {
        "predictions": made, "real images to train on": known, "real images to test on": held_out,
    }  # fmt: skip
    for told, side in whose.items():
        counts = Counter(side.classes.tolist())
        few = [f"{name}: {counts[i]}" for i, name in enumerate(names) if counts[i] < _FEWEST]
        if few:
            return f"at least {_FEWEST} {told} of each class are needed ({', '.join(few)})"
    return ""


def _alike(made: _Side, known: _Side, num_classes: int, seed: int) -> tuple[_Side, _Side]:
    """As many images of each class on both sides, drawn at random."""
    chosen: list[list[Ints]] = [[], []]
    for number in range(num_classes):
        places = [np.flatnonzero(side.classes == number) for side in (made, known)]
        count = min(*(len(each) for each in places), max(_FEWEST, _MOST // num_classes))
        for i, each in enumerate(places):
            rng = np.random.default_rng(runtime.derived_seed(seed, "class", number, i))
            chosen[i].append(np.sort(rng.permutation(each)[:count]))
    return made.taken(np.concatenate(chosen[0])), known.taken(np.concatenate(chosen[1]))
