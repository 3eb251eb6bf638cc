"""Reading the raw images of a site: their manifests, reference images and conditions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from synthcube.data.conditions import parse_number
from synthcube.data.manifest import FILE_NAME, Manifest, image_suffix, read_manifest
from synthcube.data.tables import KNOWN_COLUMNS, TABLE_SUFFIXES, CsvTable, read_table
from synthcube.errors import ManifestError, SynthCubeError

SUBJECT = "SubjectID"
Cells = dict[str, str]


@dataclass(frozen=True, slots=True)
class RawImages:
    """The images of `data` or `labels`, and for each the cells of its row without its files."""

    manifest: Manifest
    cells: tuple[Cells, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> RawImages:
        """Return the images of a manifest with the manifest's own cells."""
        return cls(manifest, tuple(row.known_cells for row in manifest.rows))


def read_raw(
    data_path: Path, labels_path: Path, conditions: Mapping[str, str]
) -> tuple[dict[str, RawImages], list[str]]:
    """Return the sides `data` and `labels`, as far as they can be read, and every fault.

    Instead of reference images, `labels_path` may hold a CSV with a column SubjectID. Its columns
    are added to the images of `data`, which then are the reference images as well.

    Args:
        conditions: "class" or "number" for each column that the images of `data` must have.
    """
    faults: list[str] = []
    sides: dict[str, RawImages] = {}
    try:
        sides["data"] = RawImages.of(read_manifest(data_path))
    except SynthCubeError as error:
        faults += [error.headline, *error.faults]
    try:
        if table := _conditions_table(labels_path):
            if "data" in sides:
                joined, join_faults = _joined(sides["data"], table)
                sides, faults = {"data": joined, "labels": joined}, faults + join_faults
        else:
            sides["labels"] = RawImages.of(read_manifest(labels_path))
    except SynthCubeError as error:
        lines = [error.headline, *error.faults]
        faults += [re.sub("^data_path ", "labels_path ", line) for line in lines]
    if "data" in sides:
        faults += condition_faults(sides["data"], conditions)
    return sides, faults


def condition_faults(images: RawImages, conditions: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the columns of data.conditions, one line each."""
    faults = []
    for name, kind in conditions.items():
        column = "LabelMapping" if name == "Label" else name
        texts = [cells.get(column) or cells.get(name, "") for cells in images.cells]
        if not any(texts):
            faults.append(f"data.conditions names the column {name!r}, which is missing or empty")
        elif kind == "number":
            faults += [
                f"{row.subject}, column {name}: {text!r} is not a number"
                for row, text in zip(images.manifest.rows, texts, strict=True)
                if text and parse_number(text) is None
            ]
    return faults


def _conditions_table(path: Path) -> Path | None:
    """Return the CSV of conditions at `path`, or None if there are images."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        tables = [file for file in files if file.name.lower().endswith(TABLE_SUFFIXES)]
        if path / FILE_NAME in tables:
            tables = [path / FILE_NAME]
        elif any(image_suffix(file) for file in files):
            return None
        if len(tables) > 1:
            names = ", ".join(table.name for table in tables)
            raise ManifestError(f"labels_path {path} holds several tables ({names}): keep one.")
        path = tables[0] if tables else path
    if path.is_file() and not any(name.startswith("Channel_") for name in read_table(path).header):
        return path
    return None


def _joined(images: RawImages, path: Path) -> tuple[RawImages, list[str]]:
    """Return `images` with the conditions in the CSV at `path`, and what is wrong with the CSV."""
    table = read_table(path)
    if SUBJECT not in table.header:
        raise ManifestError(
            f"labels_path {path} has neither a column Channel_0 with images nor a column "
            f"{SUBJECT} with the subjects of its conditions; it has: {', '.join(table.header)}."
        )
    by_subject = {cells[SUBJECT]: cells for cells in table.records.values()}
    merged = tuple(cells | by_subject.get(cells[SUBJECT], {}) for cells in images.cells)
    faults = [f"{path}: {text}" for text in table.faults]
    faults += _column_faults(path, table, {name for cells in images.cells for name in cells})
    subjects: set[str] = set()
    for number, cells in table.records.items():
        if cells[SUBJECT] in subjects:
            faults.append(f"{path}, row {number}: subject {cells[SUBJECT]!r} is there already")
        subjects.add(cells[SUBJECT])
    missing = dict.fromkeys(
        row.subject for row in images.manifest.rows if row.subject not in subjects
    )
    faults += [f"{path}: subject {name!r} of the data is not in it" for name in missing]
    return RawImages(images.manifest, merged), faults


def _column_faults(path: Path, table: CsvTable, columns: set[str]) -> list[str]:
    twice = sorted(columns & set(table.header) - {SUBJECT})
    return [
        *(f"{path}: the column {name} is in the data as well: keep one" for name in twice),
        *(
            f"{path}: the column {name!r} should be spelled {right!r}"
            for name in table.header
            for right in KNOWN_COLUMNS
            if name != right and name.casefold() == right.casefold()
        ),
    ]
