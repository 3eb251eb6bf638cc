"""Means over the images of an epoch, which a checkpoint within the epoch keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


class EpochMeans:
    """Running means of named numbers, each weighted by the images that it stands for."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}  # name -> (sum, images), float64

    def add(self, terms: Mapping[str, torch.Tensor], num_images: int) -> None:
        """Add scalars that are means over `num_images` images; waits for no device."""
        for name, value in terms.items():
            each = value.detach().double().reshape(1)
            pair = torch.cat([each * num_images, each.new_full((1,), num_images)])
            known = self._sums.get(name)
            self._sums[name] = pair if known is None else known + pair

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The means, float32 scalars by name; the next epoch starts from nothing.

        Args:
            reduce: adds up a tensor over the processes that train together.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = reduce(torch.stack([self._sums[name] for name in names]))  # (names, 2)
        self.clear()
        return dict(zip(names, (sums[:, 0] / sums[:, 1]).float(), strict=True))

    def clear(self) -> None:
        self._sums = {}

    def state(self) -> dict[str, list[float]]:
        """Sum and number of images by name, as plain numbers."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from what :meth:`state` returned."""
        self._sums = {
            name: torch.tensor(pair, dtype=torch.float64, device=device)
            for name, pair in state.items()
        }
