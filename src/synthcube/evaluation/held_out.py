"""Images that a model was trained on are found among those that should judge it, and left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from synthcube.data.manifest import Manifest, Row
from synthcube.errors import EvaluationError, ManifestError
from synthcube.evaluation.pairs import match_pairs

_NUMBERED = re.compile(r"row-\d+")  # what a row without SubjectID is called: no person


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """The files and the subjects that a model was trained on."""

    files: frozenset[Path] = frozenset()  # resolved
    subjects: frozenset[str] = frozenset()

    def __or__(self, other: TrainingImages) -> TrainingImages:
        return TrainingImages(self.files | other.files, self.subjects | other.subjects)


def of_split(rows: Iterable[Mapping[str, str]]) -> TrainingImages:
    """The train rows of a split.csv, whose files need not be there any more."""
    files: dict[bool, set[Path]] = {True: set(), False: set()}
    subjects = set()
    for row in rows:
        is_train = row["Split"] == "train"
        names = (cell for column, cell in row.items() if column.startswith("Channel_") and cell)
        files[is_train].update(Path(name).resolve() for name in names)
        if is_train and not _NUMBERED.fullmatch(row["SubjectID"]):
            subjects.add(row["SubjectID"])
    # A file that held-out images have too, such as an atlas, shows nothing.
    return TrainingImages(frozenset(files[True] - files[False]), frozenset(subjects))


def of_manifest(manifest: Manifest) -> TrainingImages:
    """All rows of a list of training images."""
    named = manifest.rows if manifest.has_subjects else ()
    subjects = frozenset(row.subject for row in named if not _NUMBERED.fullmatch(row.subject))
    return TrainingImages(frozenset().union(*map(_files, manifest.rows)), subjects)


def leave_out_trained(
    manifests: Mapping[str, Manifest], training: TrainingImages, pairs: bool | None
) -> tuple[dict[str, Manifest], str]:
    """The manifests without labels and predictions that come from training images.

    A label does if one of its files was trained on, or its subject was; a prediction if it was
    made from such a file or subject, or if its label is left out.

    Args:
        manifests: "labels" and "predictions", and others, which stay as they are.
        pairs: whether predictions belong to labels; see :func:`match_pairs`.

    Returns:
        The manifests, and a sentence on what was left out, which names nobody; empty if nothing
        was.

    Raises:
        EvaluationError: no labels or no predictions would remain.
    """
    labels, predictions = manifests["labels"], manifests["predictions"]
    subjects = training.subjects if labels.has_subjects else frozenset()
    by_file = {i for i, row in enumerate(labels.rows) if _files(row) & training.files}
    by_subject = {i for i, row in enumerate(labels.rows) if row.subject in subjects}
    trained = by_file | by_subject
    files = training.files.union(*(_files(labels.rows[i]) for i in trained))
    made_of = {i for i, row in enumerate(predictions.rows) if _is_from(row, files, subjects)}
    if trained and not made_of:
        made_of = _partners(predictions, labels, trained, pairs)
    counts = [
        f"{len(places)} of the {len(manifests[name].rows)} {name}"
        for name, places in (("labels", trained), ("predictions", made_of))
        if places
    ]
    if not counts:
        return dict(manifests), ""
    reason = "the model was trained on these images or on others of the same subjects"
    if trained:
        reason += f" (labels by their file: {len(by_file)}, by their SubjectID: {len(by_subject)})"
    if len(trained) == len(labels.rows) or len(made_of) == len(predictions.rows):
        raise EvaluationError(
            f"Nothing is left to evaluate: {' and '.join(counts)} must be left out, because "
            f"{reason}. Give images that it has not seen: the folder of a run as --labels, and as "
            "--data_path of synthcube infer, means those that the run held out."
        )
    remaining = {
        "labels": _without(labels, trained), "predictions": _without(predictions, made_of)
    }  # fmt: skip
    return {**manifests, **remaining}, f"{' and '.join(counts)} were left out, because {reason}."


def _files(row: Row) -> frozenset[Path]:
    return frozenset(path.resolve() for path in row.channels)


def _is_from(row: Row, files: frozenset[Path], subjects: frozenset[str]) -> bool:
    source = row.conditions.get("Source")
    return bool(source) and (Path(source or "").resolve() in files or row.subject in subjects)


def _partners(
    predictions: Manifest, labels: Manifest, trained: set[int], pairs: bool | None
) -> set[int]:
    """Places of the predictions that belong to those labels, where all belong to one."""
    try:
        matched = match_pairs(predictions, labels, pairs)
    except ManifestError:
        return set()  # they may match what remains
    return {prediction for prediction, label in matched or () if label in trained}


def _without(manifest: Manifest, places: set[int]) -> Manifest:
    rows = (row for place, row in enumerate(manifest.rows) if place not in places)
    return replace(manifest, rows=tuple(rows))
