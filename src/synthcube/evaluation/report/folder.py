"""The report's files, each written in one step."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synthcube.errors import OutputError
from synthcube.escapes import spreadsheet
from synthcube.evaluation.report.markdown import HEADING, markdown
from synthcube.evaluation.report.page import TITLE, page
from synthcube.evaluation.report.words import clean
from synthcube.evaluation.results import Section, plain
from synthcube.storage import explained, make_folder, write_text

PAGE, MARKDOWN, CASES = "report.html", "report.md", "cases.csv"
SECTION = "section"  # the first column of the cases
_HEADS = {PAGE: f"<title>{TITLE}</title>", MARKDOWN: HEADING, CASES: f"{SECTION},"}
"""What stands near the beginning of each."""
_HEAD_BYTES = 2000


def require_own_report(folder: Path) -> None:
    """Refuse a folder with files of these names that no evaluation has written.

    Raises:
        OutputError: which files.
    """
    faults = [
        name
        for name, text in _HEADS.items()
        if (folder / name).is_file() and text.encode() not in _head(folder / name)
    ]
    if faults:
        raise OutputError(
            f"report {folder} holds files that this command did not write: give another one.",
            faults,
        )


def _head(path: Path) -> bytes:
    with explained(path), path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def write_report(folder: Path, header: dict[str, Any], sections: Sequence[Section]) -> None:
    """Write report.html, report.md and, where a section has cases, cases.csv into `folder`.

    The folder may exist and may be a mount: other files in it stay. The same arguments give the
    same bytes.

    Args:
        header: plain values with which the evaluation can be done again, and `notes` on the
            images. Of these the Markdown shows `synthcube`, `extractor`, `images`, `settings`,
            `seed`, `versions` and the notes, without paths.

    Raises:
        OutputError: the folder cannot be written.
    """
    texts = {PAGE: page(header, sections), MARKDOWN: markdown(header, sections)}
    cases = _cases(sections)
    make_folder(folder)
    if cases:
        write_text(folder / CASES, cases)
    else:  # those of an earlier report would be taken for this one's
        with explained(folder / CASES):
            (folder / CASES).unlink(missing_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)


def _cases(sections: Sequence[Section]) -> str:
    """CSV: the section's name, then every column that any section has; empty where none."""
    columns = list(dict.fromkeys(key for each in sections for row in each.cases for key in row))
    if not columns:
        return ""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow([SECTION, *(spreadsheet(clean(name)) for name in columns)])
    for section in sections:
        for row in section.cases:
            table.writerow([_cell(section.name), *(_cell(row.get(key)) for key in columns)])
    return out.getvalue()


def _cell(value: object) -> object:
    told = plain(value)
    return spreadsheet(clean(told)) if isinstance(told, str) else told
