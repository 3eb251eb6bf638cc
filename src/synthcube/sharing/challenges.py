"""What a challenge gives to a model and wants from it: files by what their names end in.

challenge.json says it for each model of a container. The preset names are those of BraTS: local
inpainting (Kofler et al., arXiv:2305.08992) and missing MRI, BraSyn (Li et al., arXiv:2305.09011).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from synthcube import reading
from synthcube.data.channels import MaskChannel
from synthcube.data.preprocessing import trained_data_config
from synthcube.errors import ArtifactError, ConfigError
from synthcube.models.artifact import Artifact
from synthcube.schema import List, Schema

DECLARATION = "challenge.json"
MODELS = "models"
"""Folder of the models, each in a folder with the name of its output."""

Suffix = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
"""What the names of files end in before .nii.gz: t1n of BraTS-00001-t1n.nii.gz."""

_CONTRASTS = ("t1c", "t1n", "t2f", "t2w")


class ChallengeTask(Schema):
    """The files that a model reads and writes, of each case."""

    inputs: Annotated[List[Suffix], Field(min_length=1, max_length=64)] = Field(
        description="Suffix of the file of each source channel, in the order of the training."
    )
    output: Suffix = Field(description="Suffix of the file to write.")
    image: Suffix | None = Field(
        default=None,
        description="The input that is completed: the output is this image, with other voxels "
        "inside of the mask.",
    )
    mask: Suffix | None = Field(
        default=None, description="Suffix of the mask: where it is above 0, voxels are made."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"inputs {list(self.inputs)}: a suffix is there twice")
        if self.output in self.reads:
            raise ValueError(f"output {self.output} is a suffix that is read: give another one")
        if (self.image is None) != (self.mask is None):
            raise ValueError("image and mask belong together: give both of them, or neither")
        if self.image is not None and self.image not in self.inputs:
            raise ValueError(f"image {self.image} is not among inputs {list(self.inputs)}")
        if self.image is not None and self.image == self.mask:
            raise ValueError(f"image and mask are both {self.image}: they are two files")
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The suffixes of all files that are read, those of the source channels first."""
        apart = self.mask is not None and self.mask not in self.inputs
        return (*self.inputs, *([self.mask] if apart and self.mask else []))


class Challenge(Schema):
    """challenge.json: a task for each model of a container."""

    schema_version: Literal[1] = 1
    name: str = Field(description="Preset, or own.")
    tasks: Annotated[List[ChallengeTask], Field(min_length=1, max_length=64)] = Field(
        description="One for each model; a case is for the first whose inputs it has, without "
        "its output."
    )

    @model_validator(mode="after")
    def _one_model_for_each_output(self) -> Self:
        outputs = [task.output for task in self.tasks]
        if len(set(outputs)) < len(outputs):
            raise ValueError(f"tasks: an output is there twice, of {outputs}")
        return self


def read_declaration(folder: Path) -> Challenge:
    """The content of a container's challenge.json. Raises ArtifactError."""
    path = folder / DECLARATION
    if not path.is_file():
        raise ArtifactError(
            f"model_path {folder}: there is no {DECLARATION}; give the folder that synthcube "
            "export --challenge wrote."
        )
    return reading.read_record(path, Challenge, ArtifactError)


def task_for(trained: Artifact, challenge: str) -> tuple[str, ChallengeTask]:
    """The name of a challenge, and the task of a model in it.

    Args:
        challenge: the name of a preset, or the path of a YAML with the fields of ChallengeTask.

    Raises:
        ConfigError: there is no such challenge, or the model cannot do its task.
    """
    if challenge in PRESETS:
        name, task = challenge, PRESETS[challenge](trained)
    elif challenge.lower().endswith((".yaml", ".yml", ".json")):
        values = reading.read_yaml(Path(challenge), ConfigError, name="--challenge")
        try:
            name, task = "own", ChallengeTask.model_validate(values)
        except ValidationError as error:
            raise ConfigError(
                f"--challenge {challenge} declares no task:", reading.faults_of(error)
            ) from None
    else:
        raise ConfigError(
            f"--challenge {challenge}: there is no such challenge; known: {', '.join(PRESETS)}, or "
            "a YAML of your own with inputs and output."
        )
    if faults := task_faults(trained, task):
        raise ConfigError(f"This model cannot take part in {challenge}:", faults)
    return name, task


def task_faults(trained: Artifact, task: ChallengeTask) -> list[str]:
    """Why a model cannot do a task, one line each."""
    image, faults = trained.image, []
    if len(image.source_channels) != len(task.inputs):
        faults.append(
            f"it makes images out of {len(image.source_channels)} source channel(s), and the "
            f"challenge gives {len(task.inputs)}: {', '.join(task.inputs)}"
        )
    if image.channels != 1:
        faults.append(f"it makes {image.channels} channels, and the challenge wants one file")
    return faults


def _inpainting(trained: Artifact) -> ChallengeTask:
    """The voided image and its mask; the one that data.channels calls a mask is the mask."""
    voided, mask = "t1n-voided", "mask"
    channels = trained_data_config(trained.config, trained.folder).channels
    sources = trained.image.source_channels
    is_mask = [isinstance(channels.get(channel), MaskChannel) for channel in sources]
    inputs = (mask, voided) if is_mask == [True, False] else (voided, mask)
    return ChallengeTask(
        inputs=inputs[:1] if len(sources) == 1 else inputs,
        output="t1n-inference", image=voided, mask=mask,
    )  # fmt: skip


def _missing_contrast(trained: Artifact) -> ChallengeTask:
    """Three of four contrasts, in alphabetical order as `synthcube prepare` lists them."""
    sources = trained.image.source_channels
    is_right = len(sources) == 3 and all(channel < len(_CONTRASTS) for channel in sources)
    if not is_right:
        raise ConfigError(
            f"brats-brasyn needs a model of the channels {', '.join(_CONTRASTS)}, in this order, "
            "with three of them as data.source_channels; this one has "
            f"{list(sources)}. In another order, declare the task in a YAML of your own."
        )
    (missing,) = {*range(len(_CONTRASTS))} - {*sources}
    return ChallengeTask(
        inputs=tuple(_CONTRASTS[channel] for channel in sources), output=_CONTRASTS[missing]
    )


PRESETS: dict[str, Callable[[Artifact], ChallengeTask]] = {
    "brats-inpainting": _inpainting,
    "brats-brasyn": _missing_contrast,
}
