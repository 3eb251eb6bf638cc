"""How near the predictions of each class are to held-out real images of the same class."""

from __future__ import annotations

import numpy as np

from synthcube.data.conditions import cell
from synthcube.environment import derived_seed
from synthcube.evaluation.arrays import Ints
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.features import Features
from synthcube.evaluation.fidelity import (
    FEWEST,
    Split,
    Subjects,
    distances,
    draw_splits,
    mean_over_planes,
)
from synthcube.evaluation.results import BASELINE_NOTE, Measure, Plot, Section, missing
from synthcube.evaluation.sets import ImageSet, subject_numbers

MEASURES = ("kernel_distance", "precision", "coverage")
"""Of each class; those that need the fewest images."""


def class_fidelity(
    predictions: ImageSet, labels: ImageSet, features: tuple[Features, Features], column: str,
    config: EvaluationConfig, seed: int,
) -> Section:  # fmt: skip
    """Kernel distance, precision and coverage of each class, beside other real images of it.

    A class needs FEWEST predictions, and twice as many labels, of two subjects at least; a class
    with fewer has the reason instead of numbers.

    Args:
        features: of the predictions and of the labels, by the same extractor.
        column: of the classes, in both manifests.
    """
    section = Section("fidelity_by_class", facts={"column": column})
    of_p, of_l = subject_numbers(predictions, labels)
    classes = [np.array([cell(row, column) for row in side.rows]) for side in (predictions, labels)]
    for name in sorted(set(classes[1].tolist())):
        places = np.flatnonzero(classes[0] == name), np.flatnonzero(classes[1] == name)
        splits = _splits((of_p, of_l), places, config.num_repeats, derived_seed(seed, name))
        measures = dict.fromkeys(MEASURES, missing(_too_few(name, places)))
        if splits:
            by_plane = distances(*features, (of_p, of_l), splits, config.num_neighbours)
            measures = {measure: mean_over_planes(by_plane)[measure] for measure in MEASURES}
        section.measures |= {f"{measure}_{name}": measures[measure] for measure in MEASURES}
    section.plots = _plots(section)
    section.notes = [
        f"{BASELINE_NOTE} is that of other real images of the same class: the least of a distance, "
        "a ceiling of precision and coverage. Few images make it uncertain.",
        f"A class needs at least {FEWEST} predictions and {2 * FEWEST} held-out real images.",
    ]
    return section


def _splits(subjects: Subjects, places: tuple[Ints, Ints], number: int, seed: int) -> list[Split]:
    """Splits of the images at `places` alone; none where they are too few."""
    of_p, of_l = (side[chosen] for side, chosen in zip(subjects, places, strict=True))
    if min(len(of_p), len(of_l) // 2) < FEWEST or len(np.unique(of_l)) < 2:
        return []
    splits = draw_splits((of_p, of_l), number, seed)
    if len(splits[0].half) < FEWEST:
        return []
    return [
        Split(places[0][split.predictions], places[1][split.half], places[1][split.other])
        for split in splits
    ]


def _too_few(name: str, places: tuple[Ints, Ints]) -> str:
    return (
        f"{len(places[0])} predictions and {len(places[1])} labels of {name}: at least {FEWEST} "
        f"predictions and {2 * FEWEST} labels are needed, in two halves of different subjects"
    )


def _plots(section: Section) -> list[Plot]:
    """Coverage of each class that has one, beside its baseline."""
    covered: dict[str, Measure] = {
        name.removeprefix("coverage_"): measure
        for name, measure in section.measures.items()
        if name.startswith("coverage_") and measure.value is not None
    }
    if not covered:
        return []
    series = {
        title: [float(getattr(measure, field)) for measure in covered.values()]
        for title, field in (("generated images", "value"), ("other real images", "real_baseline"))
    }
    title = "Coverage of each class"
    return [Plot(title, "bars", series, "class", "coverage", tuple(covered))]
