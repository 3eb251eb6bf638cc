"""Task `evaluate`: compare predictions with the reference images of a site.

Only numbers leave the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from synthcube import reading, storage
from synthcube.data.manifest import read_manifest
from synthcube.errors import EvaluationError

_SHOWN = 5


def evaluate(
    predictions: Path,
    labels: Path,
    output_path: Path,
    *,
    parameters: Path | Mapping[str, Any] | None = None,
    additional_files: Path | None = None,
    local_outputs_path: Path | None = None,
) -> Path:
    """Write the results to `output_path`, and the report of single cases to `local_outputs_path`.

    Args:
        parameters: a parameters_file, or its content; None: the defaults.
        additional_files: folder, whose train_data holds the training images: predictions that
            copy one of them are counted.

    Raises:
        ConfigError: the parameters are not valid.
        EvaluationError: the images cannot be compared, or the results would name a file, a folder
            or a subject of the site.
        OutputError: an output cannot be written.
    """
    from synthcube.tasks.evaluate import MARK
    from synthcube.tasks.evaluate import evaluate as compare

    storage.require_separate(
        {"output_path": output_path, "local_outputs_path": local_outputs_path},
        {
            "predictions": predictions, "labels": labels, "additional_files": additional_files,
            "parameters_file": parameters if isinstance(parameters, Path) else None,
        },
    )  # fmt: skip
    storage.require_own_file(output_path, f"{MARK}:", "output_path")
    train_data = additional_files / "train_data" if additional_files else None
    if local_outputs_path:
        storage.make_folder(local_outputs_path, "local_outputs_path")
    with storage.scratch_folder() as folder:
        results = folder / "results.yaml"
        compare(
            predictions, labels, results,
            config_path=parameters,
            train_data=train_data if train_data and train_data.exists() else None,
            report=local_outputs_path / "report" if local_outputs_path else None,
            known_subjects=False,
        )  # fmt: skip
        text = results.read_text(encoding="utf-8")
        check_anonymous(reading.read_yaml(results, EvaluationError), [predictions, labels])
    storage.write_mounted(output_path, text)
    return output_path


def check_anonymous(results: Any, folders: list[Path]) -> None:
    """Raise EvaluationError where `results` name a folder, or a file or subject of its manifest."""
    words = {str(folder.absolute()) for folder in folders}
    for folder in folders:
        for row in read_manifest(folder).rows:
            words |= {row.subject, *(path.name for path in row.channels)}
    # Numbers and single letters are not checked: counts and classes look the same.
    words = {word for word in words if len(word) > 1 and not word.isdigit()}
    texts = list(_texts(results))
    joined = "\n".join(texts)  # one fast search, before the exact one in every text
    named = sorted(
        word
        for word in words
        if word in joined
        and any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for text in texts)
    )
    if named:
        raise EvaluationError(
            "The results are not written, because they would be uploaded and name files, folders "
            f"or subjects of this site: {', '.join(named[:_SHOWN])}. If the name of a subject is "
            "a word of the results by chance, rename the subject."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value
