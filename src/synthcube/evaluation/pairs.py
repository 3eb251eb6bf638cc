"""Predictions against the very images they should be: translation and reconstruction."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from synthcube import environment
from synthcube.data.manifest import Manifest, Row, image_suffix
from synthcube.errors import ManifestError, first_faults
from synthcube.evaluation import similarity
from synthcube.evaluation.arrays import Floats, Ints
from synthcube.evaluation.intervals import mean_measure
from synthcube.evaluation.results import Cell, Measure, Picture, Plot, Section, missing, upright
from synthcube.evaluation.sets import ImageSet

Ranges = list[tuple[float, float]]
Listed = ImageSet | Manifest
Pairs = list[tuple[int, int]]  # places of prediction and label

_VOXELS_AT_ONCE = 1 << 21
_UNRELATED = 200  # pairs behind the baseline
_SHOWN = 2  # best, median and worst cases each
_TITLES = {
    "psnr_db": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "mae": "MAE",
    "ncc": "Correlation (NCC)",
}  # fmt: skip


def match_pairs(predictions: Listed, labels: Listed, required: bool | None) -> Pairs | None:
    """Places of prediction and label, in the order of the predictions; None where not paired.

    One of two rules is used for all of them, the first by which every prediction has a label and
    every label a prediction: the file that a prediction was made from (column Source of what
    `synthcube infer` writes), or SubjectID, which the file's name replaces where there is none.

    Args:
        required: False: never pair. True: they must match. None: predictions with a Source must
            match; others are paired where all of them match, except images from noise, whose
            running numbers mean nothing.
    """
    if required is False:
        return None
    have_source = all("Source" in row.conditions for row in predictions.rows)
    from_noise = not have_source and any("Seed" in row.conditions for row in predictions.rows)
    if from_noise and not required:
        return None
    by_source = _Matching(
        "the file they were made from (Source)",
        [_source(row) for row in predictions.rows],
        [[_of_slice(str(path), row.slice) for path in row.channels] for row in labels.rows],
    )
    by_name = _match_names(predictions, labels)
    for matching in (by_source, by_name):
        if matching.complete:
            return matching.pairs
    if not required and not have_source:
        return None
    best = max(by_source, by_name, key=lambda matching: len(matching.pairs))
    raise ManifestError(
        f"{len(predictions.rows)} predictions and {len(labels.rows)} labels do not match one by "
        f"one (evaluation.pairs: false compares them as two sets); by {best.name}:",
        first_faults(best.faults(predictions, labels)),
    )


def _source(row: Row) -> str | None:
    """The file, and the slice of it, that a prediction was made from."""
    source = row.conditions.get("Source")
    return _of_slice(source, row.conditions.get("Slice") or None) if source else None


def _of_slice(path: str, number: int | str | None) -> str:
    return path if number is None else f"{path}, slice {number}"


def _match_names(predictions: Listed, labels: Listed) -> _Matching:
    """Pairs of one SubjectID, where the labels have one each and predictions use them; else pairs
    of one file name: that of the file that a prediction was made from, if it was made from one."""
    subjects = {row.subject for row in labels.rows}
    if labels.has_subjects and len(subjects) == len(labels.rows):
        keys = [row.subject for row in predictions.rows]
        if any(key in subjects for key in keys):
            return _Matching("SubjectID", keys, [[row.subject] for row in labels.rows])

    def stem(path: Path) -> str:
        return path.name[: len(path.name) - len(image_suffix(path))]

    files = [Path(row.conditions.get("Source") or row.channels[0]) for row in predictions.rows]
    label_stems = [[*{stem(path) for path in row.channels}] for row in labels.rows]
    return _Matching("file name", [stem(path) for path in files], label_stems)


class _Matching:
    """Predictions and labels matched by one rule; a prediction has one key, or None."""

    def __init__(
        self, name: str, prediction_keys: Sequence[str | None], label_keys: list[list[str]]
    ) -> None:
        self.name = name
        labels_of: defaultdict[str | None, list[int]] = defaultdict(list)
        predictions_of: defaultdict[str | None, list[int]] = defaultdict(list)
        for number, keys in enumerate(label_keys):
            for key in keys:
                labels_of[key].append(number)
        for number, prediction_key in enumerate(prediction_keys):
            predictions_of[prediction_key].append(number)
        # Lists are shared: a thousand images of one name on both sides are a million pairs.
        self._labels = [labels_of[key] for key in prediction_keys]
        self._predictions = [[predictions_of[key] for key in keys] for keys in label_keys]
        self.pairs = [
            (number, matches[0])
            for number, matches in enumerate(self._labels)
            if len(matches) == 1 and sum(map(len, self._predictions[matches[0]])) == 1
        ]
        self.complete = len(self.pairs) == len(prediction_keys) == len(label_keys)

    def faults(self, predictions: Listed, labels: Listed) -> list[str]:
        faults = []
        for side, images, matches, other_side, others in (
            ("prediction", predictions, [[numbers] for numbers in self._labels], "label", labels),
            ("label", labels, self._predictions, "prediction", predictions),
        ):
            for row, lists in zip(images.rows, matches, strict=True):
                if not (count := sum(map(len, lists))):
                    faults.append(f"{side} {row.channels[0]} has no {other_side}")
                elif count > 1:
                    first = islice(chain.from_iterable(lists), 3)
                    names = ", ".join(str(others.rows[number].channels[0]) for number in first)
                    faults.append(f"{side} {row.channels[0]} fits {count} {other_side}s: {names}")
        return faults


def compare_pairs(predictions: ImageSet, labels: ImageSet, pairs: Pairs, seed: int = 0) -> Section:
    """PSNR, SSIM, MS-SSIM, MAE and NCC of each pair, and their means with 95% intervals.

    In the original intensities. The baseline of each is the same number between labels of different
    subjects: the score of a prediction that is a real image, but another one.

    PSNR and SSIM need a data range: 0 to 255 for pictures of 8 bits, else the lowest to the
    highest intensity of the labels in the pairs, for each channel. SSIM takes intensities from
    the lower end of it where that is negative, because its luminance term means nothing below 0.
    """
    label_places = [label for _, label in pairs]
    ranges, meaning = _data_range(labels, label_places)
    scales = similarity.num_scales(labels.shape[1:])
    scores = _scores(predictions, labels, pairs, ranges, scales)
    baselines = _unrelated(labels, sorted(set(label_places)), ranges, scales, seed)
    subjects = labels.subjects()[label_places]
    section = Section("paired")
    for name, values in scores.items():
        seed_of_measure = environment.derived_seed(seed, name)
        section.measures[name] = _overall(
            name, values, subjects, baselines.get(name), scales, seed_of_measure
        )
        finite = values[np.isfinite(values)]
        if len(finite):
            title = _TITLES.get(name, name)
            section.plots.append(Plot(title, "histogram", {"cases": finite.tolist()}, title))
    section.facts = {
        "num_pairs": len(pairs), "data_range": [list(pair) for pair in ranges],
        "data_range_is": meaning, "ms_ssim_scales": scales,
        "std": {name: _std(values) for name, values in scores.items()},
    }  # fmt: skip
    section.notes = _notes(labels, scales)
    section.cases = _cases(predictions, labels, pairs, scores)
    section.pictures = _pictures(predictions, labels, pairs, scores, ranges)
    return section


def _data_range(labels: ImageSet, rows: list[int]) -> tuple[Ranges, str]:
    low, high = np.full(labels.shape[0], np.inf), np.full(labels.shape[0], -np.inf)
    whole = True
    for batch in labels.portions(rows, _VOXELS_AT_ONCE):
        voxels = labels.read(batch).reshape(len(batch), labels.shape[0], -1)
        low = np.minimum(low, voxels.min(axis=(0, 2)))
        high = np.maximum(high, voxels.max(axis=(0, 2)))
        whole = whole and bool((voxels == np.rint(voxels)).all())
    if labels.raster and whole and low.min() >= 0 and 1 < high.max() <= 255:
        return [(0.0, 255.0)] * len(low), "pictures of 8 bits"
    # a constant channel has no range of its own
    low, high = np.where(low < high, [low, high], [[low.min()], [high.max()]])
    ranges = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return ranges, "lowest and highest intensity of the labels, for each channel"


def _scores(
    predictions: ImageSet, labels: ImageSet, pairs: Pairs, ranges: Ranges, scales: int
) -> dict[str, Floats]:
    """(len(pairs),) of each measure; NaN or infinite where there is none."""
    shape = (1, -1, *[1] * (len(labels.shape) - 1))
    low = np.array([pair[0] for pair in ranges]).reshape(shape)
    width = np.array([b - a for a, b in ranges]).reshape(shape)
    base = np.minimum(low, 0)
    is_colour = labels.raster and labels.shape[0] == 3
    parts: list[dict[str, Floats]] = []
    for batch in labels.portions(pairs, _VOXELS_AT_ONCE):
        x = predictions.read([i for i, _ in batch]).astype(np.float64)
        y = labels.read([j for _, j in batch]).astype(np.float64)
        mae = np.abs(x - y).reshape(len(x), x.shape[1], -1).mean(axis=2)
        ncc = similarity.correlation(x, y)
        x, y = (x - base) / width, (y - base) / width
        part = {"psnr_db": _psnr(x, y)}
        if scales:
            part["ssim"], part["ms_ssim"] = similarity.structural_similarity(x, y, scales)
        else:
            part["ssim"] = part["ms_ssim"] = np.full(len(x), np.nan)
        part |= {"mae": mae.mean(axis=1), "ncc": ncc}
        if mae.shape[1] > 1:
            part |= {f"mae_channel_{i}": mae[:, i] for i in range(mae.shape[1])}
        if mae.shape[1] > 1 and not is_colour:
            part |= _by_channel(x, y, scales)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _by_channel(x: Floats, y: Floats, scales: int) -> dict[str, Floats]:
    """PSNR and SSIM of each channel of (n, C, *spatial), whose range is 0 to 1."""
    part = {}
    for channel in range(x.shape[1]):
        one, other = x[:, channel : channel + 1], y[:, channel : channel + 1]
        part[f"psnr_db_channel_{channel}"] = _psnr(one, other)
        if scales:
            ssim, _ = similarity.structural_similarity(one, other, scales)
            part[f"ssim_channel_{channel}"] = ssim
    return part


def _psnr(x: Floats, y: Floats) -> Floats:
    squared_error = ((x - y).reshape(len(x), -1) ** 2).mean(axis=1)
    with np.errstate(divide="ignore"):
        decibels: Floats = -10 * np.log10(squared_error)
    return decibels


def _unrelated(
    labels: ImageSet, rows: list[int], ranges: Ranges, scales: int, seed: int
) -> dict[str, float]:
    """The mean of each measure between labels of different subjects."""
    rng = np.random.default_rng(environment.derived_seed(seed, "unrelated pairs"))
    order = rng.permutation(rows)[: _UNRELATED + 1]
    subjects = labels.subjects()
    couples = zip(order.tolist(), np.roll(order, 1).tolist(), strict=True)
    pairs = [(a, b) for a, b in couples if subjects[a] != subjects[b]]
    if not pairs:
        return {}
    scores = _scores(labels, labels, pairs, ranges, scales)
    finite = {name: values[np.isfinite(values)] for name, values in scores.items()}
    return {name: float(values.mean()) for name, values in finite.items() if len(values)}


def _overall(
    name: str, values: Floats, subjects: Ints, baseline: float | None, scales: int, seed: int
) -> Measure:
    finite, reason = np.isfinite(values), ""
    left_out = int((~finite).sum())
    if name.startswith(("ssim", "ms_ssim")) and not scales:
        return missing(f"a side has fewer than {similarity.WINDOW} voxels, the window of SSIM")
    if name.startswith("psnr_db") and left_out:
        reason = f"{left_out} of {len(values)} pairs are identical: their PSNR is infinite"
    elif name == "ncc" and left_out:
        reason = f"{left_out} of {len(values)} pairs have a constant channel: no correlation"
    reason += ", they are left out" if reason and finite.any() else ""
    return mean_measure(
        values[finite], subjects[finite], seed, real_baseline=baseline, reason=reason
    )


def _std(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else None


def _notes(labels: ImageSet, scales: int) -> list[str]:
    notes = [
        "The real baseline is the score of labels of different subjects compared with each other."
    ]
    if 0 < scales < 5:
        notes.append(
            f"MS-SSIM over {scales} of 5 scales, because the shortest side has "
            f"{min(labels.shape[1:])} voxels: not comparable with that of larger images."
        )
    if labels.shape[0] > 1:
        notes.append("MAE is the mean over the channels, each in its own unit.")
    return notes


def _cases(
    predictions: ImageSet, labels: ImageSet, pairs: Pairs, scores: dict[str, Floats]
) -> list[dict[str, Cell]]:
    cases = []
    for number, (i, j) in enumerate(pairs):
        case: dict[str, Any] = {"subject": labels.rows[j].subject}
        case["prediction"] = str(predictions.rows[i].channels[0])
        case["label"] = str(labels.rows[j].channels[0])
        for name, values in scores.items():
            case[name] = float(values[number]) if math.isfinite(values[number]) else None
        if math.isinf(scores["psnr_db"][number]):
            case["reason"] = "identical images: PSNR is infinite"
        cases.append(case)
    return cases


def _pictures(
    predictions: ImageSet, labels: ImageSet, pairs: Pairs, scores: dict[str, Floats], ranges: Ranges
) -> list[Picture]:
    """Best, median and worst by SSIM, by absolute error where there is none."""
    by = "ssim" if np.isfinite(scores["ssim"]).any() else "mae"
    order = np.argsort(-scores[by] if by == "ssim" else scores[by], kind="stable")
    middle = max(0, len(order) // 2 - _SHOWN // 2)
    chosen = {"best": order[:_SHOWN], "median": order[middle : middle + _SHOWN]}
    chosen["worst"] = order[::-1][:_SHOWN]
    rows, titles, captions = [], [], []
    difference_range = [(0.0, (high - low) / 4) for low, high in ranges]
    show = partial(upright, raster=labels.raster, spacing_mm=labels.spacing_mm)
    for title, numbers in chosen.items():
        for number in numbers:
            i, j = pairs[number]
            prediction, label = predictions.read([i])[0], labels.read([j])[0]
            difference = show(np.abs(prediction - label), difference_range)
            rows.append([show(label, ranges), show(prediction, ranges), difference])
            titles.append(f"{title}: {labels.rows[j].subject}")
            score = f"difference x4; {by} {scores[by][number]:.3g}"
            captions.append(["label", "prediction", score])
    title = f"Best, median and worst cases by {_TITLES[by]}"
    return [Picture(title, rows, tuple(titles), captions)]
