"""The numbers of `synthcube evaluate`, as a card shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthcube import reading
from synthcube.errors import EvaluationError

_MARK = "synthcube_evaluation"


@dataclass(frozen=True, slots=True)
class Score:
    """One measure of results.yaml."""

    section: str
    name: str
    value: float | None
    real_baseline: float | None
    low: float | None
    high: float | None
    count: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Results:
    """What a card takes of results.yaml."""

    scores: tuple[Score, ...]
    notes: tuple[tuple[str, str], ...]
    """(section, sentence)."""
    counts: tuple[tuple[str, int], ...]
    """(set of images, how many)."""
    extractor: str

    @property
    def settled(self) -> tuple[Score, ...]:
        """Those whose number needs no word of caution: for fields without room for one."""
        return tuple(each for each in self.scores if each.value is not None and not each.reason)

    @property
    def prose(self) -> str:
        """All that is said in words."""
        return "\n".join(
            [*(each.reason for each in self.scores), *(text for _, text in self.notes)]
        )


def read_results(path: Path) -> Results:
    """Read the file that `synthcube evaluate` wrote.

    Raises:
        EvaluationError: it is none, or holds no number.
    """
    found = reading.read_yaml(path, EvaluationError, name="--evaluation")
    if _MARK not in found:
        raise EvaluationError(
            f"--evaluation {path}: this is not what synthcube evaluate wrote (results.yaml)."
        )
    sections = {
        str(name): section
        for name, section in found.items()
        if isinstance(section, Mapping) and any(map(_is_measure, section.values()))
    }
    if not sections:
        raise EvaluationError(f"--evaluation {path}: there is no measure in it.")
    return Results(
        tuple(score for name, section in sections.items() for score in _scores(name, section)),
        tuple(
            (name, str(note))
            for name, section in sections.items()
            for note in _listed(section.get("notes"))
        ),
        tuple(_counts(found.get("images"))),
        _extractor(found.get("extractor")),
    )


def _is_measure(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value


def _scores(section: str, measures: Mapping[str, Any]) -> Iterator[Score]:
    for name, each in measures.items():
        if _is_measure(each):
            count = _number(each.get("count"))
            yield Score(
                section, str(name), _number(each["value"]), _number(each.get("real_baseline")),
                _number(each.get("low")), _number(each.get("high")),
                None if count is None else int(count), str(each.get("reason") or ""),
            )  # fmt: skip


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _counts(images: Any) -> Iterator[tuple[str, int]]:
    for name, each in (images if isinstance(images, Mapping) else {}).items():
        count = _number(each.get("count")) if isinstance(each, Mapping) else None
        if count is not None:
            yield str(name), int(count)


def _extractor(record: Any) -> str:
    return str(record.get("name", "")) if isinstance(record, Mapping) else ""
