"""Evaluate: compare generated images with real ones, and write the results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthcube import __version__, compute, config, environment, reading, storage
from synthcube.config import RunConfig
from synthcube.data.manifest import Manifest, require_outside
from synthcube.errors import EvaluationError, OutputError, SynthCubeError
from synthcube.evaluation.evaluation import Evaluation
from synthcube.evaluation.held_out import TrainingImages, leave_out_trained, of_manifest, of_split
from synthcube.evaluation.report.page import require_own_report, write_report
from synthcube.evaluation.results import plain
from synthcube.evaluation.sets import ImageSet, check_comparable, comparability_notes, open_sets
from synthcube.evaluation.verdict import plain_results, verdict
from synthcube.models import artifact
from synthcube.models.artifact import Artifact
from synthcube.sharing.identities import subjects_of
from synthcube.tasks.run_folder import CONFIG, HELD_OUT, SPLIT, read_images, rows_of
from synthcube.terminal import followed

log = logging.getLogger("synthcube")

SCHEMA_VERSION = 1
MARK = "synthcube_evaluation"
"""The first key of every results file."""
_SPLITS = {"labels": HELD_OUT, "train_data": ("train",)}


def evaluate(
    predictions: Path,
    labels: Path,
    output: Path,
    *,
    config_path: Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    train_data: Path | None = None,
    report: Path | None = None,
    model_path: Path | None = None,
    known_subjects: bool = True,
) -> Path:
    """Compare the images at `predictions` with the real, held-out ones at `labels`.

    Of a manifest with splits, the test rows (or else the validation rows) are the labels, and the
    train rows the `train_data`. A run folder stands for its split.csv; without `config_path` its
    config is used. Labels that `train_data` or the run of the model has among its training images,
    by file or by subject, are left out, and so are their predictions.

    Raises EvaluationError with all reasons why the sets cannot be compared.

    Args:
        config_path: a YAML, or its content.
        overrides: keys of the config as "key=value".
        output: the YAML file to write, and to return; an existing one is replaced in one step, or
            written in place if it is a mount.
        report: folder for the HTML page and the table of cases.
        model_path: run or artifact, for the membership inference that needs the model.
        known_subjects: one SubjectID means one person in all sets. It does not where the labels
            come from another site than the training images: then only files show an overlap.
    """
    outputs = {"output_path": output, "report": report}
    inputs = {
        "predictions": predictions, "labels": labels, "train_data": train_data,
        "model_path": model_path, "config": config_path if isinstance(config_path, Path) else None,
    }  # fmt: skip
    storage.require_separate(outputs, inputs)
    set_paths = {"predictions": predictions, "labels": labels}
    set_paths |= {"train_data": train_data} if train_data else {}
    folders = [path for path in (model_path, labels, train_data) if path]
    settings = _settings(config_path, folders, overrides)
    trained = artifact.load(model_path) if model_path else None
    if trained:  # its loss shows how well it knows an image
        artifact.require_vouched(trained.folder, trained.config, with_losses=True)
    _check_outputs(output, report)
    manifests = _manifests(set_paths)
    training = _training_images(manifests, trained, labels)
    if not known_subjects:
        training = replace(training, subjects=frozenset())
    manifests, left_out = leave_out_trained(manifests, training, settings.evaluation.pairs)
    if left_out:
        log.warning("NOT HELD OUT: %s", left_out)
    for manifest in manifests.values():
        require_outside({"report": report}, manifest)
    cache = storage.make_folder(environment.cache_folder())
    with storage.scratch_folder(cache) as folder:
        sets, faults = open_sets(manifests, settings.data, folder)
        check_comparable(sets, faults)
        evaluation = Evaluation(
            sets, settings.evaluation, settings.seed, folder,
            compute.device(settings.compute.accelerator), trained, settings.data,
        )  # fmt: skip
        questions = followed(
            evaluation.sections(), evaluation.num_sections, "Comparing", "question"
        )
        sections = list(questions)
        header = _header(settings, sets, evaluation, left_out)
        gallery = evaluation.gallery() if report else None
    plain_sections = plain_results(sections)
    header["verdict"] = list(verdict(plain_sections))
    results = {**header, **plain_sections}
    if report:
        write_report(storage.make_folder(report, "report"), header, sections, gallery)
    storage.write_mounted(output, reading.dump(results))
    return output


def _settings(
    config_path: Path | Mapping[str, Any] | None, folders: list[Path], overrides: Sequence[str]
) -> RunConfig:
    """The given config, or that of the first run among the folders, or all defaults."""
    if config_path is not None:
        return config.load_any(config_path, overrides)
    for path in (folder / CONFIG for folder in folders):
        if path.is_file():
            return config.load(path, overrides, trained=True)
    return config.build({}, overrides)


def _manifests(paths: Mapping[str, Path]) -> dict[str, Manifest]:
    """The rows of each set to compare; faults of all sets are raised together."""
    manifests: dict[str, Manifest] = {}
    faults: list[str] = []
    for name, path in paths.items():
        try:
            manifests[name] = read_images(path)
            if name in _SPLITS:
                manifests[name] = rows_of(manifests[name], _SPLITS[name], name)
        except SynthCubeError as error:
            faults += [f"{name}: {text}" for text in (error.faults or (error.headline,))]
    if faults:
        raise EvaluationError("These images cannot be compared:", faults)
    return manifests


def _training_images(
    manifests: Mapping[str, Manifest], trained: Artifact | None, labels: Path
) -> TrainingImages:
    """What the model learned from, as far as its run or `train_data` tell.

    Args:
        trained: the model; if it lies in a run, the split of that counts.
        labels: as given; the split of a run counts as well.
    """
    training = TrainingImages()
    if "train_data" in manifests:
        training |= of_manifest(manifests["train_data"])
    if trained:
        training |= of_split(subjects_of(trained.folder))
    if (labels / SPLIT).is_file():
        training |= of_split(subjects_of(labels))
    return training


def _check_outputs(output: Path, report: Path | None) -> None:
    """Refuse outputs that cannot be written, before the evaluation starts."""
    if output.is_dir():
        raise OutputError(f"output_path {output} is a folder; a file is needed: results.yaml.")
    storage.require_own_file(output, f"{MARK}:", "output_path")
    if not output.exists():
        storage.make_folder(output.parent, "output_path")
    if report:
        storage.make_folder(report, "report")
        require_own_report(report)


def _header(
    settings: RunConfig, sets: Mapping[str, ImageSet], evaluation: Evaluation, left_out: str
) -> dict[str, Any]:
    """What reproduces the numbers; it names no file and no person."""
    return {
        MARK: SCHEMA_VERSION,
        "synthcube": __version__,
        "seed": settings.seed,
        "images": {name: _described(images) for name, images in sets.items()},
        "extractor": plain(evaluation.extractor.record),
        "settings": {
            "evaluation": settings.evaluation.model_dump(mode="json", exclude={"extractor"}),
            "data": plain(settings.data.preprocessing_key),
        },
        "notes": ([left_out] if left_out else []) + comparability_notes(sets, settings.data),
        "versions": environment.versions(),
    }


def _described(images: ImageSet) -> dict[str, Any]:
    return {
        "count": len(images),
        "subjects": len(set(images.subjects().tolist())),
        "shape": list(images.shape),
        "spacing_mm": plain(images.spacing_mm),
        "intensities": plain(images.bounds),
        "constant": images.constant,
        "duplicates": len(images) - images.distinct,
        "sha256": images.sha256,
    }
