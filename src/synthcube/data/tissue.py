"""Where tissue is on a slide: the mask of a thumbnail, and how much of a patch lies on tissue."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageFilter
import SimpleITK as sitk
from scipy import ndimage

Mask = npt.NDArray[np.bool_]

LOWEST_SATURATION, HIGHEST_SATURATION = 13, 51
"""Between these (5% and 20% of 255) the threshold is kept: Otsu's method divides every picture in
two, also one that holds no tissue or nothing else."""
_DARKEST = 50  # the brightest of red, green and blue; below it are black borders
_INK_HUES = 50, 177  # green to blue, 70 to 250 degrees of 360, in steps of 256
_INK_SATURATION = 179  # 70%; stained tissue is paler at the resolution of a thumbnail


def tissue_mask(thumbnail: PIL.Image.Image) -> Mask:
    """Which pixels of a slide's RGB thumbnail show tissue, (Y, X).

    Glass is grey and stains are colours, so the saturation (HSV) of the blurred thumbnail is
    divided by Otsu's threshold, as in Lu et al. 2021 (CLAM, doi:10.1038/s41551-020-00682-w); Otsu
    1979, doi:10.1109/TSMC.1979.4310076. Black borders and marks of green and blue pens are no
    tissue. Red pens look like eosin and are not recognised.
    """
    blurred = thumbnail.convert("RGB").filter(PIL.ImageFilter.BoxBlur(1)).convert("HSV")
    hue, saturation, value = np.moveaxis(np.asarray(blurred), -1, 0)
    is_ink = (hue >= _INK_HUES[0]) & (hue <= _INK_HUES[1]) & (saturation > _INK_SATURATION)
    is_ink = ndimage.maximum_filter(is_ink, 5)  # with its pale borders
    is_usable = (value >= _DARKEST) & ~is_ink
    threshold: float = HIGHEST_SATURATION
    if is_usable.any():
        threshold = min(max(otsu(saturation[is_usable]), LOWEST_SATURATION), HIGHEST_SATURATION)
    mask: Mask = is_usable & (saturation > threshold)
    return mask


def otsu(values: npt.NDArray[np.uint8]) -> float:
    """Otsu's threshold of 8-bit values: those above it are the upper class."""
    threshold = sitk.OtsuThresholdImageFilter()
    threshold.SetNumberOfHistogramBins(256)
    threshold.Execute(sitk.GetImageFromArray(values.reshape(1, -1)))
    return float(threshold.GetThreshold())


def tissue_shares(
    mask: Mask, x: npt.NDArray[np.int64], y: npt.NDArray[np.int64], side: float,
    slide_size: tuple[int, int],
) -> npt.NDArray[np.float64]:  # fmt: skip
    """The share of tissue in each patch of a grid, (Y, X).

    Args:
        mask: of the whole slide.
        x: left edges of the columns, in pixels of the slide.
        y: upper edges of the rows.
        side: of a patch.
        slide_size: width and height.
    """
    sums = np.pad(mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1), ((1, 0), (1, 0)))
    left, right = _edges(x, side, mask.shape[1], slide_size[0])
    top, bottom = _edges(y, side, mask.shape[0], slide_size[1])
    rows = sums[bottom] - sums[top]
    area = (bottom - top)[:, None] * (right - left)
    shares: npt.NDArray[np.float64] = (rows[:, right] - rows[:, left]) / area
    return shares


def _edges(starts: npt.NDArray[np.int64], side: float, pixels: int, length: int) -> tuple[Any, Any]:
    """First and last pixel of the mask for each patch along one axis; at least one pixel."""
    scale = pixels / length
    first = np.rint(starts * scale).astype(np.int64).clip(0, pixels - 1)
    last = np.rint((starts + side) * scale).astype(np.int64).clip(first + 1, pixels)
    return first, last
