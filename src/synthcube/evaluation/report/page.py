"""The report's files: one HTML page that works offline and runs nothing, and a table of cases.

The page is the Jinja2 template page.html.j2, which escapes every text. This module has what the
template shows: tables and pictures.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from synthcube.errors import OutputError
from synthcube.escapes import printable, spreadsheet
from synthcube.evaluation.arrays import Array
from synthcube.evaluation.report import plots, text
from synthcube.evaluation.report.text import NONE, cell_text, spoken
from synthcube.evaluation.results import Picture, Section, plain
from synthcube.evaluation.verdict import plain_results, verdict
from synthcube.schema import flattened
from synthcube.storage import make_folder, storage_errors, write_text

PAGE, CASES = "report.html", "cases.csv"
_HEADS = {PAGE: "<title>SynthCube evaluation</title>", CASES: "section,"}
"""Text near the beginning of each file, by which an earlier report is recognized."""
_HEAD_BYTES = 2000
MAX_CASES = 200
_SMALLEST, _LARGEST = 96, 256  # width of an image in the page, in CSS pixels
_ABOVE = ("notes", "verdict")  # keys of the header that stand at the top of the page
_FEW_COLUMNS = 4  # rows of so many images stand side by side


def require_own_report(folder: Path) -> None:
    """Refuse a folder with files of these names that no evaluation has written.

    Raises:
        OutputError: which files.
    """
    faults = []
    for name, head in _HEADS.items():
        if (path := folder / name).is_file():
            with storage_errors(path), path.open("rb") as file:
                faults += [] if head.encode() in file.read(_HEAD_BYTES) else [name]
    if faults:
        raise OutputError(
            f"report {folder} holds files that this command did not write: give another one.",
            faults,
        )


def write_report(
    folder: Path, header: dict[str, Any], sections: Sequence[Section],
    gallery: Picture | None = None,
) -> None:  # fmt: skip
    """Write report.html and, where a section has cases, cases.csv into `folder`.

    The folder may exist and may be a mount: other files in it stay. The same arguments give the
    same bytes.

    Args:
        header: plain values with which the evaluation can be repeated, and `notes` on the images.
        gallery: generated images beside real ones, above the summary.

    Raises:
        OutputError: the folder cannot be written.
    """
    page, cases = render_page(header, sections, gallery), _cases_csv(sections)
    make_folder(folder)
    if cases:
        write_text(folder / CASES, cases)
    else:  # those of an earlier report would be taken for this one's
        with storage_errors(folder / CASES):
            (folder / CASES).unlink(missing_ok=True)
    write_text(folder / PAGE, page)


def render_page(
    header: dict[str, Any], sections: Sequence[Section], gallery: Picture | None = None
) -> str:
    """The whole page, the same for the same arguments."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )  # fmt: skip
    environment.filters |= {
        "spoken": spoken, "number": text.number, "value_text": text.value_text,
        "remark": text.remark, "measure_label": text.measure_label, "better": text.better,
        "section_title": text.section_title,
        "cell_text": cell_text, "plot": plots.figure,
        "picture_rows": picture_rows, "fact_groups": fact_groups, "case_table": case_table,
    }  # fmt: skip
    return environment.get_template("page.html.j2").render(
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        sections=sections,
        verdict=verdict(plain_results(sections)) if sections else (),
        gallery=gallery,
        notes=[str(note) for note in header.get("notes") or ()],
        header={name: value for name, value in header.items() if name not in _ABOVE},
        NONE=NONE,
        few_columns=_FEW_COLUMNS,
    )


def _cases_csv(sections: Sequence[Section]) -> str:
    """CSV: the section's name, then every column that any section has; empty where none."""
    columns = _columns([row for section in sections for row in section.cases])
    if not columns:
        return ""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["section", *(spreadsheet(printable(column)) for column in columns)])
    for section in sections:
        for row in section.cases:
            cells = [plain(row.get(column)) for column in columns]
            table.writerow(
                spreadsheet(printable(cell)) if isinstance(cell, str) else cell
                for cell in (section.name, *cells)
            )
    return out.getvalue()


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def case_table(section: Section) -> dict[str, Any]:
    """The first MAX_CASES rows as texts, and a title that says how many there are."""
    columns = _columns(section.cases)
    total = f"{len(section.cases):,}"
    if len(section.cases) > MAX_CASES:
        total = f"the first {MAX_CASES} of {total}"
    rows = (plain(row) for row in section.cases[:MAX_CASES])
    return {
        "title": f"Cases: {total}", "columns": columns,
        "rows": [[cell_text(row.get(column)) for column in columns] for row in rows],
    }  # fmt: skip


def fact_groups(values: Mapping[str, Any], *, exact: bool) -> list[tuple[str, list[list[str]]]]:
    """Plain values as [name, text]; a mapping among them is a group of its own, with its title.

    Args:
        exact: names and numbers as they stand in a config, not as people read them.
    """

    title = str if exact else spoken
    values = plain(dict(values))
    single = [
        [title(name), cell_text(value, exact=exact)]
        for name, value in values.items()
        if not isinstance(value, dict)
    ]
    groups = [("", single)]
    for name, group in values.items():
        if isinstance(group, dict):
            texts = [[key, cell_text(value, exact=True)] for key, value in flattened(group).items()]
            groups.append((title(name), texts))
    return groups


def picture_rows(picture: Picture) -> list[dict[str, Any]]:
    """The rows of images, each with its title and, for each image, its caption and size.

    Each image is in the page with all its pixels, 8 bits of [0, 1]; what is not a number is black.
    The browser enlarges small ones by a whole factor.
    """
    rows = []
    for place, images in enumerate(picture.rows):
        title = picture.row_titles[place] if place < len(picture.row_titles) else ""
        captions = picture.captions[place] if place < len(picture.captions) else []
        cells = []
        for j, image in enumerate(images):
            uri = png_uri(image)
            caption = captions[j] if j < len(captions) else ""
            alt = f"{title or f'Row {place + 1}'}, image {j + 1} of {len(images)}"
            height, width = image.shape[:2]
            factor = max(1, math.ceil(_SMALLEST / width))
            scale = factor if factor * width <= _LARGEST else _LARGEST / width
            cells.append({
                "uri": uri, "caption": caption, "alt": f"{alt}: {caption}" if caption else alt,
                "width": round(scale * width), "height": max(1, round(scale * height)),
                "whole": scale >= 1,
            })  # fmt: skip
        rows.append({"title": title, "cells": cells})
    return rows


def png_uri(image: Array) -> str:
    """(H, W) or (H, W, 3) in [0, 1] as a data URI of its 8-bit PNG, pixel for pixel."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or not image.size:
        raise ValueError(f"a picture of shape {image.shape}; (H, W) or (H, W, 3) is needed")
    pixels = np.rint(255 * np.nan_to_num(image, nan=0.0).clip(0, 1)).astype(np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
