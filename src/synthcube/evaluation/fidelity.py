"""How near predictions are to held-out real images, and how varied, beside other real images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from synthcube.environment import derived_seed
from synthcube.evaluation import fidelity_metrics as metrics
from synthcube.evaluation.arrays import Array, Floats, Ints
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.features import Features, FeatureTable, scaled
from synthcube.evaluation.fidelity_metrics import PRECISION_RECALL
from synthcube.evaluation.intervals import NORMAL_97_5
from synthcube.evaluation.neighbours import nearest
from synthcube.evaluation.results import BASELINE_NOTE, Measure, Plot, Section, missing
from synthcube.evaluation.sets import Bounds, ImageSet, subject_numbers
from synthcube.evaluation.similarity import WINDOW, num_scales, structural_similarity

Tables = tuple[FeatureTable, FeatureTable]  # of predictions and labels
Subjects = tuple[Ints, Ints]  # (N,) and (M,): numbers of subjects, the same in both sets

NAMES = ("frechet_distance", "kernel_distance", *PRECISION_RECALL)
FEWEST = 10  # images on each side

_FEWEST_SUBJECTS = 3  # of which a jackknife leaves a pair
_MOST_BALLS = 2000  # rows on each side: the work grows with their square
_IN_HISTOGRAM = 1000  # images
_UPPER = {"precision": 1.0, "recall": 1.0, "coverage": 1.0}

_MOST_PAIRS, _LEAST_PAIRS = 1000, 32
_PAIR_VOXELS = 1 << 24  # of all pairs together: pairs of volumes are fewer
_VOXELS_AT_ONCE = 1 << 18
_FEWEST_IN_PAIRS = 10  # subjects


class Split(NamedTuple):
    """Equal samples of m images: of predictions, and of labels in halves of different subjects."""

    predictions: Ints  # (m,), of no subject that is in `half`
    half: Ints  # (m,), labels that both others are compared with
    other: Ints  # (m,), labels of other subjects, for the baseline


_SIDES = (0, 1, 1)  # whose images the parts of a split are: 0 of predictions, 1 of labels


def fidelity(
    predictions: ImageSet, labels: ImageSet, features_p: Features, features_l: Features,
    config: EvaluationConfig, seed: int,
) -> Section:  # fmt: skip
    """Frechet and kernel distance, precision, recall, density and coverage in feature space.

    With m = min(predictions, half of the labels), m predictions are compared with m labels; for the
    baseline, m other labels are compared with the same m. All numbers are means over
    `config.num_repeats` random splits of the labels by subject, and for volumes over three planes.

    Args:
        features_p, features_l: of the predictions and of the labels, by the same extractor.
    """
    section = Section("fidelity")
    of_p, of_l = subject_numbers(predictions, labels)
    num_subjects = len(np.unique(of_l))
    splits = draw_splits((of_p, of_l), config.num_repeats, seed) if num_subjects > 1 else []
    m = len(splits[0].half) if splits else 0
    if m < FEWEST:
        reason = (
            f"{len(predictions)} predictions and {len(labels)} labels of {num_subjects} subjects "
            f"leave {m} images on each side, at least {FEWEST} are needed: predictions, and labels "
            "in two halves of different subjects"
        )
        if num_subjects < 2:
            reason = f"the {len(labels)} labels are of one subject and cannot be split by subject"
        section.measures = dict.fromkeys(NAMES, missing(reason))
        section.notes.append(f"No distances: {reason}.")
        return section
    by_plane = distances(features_p, features_l, (of_p, of_l), splits, config.num_neighbours)
    section.measures |= mean_over_planes(by_plane)
    if len(by_plane) > 1:
        for plane, measures in by_plane.items():
            section.measures |= {f"{name}_{plane}": measures[name] for name in NAMES}
    if features_l.channels > 1:
        section.measures |= _by_channel(features_p, features_l, (of_p, of_l), splits)
    section.facts = {
        "images_each_side": m, "splits": len(splits), "neighbours": config.num_neighbours,
    }  # fmt: skip
    section.notes += _notes(features_p, m)
    plane, table = next(iter(features_l.planes.items()))
    section.plots = [*_bars(section), _histogram((features_p.planes[plane], table), splits[0])]
    return section


def distances(
    features_p: Features, features_l: Features, subjects: Subjects, splits: Sequence[Split], k: int
) -> dict[str, dict[str, Measure]]:
    """Every measure of NAMES by plane, means over the splits.

    Args:
        subjects: of the predictions and of the labels, all of them.
        k: neighbours of precision, recall, density and coverage.
    """
    by_plane: dict[str, dict[str, Measure]] = {}
    for plane, table in features_l.planes.items():
        tables = features_p.planes[plane], table
        by_plane[plane] = {
            "frechet_distance": _frechet(tables, splits),
            "kernel_distance": _kernel(tables, subjects, splits),
            **_precision_recall(tables, subjects, splits, k),
        }
    return by_plane


def _by_channel(
    features_p: Features, features_l: Features, subjects: Subjects, splits: Sequence[Split]
) -> dict[str, Measure]:
    """The distances of each channel alone: one that is poor does not hide behind the others."""
    measures = {}
    for channel in range(features_l.channels):
        ours, theirs = features_p.of_channel(channel), features_l.of_channel(channel)
        pairs = [(ours.planes[plane], theirs.planes[plane]) for plane in theirs.planes]
        measures[f"frechet_distance_channel_{channel}"] = _mean(
            [_frechet(tables, splits) for tables in pairs]
        )
        measures[f"kernel_distance_channel_{channel}"] = _mean(
            [_kernel(tables, subjects, splits) for tables in pairs]
        )
    return measures


def mean_over_planes(by_plane: Mapping[str, Mapping[str, Measure]]) -> dict[str, Measure]:
    """Every measure of NAMES, the mean of its planes."""
    return {name: _mean([measures[name] for measures in by_plane.values()]) for name in NAMES}


def draw_splits(subjects: Subjects, number: int, seed: int) -> list[Split]:
    """`number` random splits, all of the same m: as many as the smallest of them allows.

    A prediction that was made from a subject (a translation) is nearer to that subject's images
    than another real image could be, so it is never compared with a half that has the subject.
    """
    rng = np.random.default_rng(derived_seed(seed, "fidelity", "splits"))
    candidates = []
    for _ in range(number):
        half, other = _halves(subjects[1], rng)
        allowed = np.flatnonzero(~np.isin(subjects[0], subjects[1][half]))
        candidates.append((allowed, half, other))
    m = min(len(images) for parts in candidates for images in parts)
    return [
        Split(*(np.sort(rng.choice(images, m, replace=False)) for images in parts))
        for parts in candidates
    ]


def _halves(subjects: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Places of two halves: subjects at random, but the larger ones first, each to the side that
    has fewer images."""
    names, of_image = np.unique(subjects, return_inverse=True)
    sizes = np.bincount(of_image)
    order = rng.permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    side = np.zeros(len(names), np.int64)
    counts = [0, 0]
    for subject in order:
        fewer = int(rng.integers(2)) if counts[0] == counts[1] else int(counts[1] < counts[0])
        side[subject] = fewer
        counts[fewer] += int(sizes[subject])
    return np.flatnonzero(side[of_image] == 0), np.flatnonzero(side[of_image] == 1)


def _frechet(tables: Tables, splits: Sequence[Split]) -> Measure:
    scores = []
    for split in splits:
        sample, half, other = (
            metrics.fit_normal(tables[side].rows(), tables[side].rows_of(images))
            for side, images in zip(_SIDES, split, strict=True)
        )
        scores.append([metrics.frechet_distance(fit, half) for fit in (sample, other)])
    m = len(splits[0].half)
    rows, dimension = m * tables[1].slices, tables[1].dimension
    reason = None
    if rows <= dimension:
        reason = (
            f"{rows} rows of {dimension} features are too few for a covariance, which needs more "
            f"than {dimension}: the distance is far too large; read it only beside its baseline"
        )
    return _over_splits(np.array(scores), m, reason=reason)


def _kernel(tables: Tables, subjects: Subjects, splits: Sequence[Split]) -> Measure:
    fewest = min(
        len(np.unique(subjects[side][images]))
        for split in splits
        for side, images in zip(_SIDES, split, strict=True)
    )
    if fewest < _FEWEST_SUBJECTS:
        return missing(f"a sample is of {fewest} subjects, {_FEWEST_SUBJECTS} are needed")
    chosen, half, other = (
        np.zeros((len(tables[side].rows()), len(splits)), np.bool_) for side in _SIDES
    )
    for column, split in enumerate(splits):
        for members, side, images in zip((chosen, half, other), _SIDES, split, strict=True):
            members[tables[side].rows_of(images), column] = True
    row_subjects = (subjects[0][tables[0].owners()], subjects[1][tables[1].owners()])
    rows = tables[0].rows(), tables[1].rows()
    estimates = metrics.kernel_distances(*rows, row_subjects, (chosen, half, other))
    value, baseline = (float(np.mean([kid.value for kid in side])) for side in estimates)
    wide = NORMAL_97_5 * math.sqrt(float(np.mean([kid.variance for kid in estimates[0]])))
    return Measure(value, baseline, value - wide, value + wide, len(splits[0].half))


def _precision_recall(
    tables: Tables, subjects: Subjects, splits: Sequence[Split], k: int
) -> dict[str, Measure]:
    m = min(len(splits[0].half), max(FEWEST, _MOST_BALLS // tables[1].slices))
    scores = []
    for split in splits:
        (sample, sample_radii), (half, half_radii), (other, other_radii) = (
            _balls(tables[side], subjects[side], images, m, k)
            for side, images in zip(_SIDES, split, strict=True)
        )
        limits = sample_radii, half_radii, other_radii
        if not all(np.isfinite(radii).all() for radii in limits):
            reason = f"not every one of {m} images has {k} neighbours of other subjects"
            return dict.fromkeys(PRECISION_RECALL, missing(reason))
        scores.append([
            metrics.precision_recall_density_coverage(half, points, half_radii, radii, k)
            for points, radii in ((sample, sample_radii), (other, other_radii))
        ])  # fmt: skip
    by_name = np.moveaxis(np.array(scores), -1, 0)
    return {
        name: _over_splits(values, m, upper=_UPPER.get(name))
        for name, values in zip(PRECISION_RECALL, by_name, strict=True)
    }


def _balls(
    table: FeatureTable, subjects: Ints, images: Ints, m: int, k: int
) -> tuple[Array, Array]:
    """(m * s, D), of `m` of the images, and the radii."""
    some = images[np.linspace(0, len(images) - 1, m).round().astype(np.int64)]
    features: Array = np.array(table.rows()[table.rows_of(some)])
    if k >= len(features):
        return features, np.full(len(features), np.inf, np.float32)
    return features, metrics.radii(features, np.repeat(subjects[some], table.slices), k)


def _over_splits(
    scores: Floats, m: int, *, upper: float | None = None, reason: str | None = None
) -> Measure:
    """Mean of (R, 2), values and baselines, and the range of 95% of splits if they are normally
    distributed."""
    values, baselines = scores.T
    value, wide = float(np.mean(values)), NORMAL_97_5 * float(np.std(values, ddof=1))
    high = value + wide if upper is None else min(upper, value + wide)
    return Measure(value, float(np.mean(baselines)), max(0.0, value - wide), high, m, reason)


def _mean(measures: list[Measure]) -> Measure:
    """Mean over planes; intervals are averaged too, as planes of a volume are not independent."""
    if len(measures) == 1:
        return measures[0]
    reason = next((measure.reason for measure in measures if measure.reason), None)
    if any(measure.value is None for measure in measures):
        return missing(str(reason))
    means: dict[str, float | None] = {}
    for name in ("value", "real_baseline", "low", "high"):
        numbers = [getattr(measure, name) for measure in measures]
        means[name] = None if None in numbers else float(np.mean(numbers))
    return Measure(**means, count=measures[0].count, reason=reason)


def _notes(features: Features, m: int) -> list[str]:
    name = features.extractor.name
    extractor_note = (
        f"Distances are those of {name} at {m} images on each side; others compare only if "
        "extractor, number of images and preprocessing are the same."
    )
    if not features.extractor.comparable:
        extractor_note = (
            f"Features are those of {name}, which nobody else uses: these numbers compare with "
            "others only where SynthCube computed them in the same way."
        )
    return [
        f"{BASELINE_NOTE} is what {m} other real images reach against the same real images: for "
        "distances the least that good images reach, for precision, recall, density and coverage "
        "a ceiling. A distance below it, or a precision or density above it, is no merit but a "
        "sign of too little variety or of copies.",
        "Low and high of the kernel distance are its 95% confidence interval; those of the others "
        "are where 95% of random splits lie, which tells less than a confidence interval.",
        extractor_note,
    ]


def _bars(section: Section) -> list[Plot]:
    measures = [section.measures[name] for name in PRECISION_RECALL]
    if any(measure.value is None for measure in measures):
        return []
    series = {
        name: [float(getattr(measure, field)) for measure in measures]
        for name, field in (("predictions", "value"), ("other real images", "real_baseline"))
    }
    title = "Precision, recall, density and coverage"
    return [Plot(title, "bars", series, categories=PRECISION_RECALL)]


def _histogram(tables: Tables, split: Split) -> Plot:
    sample, half, other = (
        np.array(tables[side].rows()[tables[side].rows_of(images[:_IN_HISTOGRAM])])
        for side, images in zip(_SIDES, split, strict=True)
    )
    series = {
        name: nearest(features, half, 1)[0][:, 0].astype(float).tolist()
        for name, features in (("predictions", sample), ("other real images", other))
    }
    title = "Distance to the nearest of the held-out real images"
    return Plot(title, "histogram", series, "distance in feature space", "images")


def diversity(predictions: ImageSet, labels: ImageSet, seed: int) -> Section:
    """MS-SSIM of random pairs of predictions; the baseline is that of pairs of labels.

    Odena et al., "Conditional Image Synthesis with Auxiliary Classifier GANs" (ICML 2017). The
    images of a pair are of two subjects, and every image is in one pair at most; intensities are
    scaled by the bounds of the labels. Small images have fewer than the five scales of MS-SSIM.
    """
    section = Section("diversity")
    size = labels.shape[1:]
    scales = num_scales(size)
    pairs = [
        _pairs(images.subjects(), derived_seed(seed, "diversity", images.name))
        for images in (predictions, labels)
    ]
    most = max(_LEAST_PAIRS, min(_MOST_PAIRS, _PAIR_VOXELS // int(np.prod(size))))
    number = min(most, *map(len, pairs))
    if not scales or number < _FEWEST_IN_PAIRS // 2:
        section.measures["ms_ssim"] = missing(
            f"{number} pairs of different subjects; {_FEWEST_IN_PAIRS // 2} are needed in both sets"
            if scales
            else f"an axis of {min(size)} voxels; {WINDOW} are needed for its window"
        )
        return section
    values, real_values = (
        _pair_similarity(images, chosen[:number], labels.bounds, scales)
        for images, chosen in zip((predictions, labels), pairs, strict=True)
    )
    value, baseline = float(values.mean()), float(real_values.mean())
    wide = NORMAL_97_5 * float(values.std(ddof=1)) / number**0.5
    section.measures["ms_ssim"] = Measure(
        value, baseline, max(0.0, value - wide), min(1.0, value + wide), number
    )
    section.facts["scales"] = scales
    section.notes.append(
        "MS-SSIM of two random images, 1 for identical ones: well above its baseline, predictions "
        "are more alike than real images are (mode collapse); well below, they vary in ways real "
        f"ones do not, such as noise. It was computed at {scales} of its 5 scales."
    )
    series = {"predictions": values.tolist(), "real images": real_values.tolist()}
    title = "MS-SSIM of random pairs"
    section.plots.append(Plot(title, "histogram", series, "MS-SSIM", "pairs"))
    return section


def _pairs(subjects: Ints, seed: int) -> Ints:
    """(P, 2): images of different subjects, each in one pair at most."""
    order = np.random.default_rng(seed).permutation(len(subjects))
    pairs = order[: len(order) // 2 * 2].reshape(-1, 2)
    apart: Ints = pairs[subjects[pairs[:, 0]] != subjects[pairs[:, 1]]]
    return apart


def _pair_similarity(images: ImageSet, pairs: Ints, bounds: Bounds, scales: int) -> Floats:
    values = []
    for batch in images.portions(pairs.tolist(), _VOXELS_AT_ONCE):
        first, second = (
            scaled(images.read(rows), bounds).astype(np.float64)
            for rows in zip(*batch, strict=True)
        )
        values.append(structural_similarity(first, second, scales)[1])
    return np.concatenate(values)
