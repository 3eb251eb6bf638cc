"""The U-Net of MONAI that the diffusion and flow families share, and what those of pixels share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import (
    DiffusionUNetResnetBlock,
    get_timestep_embedding,
)
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from synthcube import schema
from synthcube.models import samplers, windows
from synthcube.models.family import Family, FamilyConfig, size_faults
from synthcube.models.losses import loss_faults
from synthcube.models.nets import autoguidance, conditioning, wavelet
from synthcube.models.nets.autoguidance import AutoguidanceFields, EarlierNetwork
from synthcube.models.nets.conditioning import ConditionEmbedding, GuidanceFields
from synthcube.models.samplers import noise
from synthcube.schema import Batch, Condition, ConditionSpec, ImageSpec, Level, Levels, Schema

TINY_UNET: Any = {
    "channels": (8, 8), "num_res_blocks": 1, "attention_from": 1, "num_norm_groups": 2,
}  # fmt: skip
CONDITIONED_GROUPS = 8
"""A norm with a group for each channel takes away what a class adds to it (docs/recipes.md)."""
_REFINEMENT = {2: 16, 3: 8}  # channels, by the number of axes
# Above this many voxels at the finest level with attention, its matrix is not kept as a whole.
_FEW_TOKENS = 1024


LevelChannels = Annotated[
    Levels, Field(description="Channels at each level, full resolution first.")
]
ResidualBlocks = Annotated[schema.Depth, Field(description="Residual blocks at each level.")]
NormGroups = Annotated[
    schema.Width | None,
    Field(
        description="Most groups of a group norm; lowered to divide model.channels. null: 32, and "
        "8 where conditions are followed, as a norm with a group for each channel takes away what "
        "a class adds to it."
    ),
]
WaveletLevels = Annotated[
    int,
    Field(
        ge=0, le=3,
        description="Levels of a Haar wavelet transform before the network, which then works on "
        "bands of 1/2, 1/4 or 1/8 of the resolution, and its inverse after it. With 1, a step of "
        "64x64x64 voxels took a tenth of the time and less than half of the memory.",
    ),
]  # fmt: skip
RefinementChannels = Annotated[
    Annotated[int, Field(ge=0, le=4096)] | None,
    Field(
        description="Channels of three convolutions at full resolution after the inverse wavelet "
        "transform, without which its blocks can show as a fine grid; 0: none; null: with "
        "wavelets 16, of volumes 8."
    ),
]


class UNetFields(Schema):
    """The network's part of a family's config.

    The defaults give the 2,328,449-parameter network of GaNDLF-Synth's DDPM; a family can have
    defaults of its own.
    """

    channels: LevelChannels = (32, 64, 64, 64)
    num_res_blocks: ResidualBlocks = 2
    attention_from: Level = Field(
        default=2, description="First level with self-attention (0 is full resolution)."
    )
    num_head_channels: schema.Width = Field(
        default=8,
        description="Most channels of an attention head; lowered to divide model.channels.",
    )
    num_norm_groups: NormGroups = 32
    attention_projection: bool = Field(
        default=True,
        description="Whether attention ends with a layer of its own; false: without, as in "
        "monai-generative and GaNDLF-Synth, which built the layer and never called it.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1,
        description="Share of the features of each residual block that a training step leaves out, "
        "against memorising few images.",
    )  # fmt: skip
    wavelet_levels: WaveletLevels = 0
    refinement_channels: RefinementChannels = 0

    def network_faults(self, image: ImageSpec, size_name: str = "data.size") -> list[str]:
        """Reasons why the network cannot be built for such images; see size_faults."""
        if self.refinement_channels and not self.wavelet_levels:
            return ["model.refinement_channels: it belongs to model.wavelet_levels; leave it out"]
        levels, key = len(self.channels), "model.channels"
        if self.wavelet_levels:
            levels, key = levels + self.wavelet_levels, "model.channels with model.wavelet_levels"
        return size_faults(image, 2 ** (levels - 1), levels, key=key, size_name=size_name)

    def build_network(self, image: ImageSpec, out_channels: int | None = None) -> ConditionalUNet:
        """The network for such images; None: as many channels out as the images have."""
        settings = self._unet_settings(image, out_channels or image.channels)
        settings |= {"channels": self.channels, "use_flash_attention": True}
        refinement = self.refinement_channels
        if refinement is None:
            refinement = _REFINEMENT[image.rank] if self.wavelet_levels else 0
        network = ConditionalUNet(image.conditions, self.wavelet_levels, refinement, **settings)
        if not self.attention_projection:
            _drop_projections(network)
        if self.dropout:
            _add_dropout(network, self.dropout)
        halvings = min(self.attention_from, len(self.channels) - 1) + self.wavelet_levels
        if math.prod(image.size) // 2 ** (image.rank * halvings) <= _FEW_TOKENS:
            network.register_forward_pre_hook(_choose_attention)
        return network

    def build_legacy_network(self, image: ImageSpec) -> torch.nn.Module:
        """The same network of monai-generative, for models without numbers as conditions."""
        from generative.networks.nets import DiffusionModelUNet as LegacyUNet

        settings = self._unet_settings(image, image.channels) | {"num_channels": self.channels}
        num_classes = len(image.conditions[0].classes) if image.conditions else None
        network: torch.nn.Module = LegacyUNet(**settings, num_class_embeds=num_classes)
        return network

    def _unet_settings(self, image: ImageSpec, out_channels: int) -> dict[str, Any]:
        heads = (math.gcd(self.num_head_channels, channels) for channels in self.channels)
        norm_groups = self.num_norm_groups or (CONDITIONED_GROUPS if image.conditions else 32)
        levels = range(len(self.channels))
        return {
            "spatial_dims": image.rank,
            "in_channels": image.channels + len(image.source_channels),
            "out_channels": out_channels,
            "num_res_blocks": self.num_res_blocks,
            "attention_levels": tuple(level >= self.attention_from for level in levels),
            "num_head_channels": tuple(heads),
            "norm_num_groups": math.gcd(norm_groups, *self.channels),
        }


def _drop_projections(network: torch.nn.Module) -> None:
    """Make the last layer of each attention the identity, for good."""
    for name, layer in network.named_modules():
        if name.endswith(".attn.out_proj"):
            torch.nn.init.eye_(layer.get_parameter("weight"))
            torch.nn.init.zeros_(layer.get_parameter("bias"))
            layer.requires_grad_(False)


def _add_dropout(network: torch.nn.Module, share: float) -> None:
    """Dropout before the second convolution of each residual block.

    The place is that of Ho et al. (2020) and of EDM (Karras et al. 2022). A hook has no name, so
    weights keep theirs.
    """
    for block in network.modules():
        if isinstance(block, DiffusionUNetResnetBlock):
            block.conv2.register_forward_pre_hook(partial(_dropped, share))


def _dropped(share: float, layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return functional.dropout(inputs[0], share, training=layer.training)


class ConditionalUNet(DiffusionModelUNet):
    """The U-Net of MONAI: conditions join its time embedding, source images its input.

    With `levels` it works on the Haar bands of its images; what goes in and comes out are images.
    With `refinement_channels` those are refined at full resolution.
    """

    def __init__(
        self, conditions: Sequence[ConditionSpec], levels: int = 0, refinement_channels: int = 0,
        **settings: Any,
    ) -> None:  # fmt: skip
        bands = 2 ** (settings["spatial_dims"] * levels)
        of_images = settings["in_channels"], settings["out_channels"]
        features = wavelet.FEATURES if refinement_channels else 0
        settings["in_channels"] *= bands
        settings["out_channels"] = settings["out_channels"] * bands + features
        super().__init__(**settings)
        self.levels = levels
        self.num_bands = settings["out_channels"] - features
        self.refinement: wavelet.Refinement | None = None
        if refinement_channels:
            self.refinement = wavelet.Refinement(
                settings["spatial_dims"], *of_images, refinement_channels,
                4 * settings["channels"][0],
            )  # fmt: skip
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
        images = [x_t, source] if source.shape[1] else [x_t]
        bands = torch.cat([wavelet.bands_of(image, self.levels) for image in images], dim=1)
        outputs = super().forward(bands, time, class_labels=condition["values"])
        predicted: Tensor = wavelet.image_of(outputs[:, : self.num_bands], self.levels)
        if self.refinement is None:
            return predicted
        waves = get_timestep_embedding(time, self.block_out_channels[0]).to(x_t)
        features, x = outputs[:, self.num_bands :], torch.cat(images, dim=1)
        predicted = predicted + self.refinement(x, predicted, features, self.time_embed(waves))
        return predicted


class PixelConfig(UNetFields, GuidanceFields, AutoguidanceFields, FamilyConfig):
    """A U-Net in pixel space; a subclass adds the fields of its process."""

    def earlier_share(self) -> float:
        return self.autoguidance_from

    def with_sampling(self, settings: Mapping[str, Any]) -> Self:
        self.require_earlier_weights(settings)
        return super().with_sampling(settings)

    def sampling(self) -> dict[str, Any]:
        settings = super().sampling()
        if not self.autoguidance_from:
            del settings["autoguidance"]
        return settings

    @classmethod
    def tiny(cls) -> Self:
        sampling: Any = {"num_sampling_steps": 3}
        return cls(**TINY_UNET, **sampling)

    def faults(self, image: ImageSpec) -> list[str]:
        config: Any = self
        return [
            *self.network_faults(image), *loss_faults(config.losses, image),
            *self.autoguidance_faults(),
        ]  # fmt: skip


class PixelFamily(Family):
    """Trains a U-Net and samples images with it, by the process of its config."""

    config: Any
    predicts_noise = True
    translates_any_size = True

    def __init__(self, config: PixelConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        out_channels = self.config.out_channels(image.channels)
        self.network = config.build_network(image, out_channels)
        self.process = self.config.process(image.rank, bounded=True)
        self.earlier = EarlierNetwork(self.network) if self.config.autoguidance_from else None

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        condition = conditioning.dropped(batch["condition"], self.config.condition_dropout)
        terms: dict[str, Tensor] = self.process.loss(
            lambda x_t, time: self.network(x_t, time, condition), batch["image"]
        )
        return terms

    def start_of(self, noise: Tensor, source: Tensor) -> Tensor:
        """Where the process starts, (B, C, *spatial), given noise of that shape and the source."""
        return noise

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        trained = tuple(self.image.size)
        size = tuple(condition["source"].shape[2:]) or trained  # there may be no source
        networks: list[Any] = [self.network]
        strength = self.config.autoguidance
        if strength > 1 and self.earlier is not None and self.earlier.is_kept:
            networks.append(self.earlier.network)
        if size != trained:
            networks = [windows.windowed(network, trained) for network in networks]
            source = windows.at_least(condition["source"], trained)
            condition = Condition(values=condition["values"], source=source)
        sides = map(max, size, trained)
        drawn = noise(generators, (self.image.channels, *sides)).to(self.device)
        start = self.start_of(drawn, condition["source"])
        channels, guidance = self.image.channels, self.config.guidance
        predict, *earlier = (
            conditioning.guided(network, condition, guidance, channels) for network in networks
        )
        if earlier:
            predict = autoguidance.guided(predict, earlier[0], strength, channels)
        with samplers.seen_through(partial(windows.cropped, size=size)):
            images: Tensor = self.config.draw(predict, start, generators, bounded=True)
        return windows.cropped(images, size).clamp(-1, 1)


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
