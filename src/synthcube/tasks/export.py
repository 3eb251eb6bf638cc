"""`synthcube export`: a verified folder to share, with a model card."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from synthcube import config, reading, storage
from synthcube.errors import ArtifactError, ConfigError, OutputError
from synthcube.models import artifact
from synthcube.models.artifact import Artifact
from synthcube.models.family import Family, Samples
from synthcube.sharing import identities
from synthcube.sharing.card import CardContext, Task, model_card, read_results
from synthcube.sharing.config import TOKEN, ExportRequest
from synthcube.sharing.conversion import ConversionRecord, check_request, convert, converted
from synthcube.sharing.metadata import METADATA, metadata
from synthcube.sharing.runtimes import NAMES, RuntimeName, Weights, is_part, record_name
from synthcube.storage import scratch_folder
from synthcube.terminal import Progress

log = logging.getLogger("synthcube")

# Where MLCube mounts the folder of a file, whether the file is there or not.
_MOUNTED = re.compile(r"/mlcube_io\d+/.*")
_OPTIONS = {"datasets": "dataset", "version": "model_version", "runtimes": "runtime"}


def read_request(
    config_path: Path | None, options: Mapping[str, Any], overrides: Sequence[str] = ()
) -> ExportRequest:
    """The section `export` of a YAML, with options of the command line in place of its values.

    Args:
        config_path: YAML of the run, of which no other section is used; none for the defaults.
        overrides: keys of the YAML as "key=value".
        options: by field; None and empty values do not replace anything.
    """
    section = config.load_any(config_path or {}, overrides, trained=True).export
    stated = {name: value for name, value in options.items() if value not in (None, "", ())}
    if TOKEN.search(repr(stated)):
        raise ConfigError("A token is on the command line, where others see it: set HF_TOKEN.")
    if "evaluation" in stated:
        stated["evaluation"] = _present(stated["evaluation"])
    try:
        return ExportRequest.model_validate(section.model_dump(exclude_unset=True) | stated)
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            message = fault["msg"].removeprefix("Value error, ")
            field = str(fault["loc"][0]) if fault["loc"] else ""
            faults.append(f"--{_OPTIONS.get(field, field)}: {message}" if field else message)
        raise ConfigError("\n".join(faults)) from None


def _present(path: Path) -> Path | None:
    """`path`, or None for a file that MLCube always names and that does not exist."""
    if _MOUNTED.fullmatch(str(path)) and not path.exists():
        log.warning("evaluation: there is no %s, and the card shows no numbers.", path.name)
        return None
    return path


def export(model_path: Path, folder: Path, request: ExportRequest | None = None) -> Path:
    """Verify a trained model and write a folder to share, with a model card.

    Left out is what only its training needed: a discriminator, which knows most about the training
    images, and everything in the config that names a place, an account or a person.

    Raises ArtifactError if the model is damaged or its texts name people, ConfigError if `request`
    cannot be used, FamilyError if a network cannot be converted.

    Args:
        request: what the card says, and the runtimes to convert the networks for; the model stays
            converted for those that it was converted for before.
    """
    request = request or ExportRequest()
    trained = artifact.load(model_path)
    storage.require_separate(
        {"output_path": folder},
        {"model_path": model_path, "evaluation": request.evaluation, "notes": request.notes_file},
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
    subjects = [row.get("SubjectID") for row in rows if row.get("Split") == "train"]
    task = _task(family, trained)
    context = CardContext(
        license_id=request.license,
        datasets=request.datasets,
        results=read_results(request.evaluation) if request.evaluation else None,
        notes=reading.read_text(request.notes_file, ConfigError, name="--notes")
        if request.notes_file
        else request.notes,
        place=request.address or "THIS_FOLDER",
        # Of other models the picture has real images above.
        has_picture=task == "sample" and (trained.folder / artifact.PICTURE).is_file(),
        task=task,
        num_images=len(subjects),
        num_subjects=len(set(subjects)),
    )
    sentences = context.results.prose if context.results else ""
    with (
        Progress("Exporting", len(request.runtimes) + 2, "step") as bar,
        _conversions(trained, request.runtimes, request.runtime_weights, bar) as (records, files),
    ):
        context = replace(context, conversions=records)
        texts = _texts(public, context, request.version)
        prose = {**texts, artifact.CARD: f"{context.notes}\n{sentences}"}
        if faults := identities.traces(prose, rows):
            raise ArtifactError(
                "Nothing is exported, because it would tell of people or machines; rename it in "
                "the config.yaml of the run or in your notes:",
                faults,
            )
        _claim(folder)
        _write(folder, trained, family, texts, context, files)
        bar.advance()
        artifact.load(folder).build(torch.device("cpu"))
        bar.advance()
    if _preparation(public) != _preparation(trained):
        log.warning(
            "data.preprocessing names files of this machine, which stay here: others cannot "
            "prepare images for this model as you did."
        )
    return folder


@contextmanager
def _conversions(
    trained: Artifact, requested: Sequence[RuntimeName], weights: Weights, bar: Progress
) -> Iterator[tuple[list[ConversionRecord], list[Path]]]:
    """The networks converted for the requested runtimes, in a folder that is deleted afterwards.

    Conversions that the model already has stay.
    """
    for runtime in requested:
        check_request(runtime, weights)
    listed = artifact.read_index(trained.folder)
    unchanged: list[RuntimeName] = [
        runtime for runtime in NAMES if record_name(runtime) in listed and runtime not in requested
    ]
    records = [converted(trained.folder, runtime) for runtime in unchanged]
    files = [
        trained.folder / name for runtime in unchanged for name in listed if is_part(name, runtime)
    ]
    with scratch_folder() as folder:
        for runtime in requested:
            records.append(convert(trained.build(torch.device("cpu")), folder, runtime, weights))
            log.info(
                "%s, weights in %s: its images are off those of torch by %.2g of the range at "
                "most, by %.2g on average.",
                runtime, weights, records[-1].largest_difference, records[-1].mean_difference,
            )  # fmt: skip
            bar.advance()
        yield records, [*files, *sorted(folder.iterdir())]


def _texts(public: Artifact, context: CardContext, version: str) -> dict[str, str]:
    """The files that are written anew, by name."""
    about = metadata(
        public, version=version, license_id=context.license_id, results=context.results
    )
    privacy = public.privacy
    return {
        **({artifact.PRIVACY: _json(privacy.model_dump(mode="json"))} if privacy else {}),
        artifact.CONFIG: reading.dump(public.config),
        artifact.IMAGE: _json(public.image.model_dump(mode="json")),
        artifact.METRICS: _json(dict(public.metrics)),
        METADATA: _json(about),
        artifact.CARD: model_card(public, context),
    }


def _task(family: Family, trained: Artifact) -> Task:
    if trained.image.source_channels:
        return "translate"
    return "sample" if isinstance(family, Samples) else "reconstruct"


def _preparation(trained: Artifact) -> Any:
    return trained.config.get("data", {}).get("preprocessing")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _claim(folder: Path) -> None:
    storage.make_folder(folder, "output_path")
    storage.settle(folder)
    names = artifact.written_names(folder)
    if storage.contents(folder) and artifact.EXPORTED_WEIGHTS not in names:
        raise OutputError(
            f"output_path {folder} holds something that is no exported model: give another one."
        )


def _write(
    folder: Path, trained: Artifact, family: Family, texts: Mapping[str, str], context: CardContext,
    converted: Sequence[Path],
) -> None:  # fmt: skip
    with storage.replaced_folder(folder, artifact.written_names(folder)) as staging:
        names = [artifact.VERSIONS, *([artifact.PICTURE] if context.has_picture else [])]
        existing = [trained.folder / name for name in names]
        for path in [*converted, *(path for path in existing if path.is_file())]:
            storage.write_with(staging / path.name, partial(shutil.copyfile, path))
        _write_weights(staging / artifact.EXPORTED_WEIGHTS, trained, family)
        for name, text in texts.items():
            storage.write_text(staging / name, text)
        artifact.write_index(staging)


def _write_weights(path: Path, trained: Artifact, family: Family) -> None:
    """The weights that images are made with; the same bytes where that is all of them."""
    left_out = tuple(f"{name}." for name in family.unaveraged)
    weights = load_file(trained.weights)
    needed = {name: weight for name, weight in weights.items() if not name.startswith(left_out)}
    if len(needed) == len(weights):
        storage.write_with(path, partial(shutil.copyfile, trained.weights))
    else:
        storage.write_with(path, partial(save_file, needed))
        log.info("Left out: the %d weights of %s.", len(weights) - len(needed), left_out[0][:-1])
