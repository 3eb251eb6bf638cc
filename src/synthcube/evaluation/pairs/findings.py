"""Predictions against the very images they should be: translation and reconstruction."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from synthcube import runtime
from synthcube.evaluation import similarity
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.intervals import mean_measure
from synthcube.evaluation.planes import plane
from synthcube.evaluation.results import Measure, Picture, Plot, Section, missing

Floats = npt.NDArray[np.float64]
Range = list[tuple[float, float]]

_VOXELS_AT_ONCE = 1 << 21
_UNRELATED = 200  # pairs behind the floor
_SHOWN = 2  # best, median and worst cases each
_TITLES = {
    "psnr_db": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "mae": "MAE",
    "ncc": "Correlation (NCC)",
}  # fmt: skip


def compare(
    predictions: ImageSet,
    labels: ImageSet,
    pairs: list[tuple[int, int]],
    config: EvaluationConfig,
    seed: int = 0,
) -> Section:
    """PSNR, SSIM, MS-SSIM, MAE and NCC of each pair, and their means with 95% intervals.

    In the original intensities. The floor of each is the same number between labels of different
    subjects: what a prediction would get that is a real image, but another one.

    PSNR and SSIM need a data range: 0 to 255 for pictures of 8 bits, else the lowest to the
    highest intensity of the labels in the pairs, for each channel. SSIM takes intensities from
    the lower end of it where that is negative, for its luminance term means nothing below 0.
    """
    ranges, reading = _data_range(labels, [label for _, label in pairs])
    scales = similarity.num_scales(labels.shape[1:])
    found = _measured(predictions, labels, pairs, ranges, scales)
    floors = _unrelated(labels, sorted({label for _, label in pairs}), ranges, scales, seed)
    subjects = labels.subjects()[[label for _, label in pairs]]
    section = Section("paired")
    for name, values in found.items():
        section.measures[name] = _overall(
            name, values, subjects, floors.get(name), scales, runtime.derived_seed(seed, name)
        )
        finite = values[np.isfinite(values)]
        if len(finite):
            title = _TITLES.get(name, name)
            section.plots.append(Plot(title, "histogram", {"cases": finite.tolist()}, title))
    section.facts = {
        "num_pairs": len(pairs),
        "data_range": [list(pair) for pair in ranges],
        "data_range_is": reading,
        "ms_ssim_scales": scales,
        "std": {name: _std(values) for name, values in found.items()},
    }
    section.notes = _notes(labels, scales)
    section.cases = _cases(predictions, labels, pairs, found)
    section.pictures = _pictures(predictions, labels, pairs, found, ranges)
    return section


def _data_range(labels: ImageSet, rows: list[int]) -> tuple[Range, str]:
    low, high = np.full(labels.shape[0], np.inf), np.full(labels.shape[0], -np.inf)
    whole = True
    for batch in _batches(rows, labels):
        voxels = labels.read(batch).reshape(len(batch), labels.shape[0], -1)
        low = np.minimum(low, voxels.min(axis=(0, 2)))
        high = np.maximum(high, voxels.max(axis=(0, 2)))
        whole = whole and bool((voxels == np.rint(voxels)).all())
    if labels.raster and whole and low.min() >= 0 and 1 < high.max() <= 255:
        return [(0.0, 255.0)] * len(low), "pictures of 8 bits"
    # a channel that never changes has no range of its own
    low, high = np.where(low < high, [low, high], [[low.min()], [high.max()]])
    found = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return found, "lowest and highest intensity of the labels, for each channel"


def _batches(rows: list[int], images: ImageSet) -> list[list[int]]:
    size = max(1, _VOXELS_AT_ONCE // math.prod(images.shape))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _measured(
    predictions: ImageSet, labels: ImageSet, pairs: list[tuple[int, int]], ranges: Range,
    scales: int,
) -> dict[str, Floats]:  # fmt: skip
    """(len(pairs),) of each measure; NaN or infinite where there is none."""
    shape = (1, -1, *[1] * (len(labels.shape) - 1))
    low = np.array([pair[0] for pair in ranges]).reshape(shape)
    width = np.array([b - a for a, b in ranges]).reshape(shape)
    base = np.minimum(low, 0)
    parts: list[dict[str, Floats]] = []
    for batch in _batches(list(range(len(pairs))), labels):
        x = predictions.read([pairs[i][0] for i in batch]).astype(np.float64)
        y = labels.read([pairs[i][1] for i in batch]).astype(np.float64)
        mae = np.abs(x - y).reshape(len(x), x.shape[1], -1).mean(axis=2)
        ncc = similarity.correlation(x, y)
        x, y = (x - base) / width, (y - base) / width
        squared, _ = similarity.errors(x, y)
        with np.errstate(divide="ignore"):
            part = {"psnr_db": -10 * np.log10(squared)}
        if scales:
            part["ssim"], part["ms_ssim"] = similarity.structural(x, y, scales)
        else:
            part["ssim"] = part["ms_ssim"] = np.full(len(x), np.nan)
        part |= {"mae": mae.mean(axis=1), "ncc": ncc}
        if mae.shape[1] > 1:
            part |= {f"mae_channel_{i}": mae[:, i] for i in range(mae.shape[1])}
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _unrelated(
    labels: ImageSet, rows: list[int], ranges: Range, scales: int, seed: int
) -> dict[str, float]:
    """The mean of each measure between labels of different subjects."""
    rng = np.random.default_rng(runtime.derived_seed(seed, "unrelated pairs"))
    order = rng.permutation(rows)[: _UNRELATED + 1]
    subjects = labels.subjects()
    pairs = [
        (int(a), int(b))
        for a, b in zip(order, np.roll(order, 1), strict=True)
        if subjects[a] != subjects[b]
    ]
    if not pairs:
        return {}
    found = _measured(labels, labels, pairs, ranges, scales)
    means = {name: values[np.isfinite(values)] for name, values in found.items()}
    return {name: float(values.mean()) for name, values in means.items() if len(values)}


def _overall(
    name: str, values: Floats, subjects: npt.NDArray[np.int64], floor: float | None, scales: int,
    seed: int,
) -> Measure:  # fmt: skip
    kept = np.isfinite(values)
    left_out = int((~kept).sum())
    reason = ""
    if name in ("ssim", "ms_ssim") and not scales:
        return missing(f"a side has fewer than {similarity.WINDOW} voxels, the window of SSIM")
    if name == "psnr_db" and left_out:
        reason = f"{left_out} of {len(values)} pairs are identical: their PSNR is infinite"
    elif name == "ncc" and left_out:
        reason = f"{left_out} of {len(values)} pairs have a constant channel: no correlation"
    reason += ", they are left out" if reason and kept.any() else ""
    return mean_measure(values[kept], subjects[kept], seed, floor=floor, reason=reason)


def _std(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else None


def _notes(labels: ImageSet, scales: int) -> list[str]:
    told = ["The floor is what labels of different subjects get when compared with each other."]
    if 0 < scales < 5:
        told.append(
            f"MS-SSIM over {scales} of 5 scales, because the shortest side has "
            f"{min(labels.shape[1:])} voxels: not comparable with that of larger images."
        )
    if labels.shape[0] > 1:
        told.append("MAE is the mean over the channels, each in its own unit.")
    return told


def _cases(
    predictions: ImageSet, labels: ImageSet, pairs: list[tuple[int, int]], found: dict[str, Floats]
) -> list[dict[str, float | int | str | None]]:
    cases = []
    for place, (i, j) in enumerate(pairs):
        case: dict[str, Any] = {
            "subject": labels.rows[j].subject,
            "prediction": str(predictions.rows[i].channels[0]),
            "label": str(labels.rows[j].channels[0]),
        }
        for name, values in found.items():
            value = float(values[place])
            case[name] = value if math.isfinite(value) else None
        if math.isinf(float(found["psnr_db"][place])):
            case["reason"] = "identical images: PSNR is infinite"
        cases.append(case)
    return cases


def _pictures(
    predictions: ImageSet, labels: ImageSet, pairs: list[tuple[int, int]],
    found: dict[str, Floats], ranges: Range,
) -> list[Picture]:  # fmt: skip
    """Best, median and worst by SSIM, by absolute error where there is none."""
    by = "ssim" if np.isfinite(found["ssim"]).any() else "mae"
    order = np.argsort(-found[by] if by == "ssim" else found[by], kind="stable")
    middle = max(0, len(order) // 2 - _SHOWN // 2)
    chosen = {"best": order[:_SHOWN], "median": order[middle : middle + _SHOWN]}
    chosen["worst"] = order[::-1][:_SHOWN]
    rows, titles, captions = [], [], []
    errors = [(0.0, (high - low) / 4) for low, high in ranges]
    for title, places in chosen.items():
        for place in places:
            i, j = pairs[place]
            made, true = predictions.read([i])[0], labels.read([j])[0]
            shown = [plane(each, ranges, raster=labels.raster) for each in (true, made)]
            shown.append(plane(np.abs(made - true), errors, raster=labels.raster))
            rows.append(shown)
            titles.append(f"{title}: {labels.rows[j].subject}")
            captions.append(["label", "prediction", f"difference x4; {by} {found[by][place]:.3g}"])
    title = f"Best, median and worst cases by {_TITLES[by]}"
    return [Picture(title, rows, tuple(titles), captions)]
