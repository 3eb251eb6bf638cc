"""Conditions (classes, numbers, source channels), read from a manifest or requested by a user."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from synthcube.data.manifest import Manifest, Row, natural_key
from synthcube.data.tables import read_table
from synthcube.environment import derived_seed
from synthcube.errors import ConfigError, ManifestError, first_faults
from synthcube.schema import MAX_IMAGES, ChannelIndex, ConditionSpec, List, Pair, Schema

LABEL = "Label"
COUNT = "Count"
ConditionRequest = dict[str, str]


class ConditionFields(Schema):
    """Settings of the conditions that a model is trained on."""

    conditions: dict[str, Literal["class", "number"]] = Field(
        default={},
        description="Columns of the manifest that the images follow: {Label: class, Age: number}. "
        "An empty cell means that it is not known.",
    )
    classes: dict[str, Annotated[List[str], Field(min_length=1)]] = Field(
        default={},
        description="Declared classes of a column: {Label: [Hand, HeadCT]}; else those in the "
        "training images.",
    )
    ranges: dict[str, Pair] = Field(
        default={},
        description="Declared lowest and highest number of a column: {Age: [0, 100]}; else those "
        "of the training images. In a federation they are part of its plan.",
    )
    source_channels: List[ChannelIndex] = Field(
        default=(),
        description="Channels from which the others are made: [0] translates Channel_0, a mask "
        "among them says where.",
    )

    @model_validator(mode="after")
    def _declares_conditions(self) -> Self:
        faults = [
            f"classes names {name}, which is no class among data.conditions"
            for name in self.classes
            if name != LABEL and self.conditions.get(name) != "class"
        ]
        faults += [
            f"classes of {name}: none may be there twice"
            for name, classes in self.classes.items()
            if len(set(classes)) < len(classes)
        ]
        faults += [
            f"ranges names {name}, which is no number among data.conditions"
            for name in self.ranges
            if self.conditions.get(name) != "number"
        ]
        faults += [
            f"ranges of {name}: low {low:g} must be below high {high:g}"
            for name, (low, high) in self.ranges.items()
            if low >= high
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self


def condition_specs(
    manifest: Manifest, rows: Sequence[int], kinds: Mapping[str, str], *,
    classes: Mapping[str, Sequence[str]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[ConditionSpec, ...]:  # fmt: skip
    """The vocabulary and the range of each column: as declared, else over the training rows.

    Raises ManifestError.
    """
    declared, ranges = classes or {}, ranges or {}
    faults: list[str] = []
    specs = []
    for name, kind in kinds.items():
        cells = [cell(row, name) for row in manifest.rows]
        trained = {cells[index] for index in rows}
        texts = set(cells)
        if not any(texts):
            columns = sorted({column for row in manifest.rows for column in row.conditions})
            faults.append(
                f"data.conditions names the column {name!r}, which is missing or empty; there are "
                f"{', '.join(columns) or 'no other columns'}"
                + (f" and {LABEL}" if manifest.labels else "")
            )
            continue
        if kind == "class":
            in_data = manifest.labels if name == LABEL else ()
            in_data = in_data or tuple(sorted(trained - {""}, key=natural_key))
            names = tuple(declared.get(name, in_data))
            spec = ConditionSpec(name=name, kind="class", classes=names)
            specs.append(spec)
            known = _indices(spec)
            wrong = {text: fault for text in texts if (fault := _fault(spec, known, text))}
        else:
            wrong = {
                text: f"{text!r} is not a number"
                for text in texts
                if text and parse_number(text) is None
            }
            if not wrong and name in ranges:
                low, high = ranges[name]
                specs.append(ConditionSpec(name=name, kind="number", low=low, high=high))
                outside = f"it lies outside of data.ranges, {low:g} to {high:g}"
                wrong = {
                    text: f"{text!r}: {outside}"
                    for text in texts
                    if text and not low <= float(text) <= high
                }
            elif not wrong:
                specs += _number_spec(name, trained, faults)
        if wrong:
            faults += [
                f"row {row.number}, column {name}: {wrong[text]}"
                for row, text in zip(manifest.rows, cells, strict=True)
                if text in wrong
            ]
    if faults:
        raise ManifestError(f"The conditions of {manifest.path} are faulty:", first_faults(faults))
    return tuple(specs)


def condition_values(
    specs: Sequence[ConditionSpec], rows: Sequence[Row]
) -> npt.NDArray[np.float32]:
    """(len(rows), len(specs)): what a model sees of each row; NaN where a cell is empty."""
    values = np.empty((len(rows), len(specs)), np.float32)
    for column, spec in enumerate(specs):
        indices = _indices(spec)
        texts = [cell(row, spec.name) for row in rows]
        known = {text: _value(spec, indices, text) for text in set(texts)}
        values[:, column] = [known[text] for text in texts]
    return values


def parse_counts(text: str) -> int | dict[str, int]:
    """ "8", or "Hand=5,HeadCT=3" for so many of each class. Raises ConfigError."""
    if (number := _count(text.strip())) > 0:
        _check_number(number)
        return number
    parts = [part.partition("=") for part in text.split(",")]
    counts = {name.strip(): number.strip() for name, _, number in parts}
    numbers = {name: _count(count) for name, count in counts.items()}
    if "" in counts or len(counts) < len(parts) or min(numbers.values()) < 1:
        raise ConfigError(
            f"num_images {text}: write a number above 0, or Hand=5,HeadCT=3 for so many of a class."
        )
    _check_number(sum(numbers.values()))
    return numbers


def read_condition_requests(
    specs: Sequence[ConditionSpec],
    num_images: int | Mapping[str, int],
    conditions: Sequence[str] = (),
    table: Path | None = None,
) -> list[ConditionRequest]:
    """One request for each image: the conditions it names, as text.

    Args:
        num_images: how many, or how many of each class; not used with a table.
        conditions: "name=value" for every image.
        table: CSV with a column for each condition, one row for each image, or for as many as its
            column Count says.
    """
    common = dict(_pair(text) for text in conditions)
    if table:
        return [common | request for request in _rows(table)]
    _check_number(num_images if isinstance(num_images, int) else sum(num_images.values()))
    if isinstance(num_images, int):
        return [dict(common) for _ in range(num_images)]
    columns = [spec.name for spec in specs if spec.kind == "class"]
    if len(columns) != 1:
        raise ConfigError(
            f"num_images counts images of a class ({', '.join(num_images)}), but the model has "
            f"{len(columns)} conditions that are classes: give a number, or a CSV as --conditions."
        )
    return [
        {**common, columns[0]: name} for name, number in num_images.items() for _ in range(number)
    ]


def requested_values(
    specs: Sequence[ConditionSpec],
    requests: Sequence[Mapping[str, str]],
    *,
    extrapolate: bool = False,
) -> npt.NDArray[np.float32]:
    """(len(requests), len(specs)): each request as a model sees it; NaN where it names nothing.

    Args:
        extrapolate: take numbers outside the range of the training too, as its validation does.

    Raises:
        ConfigError: all requests that the model cannot follow.
    """
    folded = {spec.name.casefold(): (i, spec, _indices(spec)) for i, spec in enumerate(specs)}
    faults = []
    values = np.full((len(requests), len(specs)), np.nan, np.float32)
    for index, request in enumerate(requests):
        for name, text in request.items():
            if name.casefold() not in folded:
                faults.append(f"{name}: the model knows {_described(specs)}")
                continue
            column, spec, indices = folded[name.casefold()]
            is_number = spec.kind == "number" and parse_number(text) is not None
            fault = _fault(spec, indices, text)
            if fault and not (extrapolate and is_number):
                faults.append(f"{spec.name}={text}: {fault}")
            else:
                values[index, column] = _value(spec, indices, text)
    if faults:
        raise ConfigError(
            "These conditions cannot be met:", first_faults(list(dict.fromkeys(faults)))
        )
    return values


def draw_missing_conditions(
    values: npt.NDArray[np.float32],
    specs: Sequence[ConditionSpec],
    requests: Sequence[ConditionRequest],
    seeds: Sequence[int],
) -> npt.NDArray[np.float32]:
    """`values` with the conditions that a request does not name drawn from its image's seed.

    All values are equally likely. A condition that is requested as an empty text stays unknown.
    """
    filled: npt.NDArray[np.float32] = values.copy()
    for row, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
        named = {name.casefold() for name in request}
        for column, spec in enumerate(specs):
            if spec.name.casefold() in named:
                continue
            generator = torch.Generator().manual_seed(derived_seed(seed, "condition", spec.name))
            draw = torch.rand((), generator=generator).item()
            number = int(draw * len(spec.classes)) if spec.kind == "class" else 2 * draw - 1
            filled[row, column] = number
    return filled


def cell(row: Row, name: str) -> str:
    """The text of a row's column; for Label its class name."""
    return row.label_name if name == LABEL else row.conditions.get(name, "")


def shown(spec: ConditionSpec, value: float) -> str:
    """The text of a cell for a value as a model sees it; empty for NaN."""
    if math.isnan(value):
        return ""
    if spec.kind == "class":
        return spec.classes[int(value)]
    return f"{spec.low + (value + 1) / 2 * (spec.high - spec.low):.6g}"


def caption(
    specs: Sequence[ConditionSpec], values: Iterable[float], seed: int | None = None
) -> str:
    """What a picture says of an image: its known conditions and its seed, each on a line.

    Args:
        values: as a model sees them, one for each of `specs`.
    """
    classes = sum(spec.kind == "class" for spec in specs)
    lines = []
    for spec, value in zip(specs, values, strict=True):
        text = shown(spec, float(value))
        if text and spec.kind == "class":
            lines.append(text if classes == 1 else f"{spec.name}: {text}")
        elif text:
            lines.append(f"{spec.name}: {float(text):.4g}")
    return "\n".join([*lines, *([] if seed is None else [f"seed {seed}"])])


def parse_number(text: str) -> float | None:
    """The finite number that `text` is, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _number_spec(name: str, texts: Iterable[str], faults: list[str]) -> list[ConditionSpec]:
    numbers = [number for text in texts if (number := parse_number(text)) is not None]
    if not numbers:
        faults.append(f"column {name}: no training row has a number")
        return []
    if min(numbers) == max(numbers):
        faults.append(f"column {name}: every training row has {numbers[0]:g}, nothing to learn")
        return []
    return [ConditionSpec(name=name, kind="number", low=min(numbers), high=max(numbers))]


def _fault(spec: ConditionSpec, indices: Mapping[str, int], text: str) -> str:
    if not text:
        return ""
    if spec.kind == "class":
        if text in indices:
            return ""
        return f"{text!r} is not among the classes {', '.join(first_faults(spec.classes, 5))}"
    number = parse_number(text)
    if number is None:
        return f"{text!r} is not a number"
    if not spec.low <= number <= spec.high:
        return f"it was trained on {spec.low:g} to {spec.high:g}"
    return ""


def _value(spec: ConditionSpec, indices: Mapping[str, int], text: str) -> float:
    if not text:
        return math.nan
    if spec.kind == "class":
        return float(indices[text])
    return 2 * (float(text) - spec.low) / (spec.high - spec.low) - 1


def _indices(spec: ConditionSpec) -> dict[str, int]:
    """The index of each class by name, for a fast look-up."""
    return {name: index for index, name in enumerate(spec.classes)}


def _described(specs: Sequence[ConditionSpec]) -> str:
    if not specs:
        return "no conditions"
    return ", ".join(
        f"{spec.name} ({', '.join(first_faults(spec.classes))})"
        if spec.kind == "class"
        else f"{spec.name} ({spec.low:g} to {spec.high:g})"
        for spec in specs
    )


def _count(text: str) -> int:
    """The whole number that a text is; -1 where it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1


def _check_number(number: int) -> None:
    if number > MAX_IMAGES:
        raise ConfigError(
            f"{number} images are more than a command makes, at most {MAX_IMAGES}: run it several "
            "times, with another seed and output_path each."
        )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--condition {text}: write it as name=value, as in Label=Hand.")
    return name.strip(), value.strip()


def _rows(path: Path) -> list[ConditionRequest]:
    table = read_table(path)
    faults = list(table.faults)
    requests: list[ConditionRequest] = []
    for number, cells in table.records.items():
        text = cells.pop(COUNT, "1") or "1"
        count = _count(text)
        if count < 0:
            faults.append(f"row {number}, column {COUNT}: {text!r} is not a whole number")
            continue
        _check_number(len(requests) + count)
        requests += [dict(cells) for _ in range(count)]
    if faults or not requests:
        raise ConfigError(f"--conditions {path} requests no image, or is faulty:", faults)
    return requests
