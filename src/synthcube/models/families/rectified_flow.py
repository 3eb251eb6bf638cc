"""Rectified flow in pixel space: straight paths from noise to image, the default family.

Liu et al., "Flow Straight and Fast" (ICLR 2023); the process is that of synthcube.models.flow.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from synthcube.models.flow import FlowFields
from synthcube.models.nets.unet import PixelConfig, PixelFamily
from synthcube.schema import ImageSpec


class RectifiedFlowConfig(FlowFields, PixelConfig):
    """Velocity-predicting U-Net in pixel space."""

    summary: ClassVar[str] = "straight paths from noise to image; good in 20 steps (the default)"

    name: Literal["rectified_flow"] = Field(
        default="rectified_flow", description="Family of the model."
    )

    def build(self, image: ImageSpec) -> RectifiedFlow:
        return RectifiedFlow(self, image)


class RectifiedFlow(PixelFamily):
    """x_t = (1 - t) x_0 + t noise; the network predicts the velocity noise - x_0."""
