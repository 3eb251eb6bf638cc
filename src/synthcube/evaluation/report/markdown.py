"""The evaluation for a model card. What leaves the site with it: no path, file name or subject."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from synthcube.evaluation.report.tables import said
from synthcube.evaluation.report.words import (
    FLOOR,
    clean,
    count_of,
    number_of,
    remark_on,
    spoken,
    value_of,
)
from synthcube.evaluation.results import Section, plain

_SHOWN = ("extractor", "counts", "preprocessing", "seed", "versions")
"""Keys of the header that may leave the site."""
_COPIES = ("memorisation", "membership")
"""Sections whose notes belong beside their numbers wherever these are shown."""
_LEFT_OUT = "[left out]"
_PATH = re.compile(
    r"[^\s\"'`(),;:=]*[/\\][^\s\"'`(),;=]*"
    r"|[^\s\"'`(),;:=/\\]+\.(?:nii(?:\.gz)?|mha|nrrd|dcm|png|jpe?g|tiff?|csv|npy|ya?ml|pth?"
    r"|safetensors)\b",
    re.IGNORECASE,
)
_AGAIN = """synthcube evaluate --predictions PREDICTIONS --labels LABELS \\
  --train-data TRAIN_DATA -c CONFIG.yaml -o results.yaml --report REPORT"""


def markdown(header: dict[str, Any], sections: Sequence[Section]) -> str:
    """A section of a model card: measures beside floors, the extractor, copies, the command.

    Paths, file names and what names a case are left out of every text.
    """
    names = _case_names(sections)
    rows = [
        "| " + " | ".join(_cell(each, names) for each in row) + " |"
        for section in sections
        for row in _measures(section)
    ]
    copies = [
        f"- {_escaped(_without_names(note, names))}"
        for each in sections
        if each.name in _COPIES
        for note in each.notes
    ]
    told = [f"- {_cell(text, names)}" for text in _header(plain(header))]
    table = ["| Measure | Value (95% interval) | Floor | Count | Remark |"]
    table += ["| --- | --- | --- | --- | --- |", *rows]
    parts = ["## Evaluation", "\n".join(table), FLOOR]
    parts += ["### Copies of training images", "\n".join(copies)] if copies else []
    parts += ["### How it was evaluated", "\n".join(told)] if told else []
    parts.append(f"```sh\n{_AGAIN}\n```")
    return "\n\n".join(parts) + "\n"


def _measures(section: Section) -> Iterator[tuple[str, ...]]:
    for name, each in section.measures.items():
        floor = number_of(each.plain(), "floor")
        title = f"{spoken(section.name)}: {spoken(name)}"
        yield title, value_of(each), floor, count_of(each), remark_on(each)


def _header(header: dict[str, Any]) -> Iterator[str]:
    for name in _SHOWN:
        value = header.get(name)
        if isinstance(value, dict):
            pairs = ", ".join(f"{key} {said(each, exact=True)}" for key, each in value.items())
            yield f"{spoken(name)}: {pairs}"
        elif value is not None:
            yield f"{spoken(name)}: {said(value, exact=True)}"


def _case_names(sections: Sequence[Section]) -> frozenset[str]:
    """Texts that name a case; a single word or number of a few letters is no name by itself."""
    texts = (each for section in sections for row in section.cases for each in row.values())
    return frozenset(
        each for each in texts
        if isinstance(each, str) and len(each) > 3 and re.search(r"[\d_./\\ -]", each)
    )  # fmt: skip


def _without_names(text: str, names: frozenset[str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        if name in text:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", _LEFT_OUT, text)
    return _PATH.sub(_LEFT_OUT, text)


def _cell(text: str, names: frozenset[str]) -> str:
    return _escaped(_without_names(text, names))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", clean(text)) if text else ""
