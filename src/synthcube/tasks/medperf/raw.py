"""What a site brings: images to prepare, and reference images or a table of conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from synthcube.data.conditions import cell
from synthcube.data.manifest import FILE_NAME, Manifest, Row, image_suffix, read_manifest
from synthcube.data.table import KNOWN_COLUMNS, read_table
from synthcube.errors import ManifestError, SynthCubeError

SUBJECT = "SubjectID"
Cells = dict[str, str]


@dataclass(frozen=True, slots=True)
class Raw:
    """The images of one side, and the cells of each one's row but for its files."""

    manifest: Manifest
    cells: tuple[Cells, ...]


def read_raw(
    data_path: Path, labels_path: Path, kinds: Mapping[str, str]
) -> tuple[dict[str, Raw], list[str]]:
    """Both sides, `data` and `labels`.

    Labels that are no images, but a CSV with a column SubjectID, tell of the images of `data`,
    which then are the reference images as well.

    Args:
        kinds: columns that the images of `data` must have, "class" or "number".

    Returns:
        The sides that could be read, and all that is wrong.
    """
    faults: list[str] = []
    found: dict[str, Raw] = {}
    try:
        found["data"] = _images(data_path)
    except SynthCubeError as error:
        faults += _lines(error)
    try:
        if table := _table(labels_path):
            if "data" in found:
                joined, told = _joined(found["data"], table)
                found, faults = {"data": joined, "labels": joined}, faults + told
        else:
            found["labels"] = _images(labels_path, "labels_path")
    except SynthCubeError as error:
        faults += _lines(error)
    if "data" in found:
        faults += condition_faults(found["data"], kinds)
    return found, faults


def condition_faults(raw: Raw, kinds: Mapping[str, str]) -> list[str]:
    """What is wrong with the columns of data.conditions, one line each."""
    faults = []
    for name, kind in kinds.items():
        texts = [_text(cells, name) for cells in raw.cells]
        if not any(texts):
            faults.append(f"data.conditions names the column {name!r}, which is missing or empty")
        elif kind == "number":
            faults += [
                f"{row.subject}, column {name}: {text!r} is not a number"
                for row, text in zip(raw.manifest.rows, texts, strict=True)
                if text and not is_number(text)
            ]
    return faults


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _text(cells: Cells, name: str) -> str:
    named = cells.get("LabelMapping", "") if name == "Label" else ""
    return named or cells.get(name, "")


def _images(path: Path, name: str = "data_path") -> Raw:
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        headline = error.headline.replace("data_path", name, 1)
        raise ManifestError(headline, error.faults) from error
    return raw_of(manifest)


def raw_of(manifest: Manifest) -> Raw:
    """The images of a manifest as it tells of them."""
    return Raw(manifest, tuple(_cells(row) for row in manifest.rows))


def _cells(row: Row) -> Cells:
    label = {"Label": str(row.label), "LabelMapping": cell(row, "Label")} if row.label >= 0 else {}
    split = {"Split": row.split} if row.split else {}
    return {SUBJECT: row.subject, **label, **split, **row.conditions}


def _table(path: Path) -> Path | None:
    """The CSV of conditions that stands at `path`, or nothing where images do."""
    if path.is_dir():
        files = [each for each in sorted(path.rglob("*")) if each.is_file()]
        named = path / FILE_NAME
        tables = [each for each in files if each.suffix.lower() == ".csv"]
        if named in tables:
            tables = [named]
        elif any(image_suffix(each) for each in files):
            return None
        if len(tables) > 1:
            names = ", ".join(each.name for each in tables)
            raise ManifestError(f"labels_path {path} holds several tables ({names}): keep one.")
        path = tables[0] if tables else path
    if path.is_file() and not any(name.startswith("Channel_") for name in read_table(path).header):
        return path
    return None


def _joined(raw: Raw, path: Path) -> tuple[Raw, list[str]]:
    table = read_table(path)
    if SUBJECT not in table.header:
        raise ManifestError(
            f"labels_path {path} has neither a column Channel_0 with images nor a column "
            f"{SUBJECT} that says whose conditions it holds; it has: {', '.join(table.header)}."
        )
    faults = [f"{path}: {text}" for text in table.faults]
    known = {name for cells in raw.cells for name in cells}
    twice = sorted(known & set(table.header) - {SUBJECT})
    faults += [f"{path}: the column {name} is in the data as well: keep one" for name in twice]
    faults += [
        f"{path}: the column {name!r} should be spelled {right!r}"
        for name in table.header
        for right in KNOWN_COLUMNS
        if name != right and name.casefold() == right.casefold()
    ]
    told: dict[str, Cells] = {}
    for number, cells in table.records.items():
        if cells[SUBJECT] in told:
            faults.append(f"{path}, row {number}: subject {cells[SUBJECT]!r} is there already")
        told[cells[SUBJECT]] = cells
    subjects = dict.fromkeys(row.subject for row in raw.manifest.rows)
    faults += [
        f"{path}: subject {name!r} of the data is not in it"
        for name in subjects
        if name not in told
    ]
    merged = tuple(cells | told.get(cells[SUBJECT], {}) for cells in raw.cells)
    return Raw(raw.manifest, merged), faults


def _lines(error: SynthCubeError) -> list[str]:
    return [error.headline, *error.faults] if error.faults else [str(error)]
