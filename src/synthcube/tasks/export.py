"""Export: a verified, self-contained folder of a trained model, ready for a Hub."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from synthcube import artifact, reading, storage, yaml_text
from synthcube.artifact import Artifact
from synthcube.errors import ArtifactError, ConfigError, OutputError
from synthcube.export import identities
from synthcube.export.card import Story, Task, model_card
from synthcube.export.config import DATASET, LICENSE, Runtime, Weights
from synthcube.export.metadata import METADATA, metadata
from synthcube.export.scores import read_results
from synthcube.models.family import Family, Samples
from synthcube.tasks.conversions import Conversions, conversions

log = logging.getLogger("synthcube")

CARD = artifact.CARD


def export(
    model_path: Path,
    folder: Path,
    *,
    evaluation: Path | None = None,
    license_id: str = "",
    datasets: Sequence[str] = (),
    notes: Path | str | None = None,
    version: str = "1.0.0",
    place: str = "",
    for_runtimes: Sequence[Runtime] = (),
    runtime_weights: Weights = "float32",
) -> Path:
    """Verify a trained model and write what others need of it, with a model card, to `folder`.

    What was only for its training stays out: a discriminator, which knows best who was trained on,
    and everything in the config that names a place, an account or a person.

    Args:
        evaluation: results.yaml of `synthcube evaluate`, for the card's table.
        license_id: as a Hub knows it, such as apache-2.0; none is ever assumed.
        datasets: names on a Hub of what it was trained on.
        notes: Markdown of the authors, for the card: the path of a file, or the text itself.
        version: of the model.
        place: where it will be published, for the card's commands.
        for_runtimes: to convert its networks for; it keeps what it was converted for before.
        runtime_weights: how converted weights are stored.

    Raises:
        FamilyError: a network cannot be converted.
        ArtifactError: there is no trained model, it is damaged, or it is of single people.
        ConfigError: what is said about it cannot be used.
        EvaluationError: `evaluation` cannot be read.
        OutputError: `folder` is not writable, or holds something that is no exported model.
    """
    trained = artifact.load(model_path)
    storage.require_separate(
        {"output_path": folder},
        {
            "model_path": model_path,
            "evaluation": evaluation,
            "notes": notes if isinstance(notes, Path) else None,
        },
    )
    rows = identities.subjects_of(trained.folder)
    public = replace(
        trained,
        config=identities.public_config(trained.config),
        image=identities.public_image(trained.image, {row.get("SubjectID", "") for row in rows}),
        # JSON of others may hold NaN, which is a number for no reader of ours.
        metrics={name: value for name, value in trained.metrics.items() if math.isfinite(value)},
    )
    family = trained.build(torch.device("cpu"))
    num_images, num_subjects = _counts(rows)
    story = Story(
        license_id=_license(license_id),
        datasets=_datasets(datasets),
        results=read_results(evaluation) if evaluation else None,
        notes=_notes(notes),
        place=place or "THIS_FOLDER",
        has_picture=_is_made(family, trained),
        task=_task(family, trained),
        num_images=num_images,
        num_subjects=num_subjects,
    )
    said = story.results.prose if story.results else ""
    with conversions(trained, for_runtimes, runtime_weights) as converted:
        story = replace(story, conversions=converted.records)
        texts = _texts(public, story, version)
        _check_traces(texts, rows, f"{story.notes}\n{said}")
        _claim(folder)
        _write(folder, trained, family, texts, story, converted)
    artifact.load(folder).build(torch.device("cpu"))
    if _preparation(public) != _preparation(trained):
        log.warning(
            "data.preprocessing names files of this machine, which stay here: others cannot "
            "prepare images for this model as you did."
        )
    return folder


def _texts(public: Artifact, story: Story, version: str) -> dict[str, str]:
    """The files that are written anew, by name."""
    about = metadata(public, version=version, license_id=story.license_id, results=story.results)
    return {
        artifact.CONFIG: yaml_text.dump(public.config),
        artifact.IMAGE: _json(public.image.model_dump(mode="json")),
        artifact.METRICS: _json(dict(public.metrics)),
        METADATA: _json(about),
        CARD: model_card(public, story),
    }


def _license(license_id: str) -> str:
    if license_id and not LICENSE.fullmatch(license_id):
        raise ConfigError(
            f"--license {license_id!r}: give the identifier of a license as the Hub spells it, "
            "such as apache-2.0, cc-by-nc-4.0 or other."
        )
    return license_id


def _datasets(names: Sequence[str]) -> tuple[str, ...]:
    if wrong := [name for name in names if not DATASET.fullmatch(name)]:
        raise ConfigError(f"--dataset {wrong[0]!r}: give the name of a data set: owner/name.")
    return tuple(names)


def _notes(path: Path | str | None) -> str:
    if isinstance(path, str):
        return path
    return reading.read_text(path, ConfigError, name="--notes") if path else ""


def _counts(rows: Sequence[Mapping[str, str]]) -> tuple[int, int]:
    """Images and subjects that were trained on."""
    trained = [row for row in rows if row.get("Split") == "train"]
    subjects = {row.get("SubjectID") for row in trained}
    return len(trained), len(subjects)


def _task(family: Family, trained: Artifact) -> Task:
    if trained.image.source_channels:
        return "translate"
    return "sample" if isinstance(family, Samples) else "reconstruct"


def _is_made(family: Family, trained: Artifact) -> bool:
    """Whether the model's picture shows only what it made: others have real images above."""
    return _task(family, trained) == "sample" and (trained.folder / artifact.PICTURE).is_file()


def _preparation(trained: Artifact) -> Any:
    return trained.config.get("data", {}).get("preprocessing")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _check_traces(texts: Mapping[str, str], rows: Sequence[Mapping[str, str]], notes: str) -> None:
    """Refuse what would still name a place or a person.

    Raises:
        ArtifactError: what, and in which file.
    """
    prose = {CARD: notes, **{name: text for name, text in texts.items() if name != CARD}}
    if faults := identities.traces(prose, rows):
        raise ArtifactError(
            "Nothing is exported, because it would tell of people or machines; rename it in the "
            "config.yaml of the run or in your notes:",
            faults,
        )


def _claim(folder: Path) -> None:
    storage.make_folder(folder, "output_path")
    storage.settle(folder)
    names = artifact.written_names(folder)
    if storage.contents(folder) and artifact.EXPORTED_WEIGHTS not in names:
        raise OutputError(
            f"output_path {folder} holds something that is no exported model: give another one."
        )


def _write(
    folder: Path, trained: Artifact, family: Family, texts: Mapping[str, str], story: Story,
    converted: Conversions,
) -> None:  # fmt: skip
    with storage.replaced_folder(folder, artifact.written_names(folder)) as staging:
        names = [artifact.VERSIONS, *([artifact.PICTURE] if story.has_picture else [])]
        there = [trained.folder / name for name in names]
        for path in [*converted.files, *(path for path in there if path.is_file())]:
            storage.write_with(staging / path.name, partial(shutil.copyfile, path))
        _write_weights(staging / artifact.EXPORTED_WEIGHTS, trained, family)
        for name, text in texts.items():
            storage.write_text(staging / name, text)
        artifact.write_index(staging)


def _write_weights(path: Path, trained: Artifact, family: Family) -> None:
    """The weights that images are made with; the same bytes where that is all of them."""
    left_out = tuple(f"{name}." for name in family.unaveraged)
    weights = load_file(trained.weights)
    kept = {name: each for name, each in weights.items() if not name.startswith(left_out)}
    if len(kept) == len(weights):
        storage.write_with(path, partial(shutil.copyfile, trained.weights))
    else:
        storage.write_with(path, partial(save_file, kept))
        log.info("Left out: the %d weights of %s.", len(weights) - len(kept), left_out[0][:-1])
