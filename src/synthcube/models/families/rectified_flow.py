"""Rectified flow in pixel space: straight paths from noise to image, the default family.

Liu et al., "Flow Straight and Fast" (ICLR 2023); the process is that of synthcube.models.flow. With
source images it can start at them in place of noise (Albergo and Vanden-Eijnden, "Stochastic
Interpolants with Data-Dependent Couplings", ICML 2024), or make an image in one step, as a
regression does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from synthcube.errors import ConfigError
from synthcube.models import samplers
from synthcube.models.flow import TIME_SCALE, Flow, FlowFields
from synthcube.models.nets import conditioning
from synthcube.models.nets.unet import (
    LevelChannels,
    NormGroups,
    PixelConfig,
    PixelFamily,
    RefinementChannels,
    ResidualBlocks,
    WaveletLevels,
)  # fmt: skip
from synthcube.models.optimizers import OptimizerConfig
from synthcube.models.samplers import Predict
from synthcube.schema import Batch, ImageSpec

_OF_A_SOLVER = ("sampler", "steps")


class RectifiedFlowConfig(FlowFields, PixelConfig):
    """Velocity-predicting U-Net on the wavelet bands of images, which are refined at the end.

    The defaults are those that made the best images of short trainings (docs/recipes.md).
    """

    summary: ClassVar[str] = "straight paths from noise to image; good in 20 steps (the default)"

    name: Literal["rectified_flow"] = Field(
        default="rectified_flow", description="Family of the model."
    )
    channels: LevelChannels = (32, 64, 96)
    num_res_blocks: ResidualBlocks = 1
    num_norm_groups: NormGroups = None
    wavelet_levels: WaveletLevels = 1
    refinement_channels: RefinementChannels = None
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig.model_validate({"lr": 2e-3, "betas": [0.9, 0.99]}),
        description="Optimizer, with its arguments.",
    )
    start: Literal["noise", "source"] = Field(
        default="noise",
        description="Where the flow starts: at noise, or at the first channels of the source, as "
        "many as are generated.",
    )
    start_noise: float = Field(
        default=0.0, ge=0, le=100,
        description="Spread of the noise added to the source with start: source, where intensities "
        "are in [-1, 1]; at 0 every seed gives the same image.",
    )  # fmt: skip
    mode: Literal["flow", "regression"] = Field(
        default="flow",
        description="flow: one of the likely images; regression: in one step the expected value of "
        "each voxel (its median with losses: [{name: l1}]), blurred where the source does not "
        "determine it, and best in PSNR and SSIM.",
    )

    def build(self, image: ImageSpec) -> RectifiedFlow:
        return RectifiedFlow(self, image)

    def faults(self, image: ImageSpec) -> list[str]:
        faults = super().faults(image)
        sources = len(image.source_channels)
        if self.start == "source" and sources < image.channels:
            faults.append(
                f"model.start source: it needs as many source channels as are generated, "
                f"{image.channels}; data.source_channels names {sources}"
            )
        if self.mode == "regression" and not sources:
            faults.append(
                "model.mode regression: it makes images out of others, and data.source_channels "
                "names none"
            )
        if self.start_noise and self.start == "noise":
            faults.append("model.start_noise: it belongs to start: source; leave it out")
        return faults

    def with_sampling(self, settings: Mapping[str, Any]) -> Self:
        refused = [f"sampling.{key}" for key in _OF_A_SOLVER if settings.get(key) is not None]
        if refused and self.mode == "regression":
            raise ConfigError(
                f"mode: regression has one step and no sampler: leave out {' and '.join(refused)}."
            )
        return super().with_sampling(settings)

    def sampling(self) -> dict[str, Any]:
        settings = super().sampling()
        if self.mode == "regression":
            settings = {key: value for key, value in settings.items() if key not in _OF_A_SOLVER}
        return settings

    def shift_of(self, size: Sequence[int]) -> float:
        """`time_shift`; without one it is 1 where the flow starts at an image with its outline."""
        return super().shift_of(size) if self.start == "noise" else self.time_shift or 1.0

    def process(self, spatial_dims: int, *, bounded: bool) -> Flow:
        return Flow(self, spatial_dims, in_one_step=self.mode == "regression")

    def draw(
        self, predict: Predict, start: Tensor, generators: Sequence[torch.Generator], *,
        bounded: bool,
    ) -> Tensor:  # fmt: skip
        if self.mode == "flow":
            return super().draw(predict, start, generators, bounded=bounded)
        euler = samplers.build("euler", "flow", num_train_timesteps=TIME_SCALE)
        return samplers.integrate(euler, predict, start, generators, 1)


class RectifiedFlow(PixelFamily):
    """x_t = (1 - t) x_0 + t x_1; the network predicts the velocity x_1 - x_0."""

    def start_of(self, noise: Tensor, source: Tensor) -> Tensor:
        if self.config.start == "source":
            first = source[:, : noise.shape[1]]
            return first + float(self.config.start_noise) * noise
        return torch.zeros_like(noise) if self.config.mode == "regression" else noise

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        condition = conditioning.dropped(batch["condition"], self.config.condition_dropout)
        start = self.start_of(torch.randn_like(batch["image"]), condition["source"])
        terms: dict[str, Tensor] = self.process.loss(
            lambda x_t, time: self.network(x_t, time, condition), batch["image"], start
        )
        return terms
