"""The folder of a trained model: writing, verifying and loading it; and its address on a Hub.

A folder holds weights, settings, the description of its images, metrics and versions, and an index
with the SHA-256 of each file. An address is hf://owner/name, or hf://owner/name@revision.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from synthcube import __version__, environment, plugins, reading, storage
from synthcube.errors import ArtifactError, HubError
from synthcube.models import registry
from synthcube.models.family import Family, FamilyConfig
from synthcube.plugins import TRAINED, is_own
from synthcube.schema import MAX_SEED, ImageSpec, PrivacyStatement, Schema
from synthcube.storage import recovered_folder, replaced_folder, sha256, write_json

SCHEMA_VERSION = 1
_STAGES = 4
"""How many nested first stages are checked at once; deeper ones are checked when built."""
INDEX = "artifact.json"
WEIGHTS, CONFIG, IMAGE, METRICS, VERSIONS = (
    "weights.safetensors", "config.yaml", "image.json", "metrics.json", "versions.json",
)  # fmt: skip
PICTURE = "samples.png"
EXPORTED_WEIGHTS = "model.safetensors"
"""Name of the weights in an exported folder: where a Hub looks for them."""
CARD = "README.md"
"""A model card may be edited where the model is published: no hash of it is kept."""

# What building a network raises where the config does not describe one.
_UNBUILDABLE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError),
    *(TypeError, ValueError, ValidationError, SafetensorError, OSError),
)
PRIVACY = "privacy.json"
"""What a differentially private training promises."""
_NAME = re.compile(r"\w[\w.+-]{0,199}", re.ASCII)
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Artifact:
    """A verified artifact folder."""

    folder: Path
    config: Mapping[str, Any]
    image: ImageSpec
    metrics: Mapping[str, float]
    sha256: str  # of the index, which holds the hash of every file
    weights: Path
    privacy: PrivacyStatement | None = None

    def build(self, device: torch.device) -> Family:
        """The trained model on `device`, in evaluation mode.

        Raises ArtifactError where the weights do not fit the config, or are not finite; FamilyError
        where the family is not installed.
        """
        kind = registry.find(self.config["model"]["name"])
        try:
            config = kind.model_validate(dict(self.config["model"]), context=TRAINED)
            faults = config.faults(self.image.encoded) or list(self._misfits(config))
            if faults:
                raise ArtifactError(f"The weights in {self.folder} do not fit its config:", faults)
            family = config.build(self.image.encoded)
            weights = load_file(self.weights)
            _leave_out(family, weights)
            family.load_state_dict(weights, strict=True)
        except ValidationError as error:
            raise ArtifactError(
                f"The model in {self.folder / CONFIG} cannot be built:", reading.faults_of(error)
            ) from error
        except _UNBUILDABLE as error:
            raise ArtifactError(
                f"The weights in {self.folder} do not fit its config: "
                f"{type(error).__name__}: {error}"
            ) from error
        sums = {name: tensor.sum(dtype=torch.float64) for name, tensor in weights.items()}
        if broken := [name for name, total in sums.items() if not total.isfinite()]:
            raise ArtifactError(
                f"The weights in {self.folder} are damaged: {broken[0]} holds numbers that are not "
                f"finite, as do {len(broken) - 1} others. Train or get the model again."
            )
        return family.eval().requires_grad_(False).to(device)

    def _misfits(self, config: FamilyConfig) -> Iterator[str]:
        """Differences of names, shapes and types between the header of the weights' file and a
        model on the meta device, before any memory is taken."""
        try:
            with torch.device("meta"):
                family = config.build(self.image.encoded)
        except _UNBUILDABLE:
            return  # building it for real tells whether that is a fault
        with safe_open(self.weights, "pt") as file:
            stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        _leave_out(family, stored)
        expected = family.state_dict()
        for name in sorted({*stored, *expected}):
            here = list(stored[name].get_shape()) if name in stored else "absent"
            there = list(expected[name].shape) if name in expected else "absent"
            if here != there:
                yield f"{name}: {here} in {self.weights.name}, {there} in the model"
            elif (stored[name].get_dtype() in _FLOATS) != expected[name].is_floating_point():
                yield f"{name}: {stored[name].get_dtype()} in {self.weights.name}"


def load(path: Path | str) -> Artifact:
    """The artifact of a run or artifact folder, after a check of every byte.

    Raises ArtifactError where it is missing, incomplete, changed, or of a newer schema.
    """
    folder = find(path)
    listed = read_index(folder)
    if faults := damaged(folder, listed).values():
        raise ArtifactError(
            f"The artifact {folder} is damaged: get it again, or export anew.", faults
        )
    config = reading.read_yaml(folder / CONFIG, ArtifactError)
    reading.validated(config, _TrainedConfig, folder / CONFIG, ArtifactError)
    require_vouched(folder, config)
    values = reading.read_object(folder / IMAGE, ArtifactError)
    image = reading.validated(values, ImageSpec, folder / IMAGE, ArtifactError)
    metrics = reading.read_object(folder / METRICS, ArtifactError)
    if wrong := [name for name, value in metrics.items() if type(value) not in (int, float)]:
        raise ArtifactError(f"{folder / METRICS} is damaged: {wrong[0]} is not a number.")
    weights = folder / (EXPORTED_WEIGHTS if EXPORTED_WEIGHTS in listed else WEIGHTS)
    privacy = None
    if PRIVACY in listed:
        values = reading.read_object(folder / PRIVACY, ArtifactError)
        privacy = reading.validated(values, PrivacyStatement, folder / PRIVACY, ArtifactError)
    return Artifact(folder, config, image, metrics, sha256(folder / INDEX), weights, privacy)


def find(path: Path | str) -> Path:
    """The artifact folder of a run, of an artifact folder itself, or of a downloaded Hub commit.

    Raises ArtifactError where there is none.
    """
    if address := parse(path):
        # A branch may have moved since: what is here may not be what it holds now.
        if address.is_pinned and (folder := address.folder(INDEX)):
            return folder
        raise ArtifactError(f"{address}: this commit of it is not on this disk.")
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"model_path {path}: there is no such folder.")
    for folder in (recovered_folder(path), recovered_folder(path / "artifact")):
        if (folder / INDEX).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise ArtifactError(
            f"model_path {path}: this run has not finished training; run the same "
            "synthcube train command again to continue it."
        )
    raise ArtifactError(
        f"model_path {path}: no trained model is here; give the run folder of synthcube train, "
        f"or a folder with {INDEX}."
    )


def save(
    folder: Path, *,
    config: Mapping[str, Any], image: ImageSpec, weights: Mapping[str, torch.Tensor],
    metrics: Mapping[str, float], picture: Path | None = None, checkpoint: str = "",
    privacy: PrivacyStatement | None = None,
) -> None:  # fmt: skip
    """Write an artifact folder in one step, in place of an older one; `checkpoint` is the
    fingerprint of the one that holds the weights."""
    with replaced_folder(folder, written_names(folder)) as staging:
        tensors = {name: value.contiguous() for name, value in weights.items()}
        storage.write_with(staging / WEIGHTS, partial(save_file, tensors))
        storage.write_text(staging / CONFIG, reading.dump(config))
        write_json(staging / IMAGE, image.model_dump(mode="json"))
        finite = {name: value for name, value in metrics.items() if abs(value) < float("inf")}
        write_json(staging / METRICS, finite)
        write_json(staging / VERSIONS, environment.versions())
        if privacy:
            write_json(staging / PRIVACY, privacy.model_dump(mode="json"))
        if picture and picture.exists():
            shutil.copyfile(picture, staging / PICTURE)
        write_index(staging, checkpoint=checkpoint)


def read_index(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an artifact folder by name, from its index.

    Raises ArtifactError where the index is unreadable, of a newer schema, incomplete, or lists a
    path outside of the folder.
    """
    values = reading.read_object(folder / INDEX, ArtifactError)
    index = reading.validated(values, _Index, folder / INDEX, ArtifactError)
    if index.schema_version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder} is of artifact schema {index.schema_version}, this SynthCube {__version__} "
            f"reads up to {SCHEMA_VERSION}: it was written by {index.synthcube}; upgrade."
        )
    listed = index.files
    weights = EXPORTED_WEIGHTS if EXPORTED_WEIGHTS in listed else WEIGHTS
    missing = {weights, CONFIG, IMAGE, METRICS} - set(listed)
    faults = [f"{name} is not listed" for name in sorted(missing)]
    faults += [f"{name} is not a name of a file" for name in listed if not _NAME.fullmatch(name)]
    if faults:
        raise ArtifactError(f"{folder / INDEX} is damaged: get it again, or export anew.", faults)
    return listed


def damaged(folder: Path, listed: Mapping[str, str], done: str = "written") -> dict[str, str]:
    """A sentence for each missing or changed file of a folder, by name."""
    faults = {}
    for name, digest in listed.items():
        if not (folder / name).is_file():
            faults[name] = f"{name} is missing"
        elif sha256(folder / name) != digest:
            faults[name] = f"{name} has changed since it was {done} (SHA-256 differs)"
    return faults


def written_names(folder: Path) -> list[str]:
    """Names of the files that SynthCube wrote into a folder."""
    if not (folder / INDEX).is_file():
        return []
    try:
        return [INDEX, *read_index(folder)]
    except ArtifactError:  # damaged: its files are overwritten one by one
        return [INDEX]


def write_index(folder: Path, names: Iterable[str] | None = None, *, checkpoint: str = "") -> None:
    """List the files of an artifact folder, or those of `names`, with their hashes.

    `checkpoint` is the fingerprint of the one that holds the weights, in a run.
    """
    paths = folder.iterdir() if names is None else (folder / name for name in names)
    files = sorted(path for path in paths if path.is_file())
    hashed = [path for path in files if path.name[0] != "." and path.name not in (INDEX, CARD)]
    index = {
        "schema_version": SCHEMA_VERSION,
        "synthcube": __version__,
        "files": {path.name: sha256(path) for path in hashed},
        **({"checkpoint": checkpoint} if checkpoint else {}),
    }
    write_json(folder / INDEX, index)


def require_vouched(folder: Path, config: Any, *, with_losses: bool = False) -> None:
    """Refuse a trained model that needs code of others which the user does not trust.

    Raises ArtifactError, which names all of that code (with that of the training's losses if they
    are needed, too) and the options that allow it.
    """
    names = [(key, str(name)) for key, name in _named(config, with_losses) if is_own(str(name))]
    if faults := [f"{key}: {text}" for key, name in names if (text := plugins.refusal(name))]:
        raise ArtifactError(f"The model {folder} needs code of others:", faults)


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """``tensors:`` and the SHA-256 of names, types, shapes and values, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(head.encode() + b"\n")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"tensors:{digest.hexdigest()}"


# A path drops one of the slashes; a dot or a dash may neither be first, nor last, nor twice.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[^@]*)(@(?P<revision>.*))?")
_PART = r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*"
_REPO = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[\w][\w./-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST = 96


@dataclass(frozen=True, slots=True)
class Address:
    """A model on a Hub, at some revision of it."""

    repo: str  # owner/name
    revision: str = ""  # branch, tag or commit; empty for the branch main

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return bool(_COMMIT.fullmatch(self.revision))

    def at(self, commit: str) -> Address:
        """The same model at another revision."""
        return replace(self, revision=commit)

    def folder(self, index: str) -> Path | None:
        """The local folder of an earlier download that holds the file `index`; else None."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, index, revision=self.revision or None)
        return Path(path).parent if isinstance(path, str) else None


def parse(text: Path | str) -> Address | None:
    """The address of a model on a Hub; None where `text` is a local path.

    Raises HubError where the text begins with hf:/ and is no valid address.
    """
    match = _ADDRESS.fullmatch(str(text))
    if not match:
        return None
    repo, revision = repo_id(match["repo"].rstrip("/")), match["revision"]
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise HubError(
            f"{text}: {revision!r} is no revision; after @ goes a branch, a tag or a commit, as in "
            f"hf://{repo}@v1.0.0."
        )
    return Address(repo, revision or "")


def repo_id(text: str) -> str:
    """`text`, after a check that it is a valid name of a repository; HubError if it is not."""
    if not _REPO.fullmatch(text) or len(text) > _LONGEST or text.endswith(".git"):
        raise HubError(
            f"{text!r} is no name of a model on a Hub: it is owner/name, of letters, digits and "
            f"single _ . - inside, {_LONGEST} characters at most."
        )
    return text


class _ModelSection(Schema):
    """The name of the family; the family validates the rest."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="Family of the model.")


class _TrainedConfig(Schema):
    """The sections of a trained model's config; their content is validated where it is used."""

    model_config = ConfigDict(extra="allow")

    seed: int = Field(ge=0, le=MAX_SEED, description="Seed of the training.")
    model: _ModelSection = Field(description="The model.")
    data: dict[str, Any] = Field(description="How images were prepared.")
    training: dict[str, Any] = Field(default={}, description="How it was trained.")
    sampling: dict[str, Any] = Field(description="What infer makes.")
    compute: dict[str, Any] = Field(description="Where to compute.")


class _Index(Schema):
    """artifact.json."""

    model_config = ConfigDict(extra="ignore")

    schema_version: int = Field(ge=1, le=10_000, description="Of the folder's layout.")
    synthcube: str = Field(default="", description="Version that wrote it.")
    files: dict[str, str] = Field(description="SHA-256 of each file.")


def _named(config: Any, with_losses: bool) -> Iterator[tuple[str, Any]]:
    """Every name of a class in the config of a model, with its key."""
    key, section = "model", _part(config, "model")
    for _ in range(_STAGES):
        yield f"{key}.name", _part(section, "name")
        key, section = f"{key}.first_stage_config", _part(section, "first_stage_config")
    lists = {
        "data.preprocessing": _part(_part(config, "data"), "preprocessing"),
        "sampling.postprocessing": _part(_part(config, "sampling"), "postprocessing"),
    }
    if with_losses:
        lists["model.losses"] = _part(_part(config, "model"), "losses")
    for key, steps in lists.items():
        for index, step in enumerate(steps if isinstance(steps, list) else ()):
            yield f"{key}.{index}.name", _part(step, "name")


def _part(section: Any, name: str) -> Any:
    """The value of a key; None where the section is no mapping, as in a forged file."""
    return section.get(name) if isinstance(section, Mapping) else None


def _leave_out(family: Family, weights: Mapping[str, Any]) -> None:
    """Remove the networks that only train, if an export has left out their weights."""
    for name in family.unaveraged:
        if not any(key.startswith(f"{name}.") for key in weights):
            setattr(family, name, None)
