"""Whole images with a network that was trained on patches: window by window, blended.

Windows overlap by a quarter, and count less towards their border (Gaussian weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from synthcube.schema import Condition

_OVERLAP = 0.25
Network = Callable[[Tensor, Tensor, Condition], Tensor]


def in_windows(
    predict: Callable[[Tensor], Tensor], image: Tensor, size: Sequence[int], at_once: int
) -> Tensor:
    """`predict` for one image of any size, (1, C, *spatial).

    Args:
        predict: for windows, (B, C, *size).
        size: of a window. A side of the image that is shorter is repeated at its border, and the
            result is cropped.
        at_once: most windows of a batch.
    """
    from monai.inferers import sliding_window_inference

    padded = at_least(image, size)
    whole = sliding_window_inference(
        padded, size, at_once, predict, overlap=_OVERLAP, mode="gaussian"
    )
    assert isinstance(whole, Tensor)
    return cropped(whole, image.shape[2:])


def windowed(network: Network, size: Sequence[int]) -> Network:
    """A network for images of any size, at least `size`, that sees one window at a time.

    Only its predictions are blended. What carries noise to an image sees the whole, with one noise
    for all windows, so that neither noise nor steps have seams (Bar-Tal et al., "MultiDiffusion",
    ICML 2023).
    """

    def predict(x_t: Tensor, time: Tensor, condition: Condition) -> Tensor:
        values, source = condition["values"], condition["source"].to(x_t)
        channels = [x_t.shape[1], source.shape[1]]

        def of_image(place: int) -> Tensor:
            def of_windows(windows: Tensor) -> Tensor:
                count = len(windows)
                x, sources = windows.split(channels, dim=1)
                same = Condition(values=values[place].expand(count, -1), source=sources)
                return network(x, time[place].expand(count), same)

            joined = torch.cat([x_t, source], dim=1)[place : place + 1]
            return in_windows(of_windows, joined, size, len(x_t))

        return torch.cat([of_image(place) for place in range(len(x_t))])

    return predict


def at_least(image: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, *spatial) whose sides are `size` or more: shorter ones go on with their last voxel."""
    missing = [max(0, least - side) for least, side in zip(size, image.shape[2:], strict=True)]
    if not any(missing):
        return image
    ends = [end for gap in reversed(missing) for end in (0, gap)]
    return functional.pad(image, ends, mode="replicate")


def cropped(image: Tensor, size: Sequence[int]) -> Tensor:
    """The first `size` voxels along each spatial axis of (B, C, *spatial)."""
    part = (slice(None), slice(None), *map(slice, size))
    return image[part]
