"""Evaluate: predictions against a site's reference images; only numbers leave the site."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthcube import reading, storage
from synthcube.data.manifest import read_manifest
from synthcube.errors import EvaluationError

TRAIN_DATA = "train_data"
_SHOWN = 5


def evaluate(
    predictions: Path,
    labels: Path,
    output_path: Path,
    *,
    parameters_file: Path | None = None,
    additional_files: Path | None = None,
    local_outputs_path: Path | None = None,
) -> Path:
    """Write results.yaml, and what tells of single cases to local_outputs_path.

    Args:
        additional_files: folder; its train_data are the training images, against which copies
            are looked for.

    Raises:
        ConfigError: the parameters are not valid.
        EvaluationError: the images cannot be compared, or the results would name a file, a folder
            or a subject of the site.
        OutputError: an output cannot be written.
    """
    from synthcube.tasks.evaluate import MARK
    from synthcube.tasks.evaluate import evaluate as judge

    storage.require_separate(
        {"output_path": output_path, "local_outputs_path": local_outputs_path},
        {
            "predictions": predictions, "labels": labels, "parameters_file": parameters_file,
            "additional_files": additional_files,
        },
    )  # fmt: skip
    storage.require_own_file(output_path, f"{MARK}:", "output_path")
    train_data = additional_files / TRAIN_DATA if additional_files else None
    if local_outputs_path:
        storage.make_folder(local_outputs_path, "local_outputs_path")
    with storage.scratch_folder() as folder:
        results = folder / "results.yaml"
        judge(
            predictions, labels, results,
            config_path=parameters_file,
            train_data=train_data if train_data and train_data.exists() else None,
            report=local_outputs_path / "report" if local_outputs_path else None,
        )  # fmt: skip
        text = results.read_text(encoding="utf-8")
        check_anonymous(reading.read_yaml(results, EvaluationError), [predictions, labels])
    storage.write_mounted(output_path, text)
    return output_path


def check_anonymous(results: Any, folders: list[Path]) -> None:
    """Refuse results that name what is at the site alone.

    Raises:
        EvaluationError: they name a folder, a file or a subject of one of the manifests.
    """
    words = {str(folder.absolute()) for folder in folders}
    for folder in folders:
        for row in read_manifest(folder).rows:
            words |= {row.subject, *(path.name for path in row.channels)}
    # A bare number or a single letter is no name: counts and classes would be taken for it.
    words = {word for word in words if len(word) > 1 and not word.isdigit()}
    texts = list(_texts(results))
    said = "\n".join(texts)
    named = sorted(
        word
        for word in words
        if word in said
        and any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for text in texts)
    )
    if named:
        raise EvaluationError(
            "The results would be uploaded, and are not written, because they name files, folders "
            f"or subjects of this site: {', '.join(named[:_SHOWN])}. Where a subject's name is a "
            "word of the results by chance, give it another one."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield str(name)
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value
