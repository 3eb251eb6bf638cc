"""Class ids and names of a manifest's rows: the same on every machine, whatever the row order."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_CLASSES = 10_000
"""A larger id is a code, not a class: it would size the model's embedding."""

_INTEGER = re.compile(r"[+-]?\d+(\.0+)?")  # spreadsheets and pandas write 1 as 1.0

Labels = dict[int, tuple[int, str]]
"""Class id and name by line number; lines without a class are not in it."""


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key that puts "scan2" before "scan10"; the same order on every machine."""
    parts = re.split(r"([0-9]+)", text.casefold())
    numbered = ((0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts))
    return tuple(numbered), text


def class_labels(ids: Mapping[int, str], names: Mapping[int, str]) -> tuple[Labels, list[str]]:
    """Labels out of the columns Label and LabelMapping, and what is wrong with them.

    Names without ids (LabelMapping alone, or a Label that is not a number) get ids in the
    natural order of the names; ids without names are named by their number.

    Args:
        ids: cells of Label by line number; all empty where there is no such column.
        names: of LabelMapping.
    """
    faults = _empty("Label", ids) + _empty("LabelMapping", names)
    if not any(names.values()) and not all(_INTEGER.fullmatch(cell) for cell in ids.values()):
        ids, names = names, ids
    if any(ids.values()):
        labels, id_faults = _numbered(ids, names)
        return labels, faults + id_faults + _contradictions(labels)
    order = {name: i for i, name in enumerate(sorted(set(names.values()) - {""}, key=natural_key))}
    return {number: (order[name], name) for number, name in names.items() if name}, faults


def _empty(column: str, cells: Mapping[int, str]) -> list[str]:
    if not any(cells.values()):
        return []
    return [
        f"row {number}, column {column}: the cell is empty; label every row or none"
        for number, cell in cells.items()
        if not cell
    ]


def _numbered(ids: Mapping[int, str], names: Mapping[int, str]) -> tuple[Labels, list[str]]:
    labels: Labels = {}
    faults = []
    for number, cell in ids.items():
        if _INTEGER.fullmatch(cell) and 0 <= float(cell) < MAX_CLASSES:
            label = int(float(cell))
            labels[number] = (label, names[number] or str(label))
        elif cell:
            faults.append(
                f"row {number}, column Label: {cell!r} is not a class id; "
                f"ids are whole numbers from 0, below {MAX_CLASSES}"
            )
    return labels, faults


def _contradictions(labels: Labels) -> list[str]:
    """One fault for each id with two names and each name with two ids, at the first such row."""
    faults: dict[tuple[int, str], str] = {}
    first: dict[int | str, int] = {}
    for number, label in labels.items():
        for key in label:
            before = first.setdefault(key, number)
            if labels[before] != label:
                old_id, old_name = labels[before]
                faults.setdefault(
                    label,
                    f"row {number}: label {label[0]} is named {label[1]!r}, "
                    f"but in row {before} label {old_id} is named {old_name!r}",
                )
    return list(faults.values())
