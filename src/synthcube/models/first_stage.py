"""Models of two stages: the second is trained on images that a trained autoencoder compressed.

The first stage is frozen. Its weights become part of the second stage's, so that one artifact holds
both; in training it is a single module, which the moving average shares.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from typing_extensions import Self

from synthcube.errors import ConfigError
from synthcube.models import artifact, registry
from synthcube.models.family import Family, FamilyConfig
from synthcube.plugins import TRAINED
from synthcube.schema import Batch, ImageSpec

# Compressed images are kept on the device up to this size; above, in the main memory.
_ON_DEVICE_BYTES = 2**31
_PATCHES_ADAPT = " (one that is trained with data.patches fits images of other sizes)"


class TwoStageConfig(FamilyConfig):
    """A config with the address of a trained first stage and a copy of its settings."""

    protocol: ClassVar[type]
    """The methods that the first stage must have."""

    first_stage: str = Field(
        default="",
        description="The trained first stage: its run, its artifact, or "
        "hf://owner/name[@revision]; train writes the commit.",
    )
    first_stage_sha256: str = Field(
        default="",
        description="Hash of its weights, the same for a run and for its export; written by train, "
        "checked if set.",
    )
    first_stage_config: dict[str, Any] | None = Field(
        default=None, description="Its section `model`; written by train."
    )
    first_stage_image: ImageSpec | None = Field(
        default=None, description="The images it was trained on; written by train."
    )

    @classmethod
    def tiny_first_stage(cls) -> dict[str, Any]:
        """The section `model` of the smallest first stage."""
        return registry.find(cls.needs).tiny().model_dump(mode="json")

    def resolved(self) -> Self:
        if not self.first_stage:
            raise ConfigError(
                f"model.first_stage: a trained {self.needs} is needed (its run, its artifact, or "
                "hf://owner/name)."
            )
        trained = artifact.load(self.first_stage)
        family = trained.build(torch.device("cpu"))
        if not isinstance(family, self.protocol):
            raise ConfigError(
                f"model.first_stage {self.first_stage}: this is a trained {family.config.name}; "
                f"{self.name} needs a {self.needs}, or another that can do the same."
            )
        digest = _digest(family)
        if self.first_stage_sha256 not in ("", digest):
            raise ConfigError(
                f"model.first_stage {self.first_stage}: the SHA-256 of its weights is {digest}, "
                f"and model.first_stage_sha256 is {self.first_stage_sha256}."
            )
        return self.model_copy(update={
            "first_stage_sha256": digest,
            "first_stage_config": dict(trained.config["model"]),
            "first_stage_image": trained.image.encoded,
        })  # fmt: skip

    def build_first_stage(self, image: ImageSpec) -> Any:
        """The first stage without its trained weights, for images like `image`.

        One that was trained on patches compresses images of another size, to as much larger
        latents.
        """
        key = "model.first_stage_config"
        if self.first_stage_config is None:
            raise ConfigError(
                f"{key} is missing: synthcube train writes it from model.first_stage."
            )
        try:
            config = self._first_config()
        except ValidationError as error:
            raise ConfigError(f"{key}: {error}") from error
        trained = self.first_stage_image
        if trained is None:
            trained = image.model_copy(update={"conditions": (), "source_channels": ()})
        elif trained.patches:
            trained = trained.model_copy(update={"size": image.size})
        family = config.build(trained)
        if not isinstance(family, self.protocol):
            raise ConfigError(f"{key} is of no {self.needs}.")
        return family

    def faults(self, image: ImageSpec) -> list[str]:
        trained, key = self.first_stage_image, "model.first_stage"
        faults = []
        if trained is None:
            faults += self._first_config().faults(image)
        elif trained.size != image.size and trained.patches and trained.rank == image.rank:
            larger = trained.model_copy(update={"size": image.size})
            faults += [f"{key}: {fault}" for fault in self._first_config().faults(larger)]
        elif trained.size != image.size:
            images = "patches" if trained.patches else "images"
            faults.append(
                f"data.size {list(image.size)}: {key} was trained on {images} of "
                f"{list(trained.size)}{'' if trained.patches else _PATCHES_ADAPT}"
            )
        if trained and trained.channels != image.channels:
            faults.append(
                f"the images to generate have {image.channels} channel(s): {key} was trained on "
                f"{trained.channels}"
            )
        return [*faults, *self.source_faults(image)]

    def _first_config(self) -> FamilyConfig:
        section = self.first_stage_config or {}
        kind = registry.find(str(section.get("name")))
        return kind.model_validate(section, context=TRAINED)


class FirstStage(torch.nn.Module):
    """A trained family that is frozen, always in evaluation mode, and never copied."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        for name in family.unaveraged:
            setattr(family, name, None)  # only trains
        self.family: Any = family.eval().requires_grad_(False)
        self.compressed: Tensor | None = None
        """Every image of the manifest, compressed, in the order of its rows."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The moving average of frozen weights equals them: one copy is held and saved.
        return self

    def load(self, path: str, digest: str) -> None:
        """Load the weights of the artifact at `path`, whose hash must be `digest`."""
        family = artifact.load(path).build(torch.device("cpu"))
        if _digest(family) != digest:
            raise ConfigError(f"model.first_stage {path} is not the one that was checked.")
        self.load_state_dict(FirstStage(family).state_dict(), strict=True)


def _digest(family: Family) -> str:
    """The hash of the weights that compress and restore images; an export has no others."""
    left_out = tuple(f"{name}." for name in family.unaveraged)
    weights = family.state_dict().items()
    return artifact.weights_digest(
        {name: w for name, w in weights if not name.startswith(left_out)}
    )


class TwoStageFamily(Family):
    """A family that trains on compressed images; without augmentation each is compressed once."""

    config: TwoStageConfig

    def __init__(self, config: TwoStageConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.first_stage = FirstStage(config.build_first_stage(image))

    @abstractmethod
    def compress(self, image: Tensor) -> Tensor:
        """Latents or codes (B, ...) of images (B, C, *spatial), without gradient."""

    def fit_statistics(self, batches: Iterable[Batch], train_rows: Sequence[int]) -> None:
        if not self.config.first_stage:
            raise ConfigError("model.first_stage: the path of a trained one is needed to train.")
        self.first_stage.load(self.config.first_stage, self.config.first_stage_sha256)
        compressed = torch.cat([self._compress(batch).cpu() for batch in batches])
        self.measure(compressed[torch.as_tensor(train_rows)])
        fits = compressed.numel() * compressed.element_size() <= _ON_DEVICE_BYTES
        self.first_stage.compressed = compressed.to(self.device) if fits else compressed

    def measure(self, compressed: Tensor) -> None:
        """A hook that gets all compressed training images once, before the training."""

    def compressed(self, batch: Batch) -> Tensor:
        """The images of a batch, compressed, on its device."""
        stored = self.first_stage.compressed
        if stored is None or batch["augmented"]:
            return self._compress(batch)
        index = batch["index"]
        return stored[index.to(stored.device)].to(index.device)

    @torch.no_grad()
    def _compress(self, batch: Batch) -> Tensor:
        # In full precision, so that images compressed in advance and in a step are the same.
        with torch.autocast(self.device.type, enabled=False):
            return self.compress(batch["image"].to(self.device))
