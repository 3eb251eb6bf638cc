"""Diffusion or flow among the latents of a trained autoencoder.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022); the
latents are shifted as well as scaled, as in Esser et al., "Scaling Rectified Flow Transformers"
(ICML 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from synthcube.models import samplers
from synthcube.models.diffusion import DiffusionFields
from synthcube.models.family import Encodes, sampling_of, with_sampling
from synthcube.models.first_stage import TwoStageConfig, TwoStageFamily
from synthcube.models.flow import FlowFields
from synthcube.models.losses import loss_faults
from synthcube.models.nets.conditioning import GuidanceFields, dropped, guided
from synthcube.models.nets.unet import TINY_UNET, UNetFields
from synthcube.models.samplers import noise
from synthcube.schema import Batch, Condition, ImageSpec, Moments, Pair


class FlowObjective(FlowFields):
    """A rectified flow among latents."""

    name: Literal["flow"] = Field(default="flow", description="Kind of process.")


class DiffusionObjective(DiffusionFields):
    """A denoising diffusion among latents."""

    name: Literal["diffusion"] = Field(default="diffusion", description="Kind of process.")


class LatentDiffusionConfig(UNetFields, GuidanceFields, TwoStageConfig):
    """U-Net among the latents of a trained autoencoder."""

    summary: ClassVar[str] = "flow or diffusion among the latents of a trained autoencoder_kl"
    needs: ClassVar[str] = "autoencoder_kl"
    protocol: ClassVar[type] = Encodes

    name: Literal["latent_diffusion"] = Field(
        default="latent_diffusion", description="Family of the model."
    )
    objective: Annotated[FlowObjective | DiffusionObjective, Field(discriminator="name")] = Field(
        default=FlowObjective(),
        description="What is learned and how images are drawn: {name: flow}, with the keys of "
        "rectified_flow, or {name: diffusion}, with those of ddpm.",
    )

    latent_moments: Pair | None = Field(
        default=None,
        description="Mean and standard deviation of the latents, such as [0.1, 2.5]; null: those "
        "of the training images, or of training.start_from.",
    )

    @model_validator(mode="after")
    def _moments_have_a_spread(self) -> Self:
        if self.latent_moments and self.latent_moments[1] <= 0:
            raise ValueError(
                f"latent_moments {list(self.latent_moments)}: the second is a standard deviation, "
                "above 0"
            )
        return self

    def private_faults(self, kept: Callable[[str], bool]) -> list[str]:
        faults = super().private_faults(kept)
        if self.latent_moments or (kept("latent_mean") and kept("latent_std")):
            return faults
        return [
            *faults,
            "model.latent_moments: give mean and standard deviation of latents, such as those of "
            "public images, or start from a public model (training.start_from); else those of "
            "the private images become public",
        ]

    def with_sampling(self, settings: Mapping[str, Any]) -> Self:
        of_process = {key: settings.get(key) for key in ("sampler", "steps")}
        objective = with_sampling(self.objective, of_process, self.name)
        others = {key: value for key, value in settings.items() if key not in of_process}
        return super().with_sampling(others).model_copy(update={"objective": objective})

    def sampling(self) -> dict[str, Any]:
        return super().sampling() | sampling_of(self.objective)

    def build(self, image: ImageSpec) -> LatentDiffusion:
        return LatentDiffusion(self, image)

    @classmethod
    def tiny(cls) -> Self:
        objective = FlowObjective(num_sampling_steps=3)
        return cls(**TINY_UNET, objective=objective, first_stage_config=cls.tiny_first_stage())

    def faults(self, image: ImageSpec) -> list[str]:
        faults = super().faults(image)
        if not faults:
            with torch.device("meta"):  # its shape is all that matters
                shape = self.build_first_stage(image).latent_shape()
            latent = latent_spec(image, shape)
            faults = self.network_faults(latent, f"latents of data.size {list(image.size)}")
            of_losses = loss_faults(self.objective.losses, latent)
            faults += [fault.replace("model.", "model.objective.", 1) for fault in of_losses]
        return faults


class LatentDiffusion(TwoStageFamily):
    """ddpm or rectified_flow among latents that are scaled to mean 0 and standard deviation 1."""

    config: LatentDiffusionConfig
    predicts_noise = True

    def __init__(self, config: LatentDiffusionConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.latent = latent_spec(image, self.first_stage.family.latent_shape())
        out_channels = config.objective.out_channels(self.latent.channels)
        self.network = config.build_network(self.latent, out_channels)
        self.process = config.objective.process(image.rank, bounded=False)
        self._measured = Moments()
        self.register_buffer("latent_mean", torch.tensor(0.0))
        self.register_buffer("latent_std", torch.tensor(1.0))

    def compress(self, image: Tensor) -> Tensor:
        latent: Tensor = self.first_stage.family.encode(image)
        return latent.float()

    def measure(self, compressed: Tensor) -> None:
        std, mean = torch.std_mean(compressed.double())
        self._measured = Moments(count=compressed.numel(), mean=mean.item(), std=std.item())
        self.scale_by(self._measured)

    def moments(self) -> Moments:
        """Of the latents of the training images, once `fit_statistics` has measured them."""
        return self._measured

    def scale_by(self, moments: Moments) -> None:
        """Scale latents by these moments, as those of several sites together.

        Those that the config states come first.
        """
        mean, std = self.config.latent_moments or (moments.mean, moments.std)
        self.get_buffer("latent_mean").fill_(mean)
        # Latents without any spread carry nothing: they are left as they are.
        self.get_buffer("latent_std").fill_(std if std > 0 else 1.0)

    def normalised(self, latent: Tensor) -> Tensor:
        """Latents of the first stage, (B, c, *spatial), scaled for the process."""
        return (latent - self.get_buffer("latent_mean")) / self.get_buffer("latent_std")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        condition = dropped(batch["condition"], self.config.condition_dropout)
        latent = self.normalised(self.compressed(batch))
        return self.process.loss(lambda x_t, time: self.network(x_t, time, condition), latent)

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        start = noise(generators, (self.latent.channels, *self.latent.size)).to(self.device)
        predict = guided(self.network, condition, self.config.guidance, self.latent.channels)
        with samplers.seen_through(self._decoded):
            scaled = self.config.objective.draw(predict, start, generators, bounded=False)
        return self._decoded(scaled)

    def _decoded(self, scaled: Tensor) -> Tensor:
        latent = scaled * self.get_buffer("latent_std") + self.get_buffer("latent_mean")
        image: Tensor = self.first_stage.family.decode(latent)
        return image.float().clamp(-1, 1)


def latent_spec(image: ImageSpec, shape: Sequence[int]) -> ImageSpec:
    """The description of latents of a shape, (c, *spatial), for a network among them."""
    size, channels = tuple(shape[1:]), shape[0]
    return image.model_copy(update={"size": size, "channels": channels, "source_channels": ()})
