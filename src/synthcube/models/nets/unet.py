"""The U-Net of MONAI that the pixel-space diffusion and flow families share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DiffusionModelUNet
from pydantic import Field

from synthcube.models.nets.conditioning import ConditionEmbedding
from synthcube.schema import Condition, ConditionSpec, ImageSpec, Levels, Schema

# Above this many voxels at the finest level with attention, its matrix is not kept as a whole.
_FEW_TOKENS = 1024


class UNetFields(Schema):
    """The network's part of a family's config.

    The defaults give the 2,328,449-parameter network of GaNDLF-Synth's DDPM.
    """

    channels: Levels = Field(
        default=(32, 64, 64, 64), description="Channels at each level, full resolution first."
    )
    num_res_blocks: int = Field(
        default=2, ge=1, le=64, description="Residual blocks at each level."
    )
    attention_from: int = Field(
        default=2,
        ge=0,
        le=16,
        description="First level with self-attention (0 is full resolution).",
    )
    num_head_channels: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Most channels of an attention head; lowered to divide model.channels.",
    )
    num_norm_groups: int = Field(
        default=32,
        ge=1,
        le=4096,
        description="Most groups of a group norm; lowered to divide model.channels.",
    )

    def network_faults(self, image: ImageSpec, named: str = "data.size") -> list[str]:
        """Why the network cannot be built for such images, whose size is called `named`."""
        step = 2 ** (len(self.channels) - 1)
        if any(side % step for side in image.size):
            return [
                f"{named} {list(image.size)}: every side must be a multiple of {step}, because "
                f"model.channels has {len(self.channels)} levels"
            ]
        return []

    def build_network(self, image: ImageSpec, out_channels: int | None = None) -> ConditionalUNet:
        """The network for such images; `out_channels` is as many as they have, unless given."""
        network = ConditionalUNet(
            image.conditions,
            **self._unet_settings(image, out_channels or image.channels),
            channels=self.channels,
            use_flash_attention=True,
        )
        levels = len(self.channels)
        coarsest = min(self.attention_from, levels - 1)
        if math.prod(image.size) // 2 ** (image.rank * coarsest) <= _FEW_TOKENS:
            network.register_forward_pre_hook(_choose_attention)
        return network

    def build_legacy_network(self, image: ImageSpec) -> torch.nn.Module:
        """The same network of monai-generative, for models without numbers as conditions."""
        from generative.networks.nets import DiffusionModelUNet as LegacyUNet

        classes = [len(spec.classes) for spec in image.conditions]
        network: torch.nn.Module = LegacyUNet(
            **self._unet_settings(image, image.channels),
            num_channels=self.channels,
            num_class_embeds=classes[0] if classes else None,
        )
        return network

    def _unet_settings(self, image: ImageSpec, out_channels: int) -> dict[str, Any]:
        levels = range(len(self.channels))
        return {
            "spatial_dims": image.rank,
            "in_channels": image.channels + len(image.source_channels),
            "out_channels": out_channels,
            "num_res_blocks": self.num_res_blocks,
            "attention_levels": tuple(level >= self.attention_from for level in levels),
            "num_head_channels": tuple(
                math.gcd(self.num_head_channels, each) for each in self.channels
            ),
            "norm_num_groups": math.gcd(self.num_norm_groups, *self.channels),
        }


class ConditionalUNet(DiffusionModelUNet):
    """The U-Net of MONAI: conditions join its time embedding, source images its input."""

    def __init__(self, conditions: Sequence[ConditionSpec], **settings: Any) -> None:
        super().__init__(**settings)
        if conditions:
            # Where MONAI adds the embedding of a class, ours of all conditions is added.
            self.num_class_embeds = len(conditions)
            embedding: Any = ConditionEmbedding(conditions, 4 * settings["channels"][0])
            self.class_embedding = embedding

    def forward(  # type: ignore[override]  # MONAI's has other arguments after the first two
        self, x_t: torch.Tensor, time: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """x_t (B, C, *spatial) at time (B,), under a condition, to (B, C_out, *spatial)."""
        source = condition["source"].to(x_t)
        x = torch.cat([x_t, source], dim=1) if source.shape[1] else x_t
        predicted: torch.Tensor = super().forward(x, time, class_labels=condition["values"])
        return predicted


def outputs_of(
    network: ConditionalUNet, legacy: torch.nn.Module, image: ImageSpec, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both networks make of the same random input; see legacy.Imports."""
    channels = image.channels + len(image.source_channels)
    x_t = torch.randn(2, channels, *image.size, generator=generator)
    time = torch.tensor([1.0, 700.0])
    made, given = x_t[:, : image.channels], x_t[:, image.channels :]
    values = torch.zeros(2, len(image.conditions))
    classes = values[:, 0].long() if image.conditions else None
    condition = Condition(values=values, source=given)
    return network(made, time, condition), legacy(x_t, time, class_labels=classes)


def _choose_attention(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Few tokens in bfloat16 on a CPU: the plain product beats torch's fused one.

    Measured with the default network: 0.71 against 0.88 CPU-s a training step. In float32, on a
    GPU, or with many tokens, whose products would fill the memory, the fused one wins.
    """
    plain = inputs[0].device.type == "cpu" and torch.is_autocast_enabled("cpu")
    for block in network.modules():
        if isinstance(block, SABlock):
            block.use_flash_attention = not plain
