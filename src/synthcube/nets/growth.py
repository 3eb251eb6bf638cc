"""Networks that begin with small images and grow to large ones, fading each size in.

Karras et al., "Progressive Growing of GANs" (ICLR 2018).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field

from synthcube.nets.equalized import doubled, halved
from synthcube.schema import MAX_COUNT, ImageSpec, Levels, Schema


class Growth(NamedTuple):
    """How far a network has grown: sizes up to `stage`, of which the last counts `alpha`."""

    stage: int
    alpha: float


class GrowthFields(Schema):
    """The sizes' part of a family's config."""

    channels: Levels = Field(
        default=(32, 64, 128, 128, 128),
        description="Channels at each level of both networks, full resolution first.",
    )
    progressive: bool = Field(
        default=False, description="Whether training begins with the smallest images and grows."
    )
    stage_epochs: int = Field(
        default=10,
        ge=1,
        le=MAX_COUNT,
        description="Epochs at each size if progressive, the last one excepted; a new size fades "
        "in over the first half of them.",
    )

    @property
    def last_stage(self) -> int:
        """The stage of the full size; the first is 0."""
        return len(self.channels) - 1

    @property
    def growing_epochs(self) -> int:
        """Epochs until the full size has faded in."""
        if not self.progressive or not self.last_stage:
            return 0
        return math.ceil((self.last_stage + 0.5) * self.stage_epochs)

    def growth(self, epoch: float) -> Growth:
        """How far the networks have grown after so many epochs, of which parts count."""
        if not self.progressive:
            return Growth(self.last_stage, 1.0)
        stage = min(int(epoch // self.stage_epochs), self.last_stage)
        since = epoch - stage * self.stage_epochs
        return Growth(stage, min(1.0, 2 * since / self.stage_epochs) if stage else 1.0)

    def shrunk(self, image: torch.Tensor, growth: Growth) -> torch.Tensor:
        """Real images (B, C, *spatial) at the size of the stage, as blurred as alpha makes them."""
        for _ in range(self.last_stage - growth.stage):
            image = halved(image)
        if growth.alpha < 1:
            image = torch.lerp(doubled(halved(image)), image, growth.alpha)
        return image

    def size_faults(self, image: ImageSpec) -> list[str]:
        """Why such images cannot be halved often enough."""
        step = 2**self.last_stage
        if any(side % step for side in image.size):
            return [
                f"data.size {list(image.size)}: every side must be a multiple of {step}, because "
                f"model.channels has {len(self.channels)} levels"
            ]
        return []
