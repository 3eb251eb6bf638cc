"""Which prediction belongs to which label."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

from synthcube.data.manifest import Row, capped, image_suffix
from synthcube.errors import ManifestError
from synthcube.evaluation.images import ImageSet

Pairs = list[tuple[int, int]]
Keys = list[list[str]]
"""For each image the names that it may be found by, none or several."""


def paired(predictions: ImageSet, labels: ImageSet, wanted: bool | None) -> Pairs | None:
    """Places of prediction and label, in the order of the predictions; None where not paired.

    One way to tell is used for all of them, the first by which every prediction has a label and
    every label a prediction: the file that a prediction was made from (column Source of what
    `synthcube infer` writes), SubjectID, name of that file, name of the prediction's file.

    Args:
        wanted: False: never. True: they must belong together. None: predictions that say what
            file they were made from must; others are paired where all of them match, except
            images out of noise, whose running numbers mean nothing.

    Raises:
        ManifestError: they should belong together, and some do not; all are named.
    """
    if wanted is False:
        return None
    made_from = all("Source" in row.conditions for row in predictions.rows)
    made_of_noise = not made_from and any("Seed" in row.conditions for row in predictions.rows)
    if made_of_noise and not wanted:
        return None
    attempts = [_Attempt(name, *keys(predictions, labels)) for name, keys in _WAYS]
    for attempt in attempts:
        if attempt.complete:
            return attempt.pairs
    if not wanted and not made_from:
        return None
    best = max(attempts, key=lambda each: len(each.pairs))
    raise ManifestError(
        f"{len(predictions)} predictions and {len(labels)} labels do not belong together one by "
        f"one (evaluation.pairs: false compares them as two sets); by {best.name}:",
        capped(best.faults(predictions, labels)),
    )


class _Attempt:
    """What comes of one way to tell."""

    def __init__(self, name: str, predicted: Keys, labelled: Keys) -> None:
        self.name = name
        owners: dict[str, list[int]] = {}
        self._makers: dict[str, list[int]] = {}
        for place, keys in enumerate(labelled):
            for key in set(keys):
                owners.setdefault(key, []).append(place)
        for place, keys in enumerate(predicted):
            for key in keys:
                self._makers.setdefault(key, []).append(place)
        # A prediction has one key at most, and shares the list of it: of a thousand predictions
        # and labels of one subject there would be a million places.
        self._found = [owners.get(keys[0], []) if keys else [] for keys in predicted]
        self._keys = [sorted(set(keys)) for keys in labelled]
        self._taken = [sum(len(self._makers.get(key, ())) for key in keys) for keys in self._keys]
        self.pairs = [
            (i, places[0])
            for i, places in enumerate(self._found)
            if len(places) == 1 and self._taken[places[0]] == 1
        ]
        self.complete = len(self.pairs) == len(predicted) == len(labelled)

    def faults(self, predictions: ImageSet, labels: ImageSet) -> list[str]:
        told = []
        for row, places in zip(predictions.rows, self._found, strict=True):
            if not places:
                told.append(f"prediction {row.channels[0]} has no label")
            elif len(places) > 1:
                named = ", ".join(str(labels.rows[place].channels[0]) for place in places[:3])
                told.append(f"prediction {row.channels[0]} fits {len(places)} labels: {named}")
        for row, keys, taken in zip(labels.rows, self._keys, self._taken, strict=True):
            if not taken:
                told.append(f"label {row.channels[0]} has no prediction")
            elif taken > 1:
                several = chain.from_iterable(self._makers.get(key, ()) for key in keys)
                named = ", ".join(
                    str(predictions.rows[place].channels[0]) for place in islice(several, 3)
                )
                told.append(f"label {row.channels[0]} fits {taken} predictions: {named}")
        return told


def has_subjects(images: ImageSet) -> bool:
    """Whether the manifest says whose images they are: no folder, and not numbered by row."""
    if images.manifest.path.is_dir():
        return False
    return any(row.subject != f"row-{row.number}" for row in images.rows)


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(image_suffix(path))]


def _sources(row: Row) -> list[str]:
    return [row.conditions["Source"]] if row.conditions.get("Source") else []


def _by_path(predictions: ImageSet, labels: ImageSet) -> tuple[Keys, Keys]:
    return (
        [_sources(row) for row in predictions.rows],
        [[str(path) for path in row.channels] for row in labels.rows],
    )


def _by_subject(predictions: ImageSet, labels: ImageSet) -> tuple[Keys, Keys]:
    # numbers of rows would pair two files that are sorted differently
    if not has_subjects(labels):
        return [[] for _ in predictions.rows], [[] for _ in labels.rows]
    return [[row.subject] for row in predictions.rows], [[row.subject] for row in labels.rows]


def _by_source_name(predictions: ImageSet, labels: ImageSet) -> tuple[Keys, Keys]:
    made_from = [[_stem(Path(each)) for each in _sources(row)] for row in predictions.rows]
    return made_from, [[*{_stem(path) for path in row.channels}] for row in labels.rows]


def _by_name(predictions: ImageSet, labels: ImageSet) -> tuple[Keys, Keys]:
    # what is made from a file is named after its row; any other likeness would be by chance
    from_files = any(_sources(row) for row in predictions.rows)
    return [[_stem(row.channels[0])] for row in predictions.rows], [
        [row.name] if from_files else [*{_stem(path) for path in row.channels}]
        for row in labels.rows
    ]


_WAYS: tuple[tuple[str, Callable[[ImageSet, ImageSet], tuple[Keys, Keys]]], ...] = (
    ("the file they were made from (Source)", _by_path),
    ("SubjectID", _by_subject),
    ("the name of the file they were made from", _by_source_name),
    ("the name of their file", _by_name),
)
