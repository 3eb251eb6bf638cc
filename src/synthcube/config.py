"""The config of a run: its sections together, read, validated, and written as a template."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from typing_extensions import Self

from synthcube import reading
from synthcube.compute import ComputeConfig
from synthcube.data.postprocessing import PostprocessingConfig
from synthcube.data.preprocessing import DataConfig
from synthcube.errors import ArtifactError, ConfigError, SynthCubeError
from synthcube.evaluation.config import EvaluationConfig
from synthcube.models import registry
from synthcube.models.artifact import CONFIG, Artifact
from synthcube.models.family import SAMPLING_KEYS, FamilyConfig
from synthcube.plugins import TRAINED, did_you_mean
from synthcube.schema import MAX_BATCH, MAX_IMAGES, MAX_SEED, List, Schema
from synthcube.sharing.config import CroissantConfig, ExportConfig
from synthcube.sharing.runtimes import NAMES as RUNTIMES
from synthcube.sharing.runtimes import RuntimeOrTorch
from synthcube.training import leaks, strategies
from synthcube.training.config import TrainingConfig

_WIDTH = 96
_OLD_SECTION = re.compile(r"^model_config[ ]*:", re.MULTILINE)  # of GaNDLF-Synth


def template(config: BaseModel, indent: int = 0) -> str:
    """A YAML text with each field, its value and its description as a comment."""
    pad = "  " * indent
    parts: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        comment = textwrap.wrap(field.description or "", _WIDTH - len(pad) - 2)
        parts += [f"{pad}# {line}" for line in comment]
        if isinstance(value, BaseModel):
            parts += [f"{pad}{name}:", template(value, indent + 1).rstrip("\n")]
        else:
            parts.append(f"{pad}{name}: {inline(value)}")
        if indent == 0:
            parts.append("")
    for name, value in (getattr(config, "model_extra", None) or {}).items():
        parts.append(f"{pad}{name}: {inline(value)}")
    return "\n".join(parts) + "\n"


def inline(value: Any) -> str:
    """JSON is YAML: the one-line form of a plain value."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"))
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)


S = TypeVar("S", bound=Schema)
NumImages = Annotated[int, Field(ge=1, le=MAX_IMAGES)]


Animation = Literal["steps", "slices"]
OutputFormat = Literal["native", "dicom"]


class SamplingConfig(Schema):
    """The defaults of `synthcube infer`."""

    num_images: NumImages | dict[str, NumImages] = Field(
        default=16, description="Images to generate; {Hand: 5, HeadCT: 3}: so many of a class."
    )
    batch_size: int = Field(default=16, ge=1, le=MAX_BATCH, description="Images made at once.")
    guidance: float | None = Field(
        default=None, ge=0, le=100,
        description="How strictly conditions are followed; null: model.guidance.",
    )  # fmt: skip
    autoguidance: float | None = Field(
        default=None, ge=1, le=100,
        description="How far images are driven away from what earlier weights would make, of a "
        "model that keeps some; 1: not at all, in half the time; null: model.autoguidance.",
    )  # fmt: skip
    sampler: str | None = Field(
        default=None, description="How images are drawn; null: the sampler of the model."
    )
    steps: int | None = Field(
        default=None, ge=2, le=100_000,
        description="Steps of the sampler; null: those of the model, or of `sampler`.",
    )  # fmt: skip
    truncation: float | None = Field(
        default=None, ge=0, le=1, description="Spread of stylegan's styles; null: model.truncation."
    )
    animate: Animation | None = Field(
        default=None,
        description="Write animation.gif too: steps, from noise to images, of a model that draws "
        "with a sampler; or slices, through volumes from the feet to the head.",
    )
    format: OutputFormat = Field(
        default="native",
        description="native: PNG or NIfTI, as the images of the training; dicom: a DICOM series of "
        "each image too.",
    )
    postprocessing: List[PostprocessingConfig] = Field(
        default=(),
        description="What is done to each image, in its own intensities, before it is written, "
        "such as [{name: clip, low: 0}, {name: largest_component, above: 40}].",
    )
    runtime: RuntimeOrTorch = Field(
        default="torch",
        description=f"What computes the networks: torch; or {' or '.join(RUNTIMES)}, on the CPU, "
        "for a model that was exported for it.",
    )
    croissant: CroissantConfig | None = Field(
        default=None,
        description="Describe the images in croissant.json: {license: cc-by-4.0}, or {} where no "
        "license can be stated.",
    )

    def of_model(self) -> dict[str, Any]:
        """The settings that the model draws images with; None: its own."""
        return {key: getattr(self, key) for key in SAMPLING_KEYS}


class RunConfig(Schema):
    """All settings of a training."""

    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="The one seed of every random choice."
    )
    model: SerializeAsAny[FamilyConfig] = Field(description="The model: its family and settings.")
    data: DataConfig = Field(default=DataConfig(), description="Images and what is done to them.")
    training: TrainingConfig = Field(default=TrainingConfig(), description="How long and how.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="What infer makes.")
    compute: ComputeConfig = Field(default=ComputeConfig(), description="Where to compute.")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="What evaluate computes."
    )
    export: ExportConfig = Field(
        default=ExportConfig(), description="What export says of the model, and where it goes."
    )

    @model_validator(mode="after")
    def _model_can_be_trained_so(self) -> Self:
        faults = [
            *strategies.faults(self.model, self.training, self.compute),
            *leaks.faults(self.model, self.data, self.training, self.compute),
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _model_can_be_sampled_so(self, info: ValidationInfo) -> Self:
        if info.context != TRAINED:  # else the model is not the one of this config
            try:
                self.model.with_sampling(self.sampling.of_model())
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    def dump(self) -> dict[str, Any]:
        """Plain values, every default written out."""
        return self.model_dump(mode="json")


@cache
def config_class(family: type[FamilyConfig]) -> type[RunConfig]:
    """RunConfig whose section `model` is that family's: its faults are reported with the rest."""
    return create_model(
        "RunConfig",
        __base__=RunConfig,
        model=(family, Field(default_factory=family, description="The model.")),
    )


def load(path: Path, overrides: Iterable[str] = (), *, trained: bool = False) -> RunConfig:
    """Read and validate a YAML file with `key=value` overrides applied. Raises ConfigError.

    With `trained`, the config of a run that is not trained on, what only trains is not looked up.
    """
    values, lines = _parsed(path)
    return build(values, overrides, where=str(path), lines=lines, trained=trained)


def load_any(
    source: Path | Mapping[str, Any], overrides: Iterable[str] = (), *, trained: bool = False
) -> RunConfig:
    """:func:`load` of a path, :func:`build` of a mapping, which stays as it is."""
    if isinstance(source, Path):
        return load(source, overrides, trained=trained)
    return build(deepcopy(dict(source)), overrides, trained=trained)


def read(path: Path, kind: type[S]) -> S:
    """Read and validate a YAML file that holds another schema than a run's. Raises ConfigError."""
    values, lines = _parsed(path)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = [_explained(kind, fault, lines) for fault in error.errors()]
        raise ConfigError(f"{path} has {len(faults)} fault(s):", faults) from error


def build(
    values: Any,
    overrides: Iterable[str] = (),
    *,
    where: str = "config",
    lines: Mapping[tuple[Any, ...], int] | None = None,
    trained: bool = False,
) -> RunConfig:
    """Validate plain values, with `key=value` overrides applied. `trained` as for :func:`load`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a mapping of sections is needed, not {type(values).__name__}.")
    if "model_config" in values:
        raise _old_config(where)
    for override in overrides:
        _apply(values, override)
    faults: list[str] = []
    family: type[FamilyConfig] = registry.find(registry.DEFAULT)
    section = values.get("model", {})
    try:
        if isinstance(section, dict):
            family = registry.find(str(section.get("name", registry.DEFAULT)))
    except SynthCubeError as error:
        faults.append(f"model.name{_line(('model', 'name'), lines)}: {error}")
        section = {}
    kind = config_class(family)
    try:
        context = TRAINED if trained else None
        config = kind.model_validate({**values, "model": section}, context=context)
    except ValidationError as error:
        faults += [_explained(kind, fault, lines) for fault in error.errors()]
    if faults:
        raise ConfigError(f"{where} has {len(faults)} fault(s):", faults)
    return config


def overridden(overrides: Iterable[str]) -> dict[str, Any]:
    """The nested values of `key=value` overrides alone. Raises ConfigError."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return values


def trained_settings(trained: Artifact) -> dict[str, Any]:
    """The config of a trained model, with what infer reads of it checked and filled up.

    Of its postprocessing only that it is a list of sections: a user's own may take its place, so
    that it is read when it is needed.
    """
    settings = dict(trained.config)
    steps = settings["sampling"].get("postprocessing", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ArtifactError(
            f"{trained.folder / CONFIG}: sampling.postprocessing is not a list of sections."
        )
    sampled = {*SamplingConfig.model_fields} - {"postprocessing"}
    computed = {"accelerator", "precision", "num_devices", "num_nodes"}
    sections: tuple[tuple[str, type[Schema], set[str]], ...] = (
        ("sampling", SamplingConfig, sampled),
        ("compute", ComputeConfig, computed),
    )
    for section, kind, keys in sections:
        values = {key: value for key, value in settings[section].items() if key in keys}
        where = f"The section {section} of {trained.folder / CONFIG}"
        known = reading.validated(values, kind, where, ArtifactError)
        filled = known.model_dump(mode="json", include=keys)
        settings[section] = {"postprocessing": [], **settings[section], **filled}
    return settings


def json_schema() -> dict[str, Any]:
    """JSON Schema of a run's YAML, for editors; the section `model` is any known family's."""
    families = [registry.find(name) for name in registry.names()]
    schema = RunConfig.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices = []
    for family in families:
        part = family.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= part.pop("$defs", {})
        definitions[family.__name__] = part
        choices.append({"$ref": f"#/$defs/{family.__name__}"})
    definitions.pop("FamilyConfig", None)
    schema["properties"]["model"] = {"description": "The model.", "anyOf": choices}
    schema["required"] = []
    schema["title"] = "SynthCube run"
    return schema


def _old_config(where: str) -> ConfigError:
    return ConfigError(
        f"{where} is a config of GaNDLF-Synth (it has the key model_config). Translate it: "
        f"synthcube migrate {shlex.quote(where)} -o NEW.yaml"
    )


def _parsed(path: Path) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The values of a YAML file, which may be empty, and the lines that they are on."""
    text = reading.read_text(path, ConfigError, name="parameters_file (--config)")
    try:
        values, lines = reading.parse(text, str(path))
    except ConfigError:
        if _OLD_SECTION.search(text):
            raise _old_config(str(path)) from None
        raise
    return {} if values is None else values, lines


def _apply(values: dict[Any, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {override}: write it as key=value, as in --set seed=7.")
    value, _ = reading.parse(text, f"--set {override}")
    for name in names[:-1]:
        # a number is a key of data.channels, which a YAML has as a number
        inner = values.setdefault(int(name) if name.isdecimal() else name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {name} is not a section.")
        values = inner
    values[names[-1]] = value


def _explained(
    kind: type[BaseModel], fault: Any, lines: Mapping[tuple[Any, ...], int] | None
) -> str:
    place, known = _untagged(kind, fault["loc"])
    key = ".".join(str(part) for part in place) or "config"
    value = fault["input"]
    if fault["type"] == "extra_forbidden":
        hint = did_you_mean(str(place[-1]), known) or f"; known: {', '.join(known)}"
        message = f"unknown key{hint}"
    elif fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
    else:
        message = fault["msg"].replace("Input should", "should")
        shown = repr(value)
        message += f", not {shown if len(shown) < 60 else type(value).__name__}"
    return f"{key}{_line(place, lines)}: {message}"


def _line(place: tuple[Any, ...], lines: Mapping[tuple[Any, ...], int] | None) -> str:
    while lines and place:
        if place in lines:
            return f" (line {lines[place]})"
        place = place[:-1]
    return ""


def _untagged(kind: type[BaseModel], place: Iterable[Any]) -> tuple[tuple[Any, ...], list[str]]:
    """A fault's place as the YAML has it, and the keys known there.

    Pydantic puts the name of what a section holds into its place, where it holds one of several.
    """
    path: list[Any] = []
    known: list[str] = []
    inner = [kind]
    for part in place:
        matching = [model for model in inner if _default_name(model) == part]
        if len(inner) > 1 and matching:
            inner = matching
            continue
        path.append(part)
        if isinstance(part, int):
            continue
        known = [name for model in inner for name in model.model_fields]
        fields = [model.model_fields[part] for model in inner if part in model.model_fields]
        inner = _classes_in(fields[0].annotation) if fields else []
    return tuple(path), known


def _default_name(kind: type[BaseModel]) -> Any:
    field = kind.model_fields.get("name") or kind.model_fields.get("kind")
    return field.default if field else None


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [model for part in parts for model in _classes_in(part)]
