"""Two stages: a model that is trained on what an already trained one makes of the images.

The first stage is frozen. Its weights become part of the second one's, so that an artifact needs
no other; in training it is one module, which the moving average shares.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, ValidationError
from typing_extensions import Self

from synthcube import artifact, registry
from synthcube.artifact import Artifact
from synthcube.digests import PREFIX, weights_digest
from synthcube.errors import ConfigError
from synthcube.models.family import Family, FamilyConfig
from synthcube.names import TRAINED
from synthcube.schema import Batch, ImageSpec
from synthcube.storage import sha256

# What is kept of all images lies on the device up to this size; above, in the main memory.
_ON_DEVICE_BYTES = 2**31


class TwoStageConfig(FamilyConfig):
    """A config that points at a trained first stage, and takes in what it needs of it."""

    protocol: ClassVar[type]
    """What the first stage must be able to do."""

    first_stage: str = Field(
        default="",
        description="The trained first stage: its run, its artifact, or "
        "hf://owner/name[@revision]; train writes the commit.",
    )
    first_stage_sha256: str = Field(
        default="",
        description="Hash of its weights, the same for a run and for its export; written by train, "
        "checked where given.",
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
        found = artifact.load(self.first_stage)
        family = found.build(torch.device("cpu"))
        if not isinstance(family, self.protocol):
            raise ConfigError(
                f"model.first_stage {self.first_stage}: this is a trained {family.config.name}; "
                f"{self.name} needs a {self.needs}, or another that can do the same."
            )
        asked = self.first_stage_sha256
        digest = _digest(found, family, asked)
        if asked not in ("", digest):
            raise ConfigError(
                f"model.first_stage {self.first_stage}: the SHA-256 of its weights is {digest}, "
                f"and model.first_stage_sha256 is {asked}."
            )
        read = {
            "first_stage_sha256": digest,
            "first_stage_config": dict(found.config["model"]),
            "first_stage_image": found.image,
        }
        return self.model_copy(update=read)

    def build_first_stage(self, image: ImageSpec) -> Any:
        """The first stage without its trained weights, for such images.

        Raises:
            ConfigError: the config was not resolved, or is not one of a first stage.
        """
        section = self.first_stage_config
        if section is None:
            raise ConfigError(
                "model.first_stage_config is missing: synthcube train writes it from "
                "model.first_stage."
            )
        try:
            kind = registry.find(str(section.get("name")))
            config = kind.model_validate(section, context=TRAINED)
        except ValidationError as error:
            raise ConfigError(f"model.first_stage_config: {error}") from error
        alone = image.model_copy(update={"conditions": (), "source_channels": ()})
        family = config.build(self.first_stage_image or alone)
        if not isinstance(family, self.protocol):
            raise ConfigError(f"model.first_stage_config is of no {self.needs}.")
        return family

    def first_stage_faults(self, image: ImageSpec) -> list[str]:
        """Why such images are none that the first stage was trained on."""
        trained = self.first_stage_image
        if trained is None:
            section = self.first_stage_config or {}
            kind = registry.find(str(section.get("name")))
            return kind.model_validate(section, context=TRAINED).faults(image)
        faults = []
        if trained.size != image.size:
            faults.append(
                f"data.size {list(image.size)}: model.first_stage was trained on images of "
                f"{list(trained.size)}"
            )
        if trained.channels != image.channels:
            faults.append(
                f"the images have {image.channels} channel(s) to be made: model.first_stage was "
                f"trained on {trained.channels}"
            )
        return faults


class FirstStage(torch.nn.Module):
    """A trained family that stays as it is: frozen, in evaluation mode, and never copied."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        for name in family.unaveraged:
            setattr(family, name, None)  # was for its own training
        self.family: Any = family.eval().requires_grad_(False)
        self.kept: torch.Tensor | None = None
        """What it made of every image of the manifest, by row."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The moving average of weights that stay is those weights: one copy is held and saved.
        return self

    def load(self, path: str, digest: str) -> None:
        """Take the weights of the artifact at `path`.

        Raises:
            SynthCubeError: there is none, or its weights do not have that hash.
        """
        found = artifact.load(path)
        family = found.build(torch.device("cpu"))
        if _digest(found, family, digest) != digest:
            raise ConfigError(f"model.first_stage {path} is not the one that was checked.")
        self.load_state_dict(FirstStage(family).state_dict(), strict=True)


def _digest(found: Artifact, family: Family, asked: str) -> str:
    """The hash of a first stage, of the kind that is asked for.

    It is that of the weights that compress and restore images: an export has no others. Runs of
    older versions ask for that of the file.
    """
    if asked and not asked.startswith(PREFIX):
        return sha256(found.weights)
    left_out = tuple(f"{name}." for name in family.unaveraged)
    weights = family.state_dict()
    return weights_digest(
        {name: each for name, each in weights.items() if not name.startswith(left_out)}
    )


class TwoStageFamily(Family):
    """Trains on what its first stage makes of the images, made once where they stay the same."""

    config: TwoStageConfig

    def __init__(self, config: TwoStageConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.first_stage = FirstStage(config.build_first_stage(image))

    @abstractmethod
    def compress(self, image: torch.Tensor) -> torch.Tensor:
        """What the first stage makes of images (B, C, *spatial), without gradient."""

    def begin(self, batches: Iterable[Batch], train_rows: Sequence[int]) -> None:
        if not self.config.first_stage:
            raise ConfigError("model.first_stage: the path of a trained one is needed to train.")
        self.first_stage.load(self.config.first_stage, self.config.first_stage_sha256)
        made = torch.cat([self._made(batch).cpu() for batch in batches])
        self.measure(made[torch.as_tensor(train_rows)])
        fits = made.numel() * made.element_size() <= _ON_DEVICE_BYTES
        self.first_stage.kept = made.to(self.device) if fits else made

    def measure(self, made: torch.Tensor) -> None:
        """Called once, with what the first stage makes of all training images."""

    def compressed(self, batch: Batch) -> torch.Tensor:
        """What the first stage makes of a batch, on its device."""
        kept = self.first_stage.kept
        if kept is None or batch["augmented"]:
            return self._made(batch)
        index = batch["index"]
        return kept[index.to(kept.device)].to(index.device)

    @torch.no_grad()
    def _made(self, batch: Batch) -> torch.Tensor:
        # In full precision, so that it is the same once for all and in a step.
        with torch.autocast(self.device.type, enabled=False):
            return self.compress(batch["image"].to(self.device))
