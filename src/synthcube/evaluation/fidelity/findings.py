"""How near predictions are to held-out real images, beside how near other real images are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.features.tables import Features
from synthcube.evaluation.fidelity import manifolds
from synthcube.evaluation.fidelity.distances import FEWEST, NAMES, Tables, distances
from synthcube.evaluation.fidelity.splits import Split, draw_splits, joint_subjects
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.neighbours import nearest
from synthcube.evaluation.results import Measure, Plot, Section, missing

Ints = npt.NDArray[np.int64]

_DRAWN = 1000  # images in a histogram


def fidelity(
    predictions: ImageSet, labels: ImageSet, features_p: Features, features_l: Features,
    config: EvaluationConfig, seed: int,
) -> Section:  # fmt: skip
    """Frechet and kernel distance, precision, recall, density and coverage in feature space.

    With m = min(predictions, half of the labels), m predictions are compared with m labels, and
    beside it (the floor) m other labels with the same; all numbers are means over
    `config.num_repeats` random splits of the labels by subject, and for volumes over three planes.

    Args:
        features_p: of the predictions.
        features_l: of the labels, by the same extractor.
        seed: of the splits.
    """
    section = Section("fidelity")
    subjects = joint_subjects(predictions, labels)
    too_few = _too_few(subjects, len(labels))
    splits = [] if too_few else draw_splits(subjects, config.num_repeats, seed)
    m = len(splits[0].half) if splits else 0
    if m < FEWEST:
        reason = too_few or _few_text(len(predictions), subjects[1], m)
        section.measures = dict.fromkeys(NAMES, missing(reason))
        section.notes.append(f"No distances: {reason}.")
        return section
    found = {
        plane: distances((features_p.planes[plane], table), subjects, splits, config.num_neighbours)
        for plane, table in features_l.planes.items()
    }
    _enter(section, found)
    section.facts = {
        "images_each_side": m, "splits": len(splits), "neighbours": config.num_neighbours,
    }  # fmt: skip
    section.notes += _notes(features_p, m)
    plane, table = next(iter(features_l.planes.items()))
    section.plots = [*_bars(section), _histogram((features_p.planes[plane], table), splits[0])]
    return section


def _too_few(subjects: tuple[Ints, Ints], labels: int) -> str:
    if len(np.unique(subjects[1])) < 2:
        return f"the {labels} labels are of one subject and cannot be split by subject"
    return ""


def _few_text(predictions: int, subjects: Ints, m: int) -> str:
    return (
        f"{predictions} predictions and {len(subjects)} labels of {len(np.unique(subjects))} "
        f"subjects leave {m} images on each side, at least {FEWEST} are needed: predictions, and "
        "labels in two halves of different subjects"
    )


def _enter(section: Section, found: dict[str, dict[str, Measure]]) -> None:
    """The mean over planes under the plain name; each plane behind it, where there are several."""
    for name in NAMES:
        section.measures[name] = _mean([each[name] for each in found.values()])
    if len(found) > 1:
        for plane, each in found.items():
            section.measures |= {f"{name}_{plane}": each[name] for name in NAMES}


def _mean(measures: list[Measure]) -> Measure:
    """Of planes; their intervals are averaged too, as planes of one volume are not independent."""
    if len(measures) == 1:
        return measures[0]
    reason = next((each.reason for each in measures if each.reason), None)
    if any(each.value is None for each in measures):
        return missing(str(reason))

    def mean(name: str) -> float | None:
        numbers = [getattr(each, name) for each in measures]
        return None if None in numbers else float(np.mean(numbers))

    return Measure(
        mean("value"), mean("floor"), mean("low"), mean("high"), measures[0].count, reason
    )


def _notes(features: Features, m: int) -> list[str]:
    told = [
        f"Read every number beside its floor: that is what {m} other real images come to against "
        "the same real images. Predictions as good as real ones reach it; being below a floor of a "
        "distance, or above that of precision or density, is no merit but a sign of too little "
        "variety or of copies.",
        "Low and high of the kernel distance are its 95% confidence interval; those of the others "
        "are where 95% of random splits lie, which tells less than a confidence interval.",
    ]
    if not features.extractor.comparable:
        told.append(
            f"Features are those of {features.extractor.name}, which no one else uses: these "
            "numbers compare with others only where SynthCube took them in the same way."
        )
    else:
        told.append(
            f"Distances are those of {features.extractor.name} at {m} images on each side; others "
            "compare only if extractor, number of images and preprocessing are the same."
        )
    return told


def _bars(section: Section) -> list[Plot]:
    measures = [section.measures[name] for name in manifolds.NAMES]
    values = [each.value for each in measures if each.value is not None]
    floors = [each.floor for each in measures if each.floor is not None]
    if len(values) != len(measures) or len(floors) != len(measures):
        return []
    return [
        Plot(
            "Precision, recall, density and coverage", "bars",
            {"predictions": values, "other real images": floors}, categories=manifolds.NAMES,
        )
    ]  # fmt: skip


def _histogram(tables: Tables, split: Split) -> Plot:
    made, real = tables
    half = np.array(real.rows()[real.rows_of(split.half[:_DRAWN])])
    series = {
        name: nearest(np.array(table.rows()[table.rows_of(images[:_DRAWN])]), half, 1)[0][:, 0]
        for name, table, images in (
            ("predictions", made, split.predictions), ("other real images", real, split.other),
        )
    }  # fmt: skip
    return Plot(
        "Distance to the nearest of the held-out real images", "histogram",
        {name: [float(each) for each in found] for name, found in series.items()},
        x_label="distance in feature space", y_label="images",
    )  # fmt: skip
