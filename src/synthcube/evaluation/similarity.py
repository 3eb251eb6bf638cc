"""Similarity of two images of the same shape: SSIM, MS-SSIM, PSNR, MAE, correlation.

Wang et al., "Image quality assessment: from error visibility to structural similarity" (IEEE TIP
2004), with its Gaussian window, and "Multiscale structural similarity" (Asilomar 2003). Computed
in float64 with scipy's separable filter, as scikit-image does: the convolutions of MONAI and
torchmetrics take a hundred times as many products for a volume, and MONAI's float32 loses
variances of images with a high mean.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from synthcube.evaluation.arrays import Floats

WINDOW = 11  # voxels along each side of the window

_SIGMA, _RADIUS = 1.5, 5
_C_1, _C_2 = 0.01**2, 0.03**2
_WEIGHTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])


def num_scales(size: tuple[int, ...]) -> int:
    """Scales of MS-SSIM, at most five, at which the window still fits; 0 where it never does."""
    return sum(min(size) // 2**scale >= WINDOW for scale in range(len(_WEIGHTS)))


def structural_similarity(x: Floats, y: Floats, scales: int) -> tuple[Floats, Floats]:
    """SSIM and MS-SSIM of each pair, (B,): means over voxels and channels where the window fits.

    Args:
        x, y: (B, C, *spatial), scaled so that the data range is 0 to 1.
        scales: of MS-SSIM, 1 to :func:`num_scales`; with fewer than five the weights of the
            first ones are scaled to add up to 1.
    """
    weights = _WEIGHTS[:scales] / _WEIGHTS[:scales].sum()
    product = np.ones(len(x))
    first = product
    for scale, weight in enumerate(weights):
        ssim, contrast = _mean_maps(x, y)
        first = ssim if scale == 0 else first
        last = scale == scales - 1
        product = product * np.maximum(ssim if last else contrast, 0) ** weight
        if not last:
            x, y = _halved(x), _halved(y)
    return first, product


def ssim_map(x: Floats, y: Floats) -> Floats:
    """SSIM at every voxel of a pair, (*spatial), with the window in the last two axes.

    Images are mirrored at their borders, as in torchmetrics.

    Args:
        x, y: (*spatial), scaled so that the data range is 0 to 1.
    """

    def blurred(image: Floats) -> Floats:
        smooth: Floats = gaussian_filter(
            image, _SIGMA, radius=_RADIUS, mode="mirror", axes=(-2, -1)
        )
        return smooth

    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    contrast = (2 * covariance + _C_2) / (variances + _C_2)
    ssim: Floats = (2 * mean_x * mean_y + _C_1) / (mean_x**2 + mean_y**2 + _C_1) * contrast
    return ssim


def correlation(x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of each pair, (B,): over voxels, then the mean over channels; NaN
    where a channel is constant."""
    x, y = (images.reshape(*images.shape[:2], -1) for images in (x, y))
    x, y = (images - images.mean(axis=2, keepdims=True) for images in (x, y))
    norm = np.sqrt((x**2).sum(axis=2) * (y**2).sum(axis=2))
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson: Floats = np.where(norm > 0, (x * y).sum(axis=2) / norm, np.nan).mean(axis=1)
    return pearson


def _mean_maps(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    mean_x, mean_y = _blurred(x), _blurred(y)
    # around the image's own mean, so that a large one does not swallow the variance
    shift_x, shift_y = (
        images.mean(axis=tuple(range(2, images.ndim)), keepdims=True) for images in (x, y)
    )
    x, y = x - shift_x, y - shift_y
    near_x, near_y = mean_x - shift_x, mean_y - shift_y
    variances = _blurred(x * x) - near_x**2 + _blurred(y * y) - near_y**2
    covariance = _blurred(x * y) - near_x * near_y
    contrast = (2 * covariance + _C_2) / (variances + _C_2)
    ssim = (2 * mean_x * mean_y + _C_1) / (mean_x**2 + mean_y**2 + _C_1) * contrast
    axes = tuple(range(1, x.ndim))
    return ssim.mean(axis=axes), contrast.mean(axis=axes)


def _blurred(x: Floats) -> Floats:
    axes = tuple(range(2, x.ndim))
    inner = (slice(None), slice(None), *[slice(_RADIUS, -_RADIUS)] * len(axes))
    blurred: Floats = gaussian_filter(x, _SIGMA, axes=axes, radius=_RADIUS)[inner]
    return blurred


def _halved(x: Floats) -> Floats:
    """The mean of every two voxels along each axis; an odd last one is left out."""
    for axis in range(2, x.ndim):
        even = x.shape[axis] // 2 * 2
        x = np.take(x, range(0, even, 2), axis) + np.take(x, range(1, even, 2), axis)
        x = x / 2
    return x
