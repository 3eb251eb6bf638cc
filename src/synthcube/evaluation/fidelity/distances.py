"""The distances of one plane of features, over splits, each beside its floor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from synthcube.evaluation.features.tables import Table
from synthcube.evaluation.fidelity import manifolds
from synthcube.evaluation.fidelity.frechet import frechet_distance, normal
from synthcube.evaluation.fidelity.kernel import kernel_distances
from synthcube.evaluation.fidelity.splits import Split
from synthcube.evaluation.results import Measure, missing

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tables = tuple[Table, Table]

NAMES = ("frechet_distance", "kernel_distance", *manifolds.NAMES)
FEWEST = 10
"""Images on each side."""

_FEWEST_SUBJECTS = 3  # of which a jackknife leaves a pair
_MOST_BALLS = 2000  # rows on each side: the work grows with their square
_NORMAL = 1.959964  # 97.5th percentile of the standard normal
_UPPER = {"precision": 1.0, "recall": 1.0, "coverage": 1.0}


def distances(
    tables: Tables, subjects: tuple[Ints, Ints], splits: Sequence[Split], num_neighbours: int
) -> dict[str, Measure]:
    """Each of NAMES, as the mean over splits.

    Args:
        tables: of predictions and labels.
        subjects: of each image of both, numbered jointly.
    """
    return {
        "frechet_distance": _frechet(tables, splits),
        "kernel_distance": _kernel(tables, subjects, splits),
        **_manifolds(tables, subjects, splits, num_neighbours),
    }


def _frechet(tables: Tables, splits: Sequence[Split]) -> Measure:
    made, real = tables
    values, floors = [], []
    for split in splits:
        half = normal(real.rows(), real.rows_of(split.half))
        values.append(frechet_distance(normal(made.rows(), made.rows_of(split.predictions)), half))
        floors.append(frechet_distance(normal(real.rows(), real.rows_of(split.other)), half))
    m = len(splits[0].half)
    rows, dimension = m * real.slices, real.dimension
    reason = None
    if rows <= dimension:
        reason = (
            f"{rows} rows of {dimension} features are too few for a covariance, which needs more "
            f"than {dimension}: the distance is far too large; read it only beside its floor"
        )
    return _over_splits(values, floors, m, reason=reason)


def _kernel(tables: Tables, subjects: tuple[Ints, Ints], splits: Sequence[Split]) -> Measure:
    made, real = tables
    samples = (
        _members(made, [split.predictions for split in splits]),
        _members(real, [split.half for split in splits]),
        _members(real, [split.other for split in splits]),
    )
    fewest = min(
        len(np.unique(subjects[side][part]))
        for split in splits
        for side, part in ((0, split.predictions), (1, split.half), (1, split.other))
    )
    if fewest < _FEWEST_SUBJECTS:
        return missing(f"a sample is of {fewest} subjects, {_FEWEST_SUBJECTS} are needed")
    owned = (subjects[0][made.owners()], subjects[1][real.owners()])
    values, floors = kernel_distances(made.rows(), real.rows(), owned, samples)
    m = len(splits[0].half)
    value, floor = (float(np.mean([each.value for each in found])) for found in (values, floors))
    wide = _NORMAL * math.sqrt(float(np.mean([each.variance for each in values])))
    return Measure(value, floor, value - wide, value + wide, m)


def _members(table: Table, samples: Sequence[Ints]) -> npt.NDArray[np.bool_]:
    members = np.zeros((table.images * table.slices, len(samples)), np.bool_)
    for column, images in enumerate(samples):
        members[table.rows_of(images), column] = True
    return members


def _manifolds(
    tables: Tables, subjects: tuple[Ints, Ints], splits: Sequence[Split], k: int
) -> dict[str, Measure]:
    made, real = tables
    m = min(len(splits[0].half), max(FEWEST, _MOST_BALLS // real.slices))
    values, floors = [], []
    for split in splits:
        parts = [
            _balls(table, subjects[side], images, m, k)
            for table, side, images in (
                (real, 1, split.half), (made, 0, split.predictions), (real, 1, split.other),
            )
        ]  # fmt: skip
        if not all(np.isfinite(limits).all() for _, limits in parts):
            reason = f"not every one of {m} images has {k} neighbours of other subjects"
            return dict.fromkeys(manifolds.NAMES, missing(reason))
        (half, limit), *others = parts
        value, floor = (
            manifolds.precision_recall_density_coverage(half, each, limit, own, k)
            for each, own in others
        )
        values.append(value)
        floors.append(floor)
    return {
        name: _over_splits(
            [v[i] for v in values], [f[i] for f in floors], m, upper=_UPPER.get(name)
        )
        for i, name in enumerate(manifolds.NAMES)
    }


def _balls(table: Table, subjects: Ints, images: Ints, m: int, k: int) -> tuple[Array, Array]:
    """(m * s, D), of `m` of the images, and the radii."""
    few = images[np.linspace(0, len(images) - 1, m).round().astype(np.int64)]
    rows = table.rows_of(few)
    features: Array = np.array(table.rows()[rows])
    if k >= len(features):
        return features, np.full(len(features), np.inf, np.float32)
    return features, manifolds.radii(features, np.repeat(subjects[few], table.slices), k)


def _over_splits(
    values: Sequence[float], floors: Sequence[float], m: int, *,
    upper: float | None = None, reason: str | None = None,
) -> Measure:  # fmt: skip
    """Mean, and where 95% of splits lie if they are normally distributed."""
    value, wide = float(np.mean(values)), _NORMAL * float(np.std(values, ddof=1))
    high = value + wide if upper is None else min(upper, value + wide)
    return Measure(value, float(np.mean(floors)), max(0.0, value - wide), high, m, reason)
