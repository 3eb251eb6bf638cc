"""SSIM, PSNR and MSE of pairs inside a mask, as BraTS ranks local inpainting.

Kofler et al., arXiv:2305.08992, with what its server computes. Intensities of the label outside of
the mask give the scale: the 0.5 and 99.5 percentiles become 0 and 1, the lower one not below 0, and
both images are clipped there. PSNR has a data range of 1. SSIM is that of torchmetrics: both images
are 0 outside of the mask, the window is one of sagittal slices, the data range is the wider one of
the two images, and the map is averaged over the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from synthcube.data.images import read_image
from synthcube.data.manifest import Row
from synthcube.data.preprocessing import DataConfig, Preprocessing
from synthcube.environment import derived_seed
from synthcube.errors import EvaluationError
from synthcube.evaluation import similarity
from synthcube.evaluation.arrays import Floats, Mask
from synthcube.evaluation.intervals import mean_measure
from synthcube.evaluation.pairs import Pairs
from synthcube.evaluation.results import Section
from synthcube.evaluation.sets import ImageSet

MEASURES = ("ssim_in_mask", "psnr_db_in_mask", "mse_in_mask")
_PERCENTILES = (0.5, 99.5)


def add_inside_mask(
    section: Section, predictions: ImageSet, labels: ImageSet, pairs: Pairs, data: DataConfig,
    channel: int, seed: int,
) -> None:  # fmt: skip
    """Add the measures to those of the pairs, and to the cases.

    The baseline of each is the same number where the label of another subject is the prediction.

    Args:
        data: how the labels were placed on their grid.
        channel: of the files of the labels, which holds the mask.

    Raises:
        EvaluationError: a file has no such channel, or its mask is on another grid than the label.
    """
    mask_of = _mask_reader(labels, data, channel)
    subjects = labels.subjects()
    scores, baselines = [], []
    for i, j in pairs:
        label, mask = labels.read([j])[0], mask_of(labels.rows[j])
        scores.append(_scores(predictions.read([i])[0], label, mask))
        other = next((k for _, k in pairs if subjects[k] != subjects[j]), None)
        if other is not None:
            baselines.append(_scores(labels.read([other])[0], label, mask))
    table, of_others = np.array(scores), np.array(baselines).reshape(-1, len(MEASURES))
    empty = int(np.isnan(table[:, 2]).sum())
    for number, name in enumerate(MEASURES):
        values, others = table[:, number], of_others[:, number]
        known = np.isfinite(values)
        reason = f"{empty} of {len(values)} masks are empty, they are left out" if empty else ""
        if exact := int(np.isinf(values).sum()):
            reason = f"{exact} of {len(values)} pairs are identical inside the mask"
        section.measures[name] = mean_measure(
            values[known], subjects[[j for _, j in pairs]][known], derived_seed(seed, name),
            real_baseline=float(others[np.isfinite(others)].mean())
            if np.isfinite(others).any()
            else None,
            reason=reason,
        )  # fmt: skip
        for case, value in zip(section.cases, values.tolist(), strict=True):
            case[name] = value if math.isfinite(value) else None
    section.facts["mask_channel"] = channel


def _mask_reader(labels: ImageSet, data: DataConfig, channel: int) -> Callable[[Row], Mask]:
    preprocessing = Preprocessing(data)

    def read(row: Row) -> Mask:
        image = read_image(row.channels)
        if channel >= len(image.tensor):
            raise EvaluationError(
                f"evaluation.mask_channel is {channel}, and label {row.channels[0]} has "
                f"{len(image.tensor)} channel(s), counted from 0."
            )
        ((_, cut),) = preprocessing.images_of(image, row.slice)
        tensor, _ = preprocessing.placed(cut, may_be_constant=True)
        mask: Mask = tensor[channel].numpy() >= 0.5
        mask = mask[..., 0] if labels.rank == 2 else mask
        if mask.shape != labels.shape[1:]:
            raise EvaluationError(
                f"evaluation.mask_channel: the mask of {row.channels[0]} has the size "
                f"{list(mask.shape)}, and what is compared of it {list(labels.shape[1:])}: compare "
                "whole images."
            )
        return mask

    return read


def _scores(x: Floats, y: Floats, mask: Mask) -> tuple[float, float, float]:
    """SSIM, PSNR in decibels and MSE, means over the channels; NaN of an empty mask.

    Args:
        x, y: (C, *spatial), the prediction and the label.
        mask: (*spatial).
    """
    if not mask.any():
        return math.nan, math.nan, math.nan
    margin = similarity.WINDOW  # SSIM at a voxel depends on those of its window alone
    box = tuple(slice(max(0, at.min() - margin), at.max() + margin + 1) for at in mask.nonzero())
    of_channels = []
    for prediction, label in zip(x.astype(np.float64), y.astype(np.float64), strict=True):
        low, high = np.percentile(np.where(mask, 0, label), _PERCENTILES)
        low = max(low, 0.0)
        width = high - low if high > low else 1.0
        one, other = ((image.clip(low, high) - low) / width for image in (prediction, label))
        error = float(((one[mask] - other[mask]) ** 2).mean())
        one, other = one * mask, other * mask
        data_range = max(np.ptp(one), np.ptp(other)) or 1.0
        ssim = similarity.ssim_map(one[box] / data_range, other[box] / data_range)[mask[box]].mean()
        of_channels.append((float(ssim), -10 * math.log10(error) if error else math.inf, error))
    ssim, psnr, error = np.array(of_channels).mean(axis=0).tolist()
    return ssim, psnr, error
