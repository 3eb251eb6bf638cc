"""The evaluation for a model card. What leaves the site with it: no path, file name or subject."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from synthcube.evaluation.report.tables import flat, said
from synthcube.evaluation.report.words import (
    FLOOR,
    clean,
    count_of,
    floor_note,
    notes_of,
    number_of,
    remark_on,
    spoken,
    value_of,
)
from synthcube.evaluation.results import Section, plain

_SHOWN = ("synthcube", "extractor", "images", "settings", "seed", "versions")
"""Keys of the header that may leave the site."""
_COPIES = ("memorisation", "membership")
"""Sections whose notes belong beside their numbers wherever these are shown."""
_LEFT_OUT = "[left out]"
_PATH = re.compile(
    r"[^\s\d(]/|/[^\s\d)]|\\"
    r"|\.(?:nii|gz|mha|mhd|nrrd|dcm|png|jpe?g|tiff?|csv|npy|npz|ya?ml|pth?|safetensors)\b",
    re.IGNORECASE,
)
_NAMING = re.compile(r"subject|patient|case|file|path|image|name|predict|nearest|pair|\bid$", re.I)
"""Columns of cases that say whose they are."""
HEADING = "## Evaluation"
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
        f"- {_cell(note, names)}"
        for each in sections
        if each.name in _COPIES
        for note in each.notes
    ]
    floors = [f"{spoken(each.name)}: {floor_note(each)}" for each in sections if floor_note(each)]
    about = [_cell(each, names) for each in [FLOOR, *floors, *notes_of(header)]]
    table = ["| Measure | Value (95% interval) | Floor | Count | Remark |"]
    table += ["| --- | --- | --- | --- | --- |", *rows]
    parts = [HEADING, "\n".join(table), *about]
    parts += ["### Copies of training images", "\n".join(copies)] if copies else []
    told = list(_header(plain(header), names))
    table = ["| Setting | Value |", "| --- | --- |", *told]
    parts += ["### How it was evaluated", "\n".join(table)] if told else []
    parts.append(f"```sh\n{_AGAIN}\n```")
    return "\n\n".join(parts) + "\n"


def _measures(section: Section) -> Iterator[tuple[str, ...]]:
    for name, each in section.measures.items():
        floor = number_of(each.plain(), "floor")
        title = f"{spoken(section.name)}: {spoken(name)}"
        yield title, value_of(each), floor, count_of(each), remark_on(each)


def _header(header: dict[str, Any], names: frozenset[str]) -> Iterator[str]:
    for key, value in flat({name: header[name] for name in _SHOWN if name in header}).items():
        yield f"| {_cell(key, names)} | {_cell(said(value, exact=True), names)} |"


def _case_names(sections: Sequence[Section]) -> frozenset[str]:
    """Texts that name a case. A short number is none by itself: counts would be left out."""
    found = (
        str(each)
        for section in sections
        for row in section.cases
        for key, each in row.items()
        if isinstance(each, str) and (_NAMING.search(key) or re.search(r"[\d_./\\-]", each))
    )
    return frozenset(each for each in found if len(each) > (4 if each.isdecimal() else 1))


def _without_names(text: str, names: frozenset[str]) -> str:
    """A text that holds a path is left out whole: folders with spaces have no clear end."""
    for name in sorted((each for each in names if each in text), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", _LEFT_OUT, text)
    return "[left out, as it names files: see report.html]" if _PATH.search(text) else text


def _cell(text: str, names: frozenset[str]) -> str:
    """Without names, and so that Markdown takes nothing in it for its own."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", clean(_without_names(text, names)))
