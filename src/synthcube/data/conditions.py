"""Conditions of a manifest's rows: columns by name, as classes or numbers, and channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from synthcube.data.labels import natural_key
from synthcube.data.manifest import Manifest, Row, capped
from synthcube.errors import ConfigError, ManifestError
from synthcube.schema import ConditionSpec, List, Schema

LABEL = "Label"


class ConditionFields(Schema):
    """What a model is told of an image, beside the image itself."""

    conditions: dict[str, Literal["class", "number"]] = Field(
        default={},
        description="Columns of the manifest that the images follow: {Label: class, Age: number}. "
        "An empty cell means that it is not known.",
    )
    source_channels: List[Annotated[int, Field(ge=0, lt=4096)]] = Field(
        default=(),
        description="Channels from which the others are made: [0] translates Channel_0, a mask "
        "among them says where.",
    )


def condition_specs(
    manifest: Manifest, rows: Sequence[int], kinds: Mapping[str, str]
) -> tuple[ConditionSpec, ...]:
    """The vocabulary and the range of each column, over the training rows.

    Raises:
        ManifestError: a column is missing, holds something else, or the same in every row.
    """
    faults: list[str] = []
    specs = []
    for name, kind in kinds.items():
        cells = {row.number: cell(row, name) for row in manifest.rows}
        trained = [cells[manifest.rows[index].number] for index in rows]
        if not any(cells.values()):
            columns = sorted({column for row in manifest.rows for column in row.conditions})
            faults.append(
                f"data.conditions names the column {name!r}, which is missing or empty; there are "
                f"{', '.join(columns) or 'no other columns'}"
                + (f" and {LABEL}" if manifest.labels else "")
            )
        elif kind == "class":
            known = [each for each in manifest.labels if name == LABEL] or sorted(
                {*trained} - {""}, key=natural_key
            )
            specs.append(ConditionSpec(name=name, kind="class", classes=tuple(known)))
        else:
            specs += _number_spec(name, cells, trained, faults)
    places = {spec.name: (spec, _places(spec)) for spec in specs if spec.kind == "class"}
    for row in manifest.rows:
        faults += [
            f"row {row.number}, column {name}: {text}"
            for name, (spec, known) in places.items()
            if (text := _fault(spec, known, cell(row, name)))
        ]
    if faults:
        raise ManifestError(f"The conditions of {manifest.path} are faulty:", capped(faults))
    return tuple(specs)


def condition_values(
    specs: Sequence[ConditionSpec], rows: Sequence[Row]
) -> npt.NDArray[np.float32]:
    """(len(rows), len(specs)): what a model sees of each row; NaN where a cell is empty."""
    values = np.empty((len(rows), len(specs)), np.float32)
    for column, spec in enumerate(specs):
        places = _places(spec)
        values[:, column] = [_value(spec, places, cell(row, spec.name)) for row in rows]
    return values


def requested(
    specs: Sequence[ConditionSpec], wishes: Sequence[Mapping[str, str]]
) -> npt.NDArray[np.float32]:
    """(len(wishes), len(specs)): what a model sees of what is asked for; NaN where nothing is.

    Raises:
        ConfigError: a name, a class or a number that the model was not trained on.
    """
    folded = {spec.name.casefold(): (i, spec, _places(spec)) for i, spec in enumerate(specs)}
    faults = []
    values = np.full((len(wishes), len(specs)), np.nan, np.float32)
    for index, wish in enumerate(wishes):
        for name, text in wish.items():
            if name.casefold() not in folded:
                faults.append(f"{name}: the model knows {_described(specs)}")
                continue
            column, spec, places = folded[name.casefold()]
            if fault := _fault(spec, places, text):
                faults.append(f"{spec.name}={text}: {fault}")
            else:
                values[index, column] = _value(spec, places, text)
    if faults:
        raise ConfigError("These conditions cannot be met:", capped(list(dict.fromkeys(faults))))
    return values


def cell(row: Row, name: str) -> str:
    """The text of a row's column; for Label its class name."""
    return row.label_name if name == LABEL else row.conditions.get(name, "")


def shown(spec: ConditionSpec, value: float) -> str:
    """The cell that stands for what a model sees; empty where that is NaN."""
    if math.isnan(value):
        return ""
    if spec.kind == "class":
        return spec.classes[int(value)]
    return f"{spec.low + (value + 1) / 2 * (spec.high - spec.low):.6g}"


def _described(specs: Sequence[ConditionSpec]) -> str:
    if not specs:
        return "no conditions"
    return ", ".join(
        f"{spec.name} ({', '.join(capped(spec.classes))})"
        if spec.kind == "class"
        else f"{spec.name} ({spec.low:g} to {spec.high:g})"
        for spec in specs
    )


def _number_spec(
    name: str, cells: Mapping[int, str], trained: Sequence[str], faults: list[str]
) -> list[ConditionSpec]:
    bad = [
        f"row {number}, column {name}: {text!r} is not a number"
        for number, text in cells.items()
        if text and _number(text) is None
    ]
    faults += bad
    numbers = [number for text in trained if (number := _number(text)) is not None]
    if bad or not numbers:
        faults += [] if bad else [f"column {name}: no training row has a number"]
        return []
    if min(numbers) == max(numbers):
        faults.append(f"column {name}: every training row has {numbers[0]:g}, nothing to learn")
        return []
    return [ConditionSpec(name=name, kind="number", low=min(numbers), high=max(numbers))]


def _fault(spec: ConditionSpec, places: Mapping[str, int], text: str) -> str:
    if not text:
        return ""
    if spec.kind == "class":
        if text in places:
            return ""
        return f"{text!r} is not among the classes {', '.join(capped(spec.classes))}"
    number = _number(text)
    if number is None:
        return f"{text!r} is not a number"
    if not spec.low <= number <= spec.high:
        return f"it was trained on {spec.low:g} to {spec.high:g}"
    return ""


def _value(spec: ConditionSpec, places: Mapping[str, int], text: str) -> float:
    if not text:
        return math.nan
    if spec.kind == "class":
        return float(places[text])
    return 2 * (float(text) - spec.low) / (spec.high - spec.low) - 1


def _places(spec: ConditionSpec) -> dict[str, int]:
    """The number of each class: a search for it in all of them is slow where there are many."""
    return {name: place for place, name in enumerate(spec.classes)}


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
