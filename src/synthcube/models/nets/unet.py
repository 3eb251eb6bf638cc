"""The U-Net of MONAI that the diffusion and flow families share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DiffusionModelUNet
from pydantic import Field
from torch import Tensor

from synthcube.models.family import size_faults
from synthcube.models.nets.conditioning import ConditionEmbedding
from synthcube.schema import (
    Condition,
    ConditionSpec,
    Depth,
    ImageSpec,
    Level,
    Levels,
    Schema,
    Width,
)

# Above this many voxels at the finest level with attention, its matrix is not kept as a whole.
_FEW_TOKENS = 1024


class UNetFields(Schema):
    """The network's part of a family's config.

    The defaults give the 2,328,449-parameter network of GaNDLF-Synth's DDPM.
    """

    channels: Levels = Field(
        default=(32, 64, 64, 64), description="Channels at each level, full resolution first."
    )
    num_res_blocks: Depth = Field(default=2, description="Residual blocks at each level.")
    attention_from: Level = Field(
        default=2, description="First level with self-attention (0 is full resolution)."
    )
    num_head_channels: Width = Field(
        default=8,
        description="Most channels of an attention head; lowered to divide model.channels.",
    )
    num_norm_groups: Width = Field(
        default=32, description="Most groups of a group norm; lowered to divide model.channels."
    )

    def network_faults(self, image: ImageSpec, size_name: str = "data.size") -> list[str]:
        """Reasons why the network cannot be built for such images; see size_faults."""
        levels = len(self.channels)
        return size_faults(image, 2 ** (levels - 1), levels, size_name=size_name)

    def build_network(self, image: ImageSpec, out_channels: int | None = None) -> ConditionalUNet:
        """The network for such images; None: as many channels out as the images have."""
        network = ConditionalUNet(
            image.conditions,
            **self._unet_settings(image, out_channels or image.channels),
            channels=self.channels,
            use_flash_attention=True,
        )
        coarsest = min(self.attention_from, len(self.channels) - 1)
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
        heads = (math.gcd(self.num_head_channels, channels) for channels in self.channels)
        levels = range(len(self.channels))
        return {
            "spatial_dims": image.rank,
            "in_channels": image.channels + len(image.source_channels),
            "out_channels": out_channels,
            "num_res_blocks": self.num_res_blocks,
            "attention_levels": tuple(level >= self.attention_from for level in levels),
            "num_head_channels": tuple(heads),
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
        self, x_t: Tensor, time: Tensor, condition: Condition
    ) -> Tensor:
        """x_t (B, C, *spatial) at time (B,), under a condition, to (B, C_out, *spatial)."""
        source = condition["source"].to(x_t)
        x = torch.cat([x_t, source], dim=1) if source.shape[1] else x_t
        predicted: Tensor = super().forward(x, time, class_labels=condition["values"])
        return predicted


def outputs_of(
    network: ConditionalUNet, legacy: torch.nn.Module, image: ImageSpec, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Outputs of both networks for the same random input; see legacy.Imports."""
    channels = image.channels + len(image.source_channels)
    x_t = torch.randn(2, channels, *image.size, generator=generator)
    time = torch.tensor([1.0, 700.0])
    image_part, source = x_t[:, : image.channels], x_t[:, image.channels :]
    values = torch.zeros(2, len(image.conditions))
    classes = values[:, 0].long() if image.conditions else None
    condition = Condition(values=values, source=source)
    return network(image_part, time, condition), legacy(x_t, time, class_labels=classes)


def _choose_attention(network: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Use the plain product instead of torch's fused one for few tokens in bfloat16 on a CPU.

    Measured with the default network: 0.71 against 0.88 CPU-s a training step. In float32, on a
    GPU, or with many tokens, whose products would fill the memory, the fused one wins.
    """
    plain = inputs[0].device.type == "cpu" and torch.is_autocast_enabled("cpu")
    for block in network.modules():
        if isinstance(block, SABlock):
            block.use_flash_attention = not plain
