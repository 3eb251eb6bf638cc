"""What infer is asked to make: conditions in words, one mapping for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from synthcube.data.table import read_table
from synthcube.errors import ConfigError
from synthcube.runtime import derived_seed
from synthcube.schema import MAX_IMAGES, ConditionSpec

Wish = dict[str, str]
COUNT = "Count"


def parse_counts(text: str) -> int | dict[str, int]:
    """ "8", or "Hand=5,HeadCT=3" for so many of each class.

    Raises:
        ConfigError: it is neither.
    """
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


def read_wishes(
    specs: Sequence[ConditionSpec],
    num_images: int | Mapping[str, int],
    conditions: Sequence[str] = (),
    table: Path | None = None,
) -> list[Wish]:
    """One wish for each image.

    Args:
        num_images: how many, or how many of each class; not used with a table.
        conditions: "name=value" for every image.
        table: CSV with a column for each condition, one row for each image, or for as many as its
            column Count says.

    Raises:
        ConfigError, ManifestError: it cannot be read; counts of classes without one class column.
    """
    common = dict(_pair(text) for text in conditions)
    if not table:
        _check_number(num_images if isinstance(num_images, int) else sum(num_images.values()))
    if table:
        return [common | wish for wish in _rows(table)]
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


def complete(
    values: npt.NDArray[np.float32],
    specs: Sequence[ConditionSpec],
    wishes: Sequence[Wish],
    seeds: Sequence[int],
) -> npt.NDArray[np.float32]:
    """`values` with what was not asked for drawn from each image's seed, all equally likely.

    What is asked to be unknown, by an empty text, stays so.
    """
    filled: npt.NDArray[np.float32] = values.copy()
    for row, (wish, seed) in enumerate(zip(wishes, seeds, strict=True)):
        named = {name.casefold() for name in wish}
        for column, spec in enumerate(specs):
            if spec.name.casefold() in named:
                continue
            generator = torch.Generator().manual_seed(derived_seed(seed, "condition", spec.name))
            draw = torch.rand((), generator=generator).item()
            number = int(draw * len(spec.classes)) if spec.kind == "class" else 2 * draw - 1
            filled[row, column] = number
    return filled


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


def _rows(path: Path) -> list[Wish]:
    table = read_table(path)
    faults = list(table.faults)
    wishes: list[Wish] = []
    for number, cells in table.records.items():
        text = cells.pop(COUNT, "1") or "1"
        count = _count(text)
        if count < 0:
            faults.append(f"row {number}, column {COUNT}: {text!r} is not a whole number")
            continue
        _check_number(len(wishes) + count)
        wishes += [dict(cells) for _ in range(count)]
    if faults or not wishes:
        raise ConfigError(f"--conditions {path} asks for no image, or is faulty:", faults)
    return wishes
