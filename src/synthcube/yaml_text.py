"""YAML as data only: no tags, no anchors, no repeated keys, and scalars as YAML 1.2 reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from synthcube.errors import ConfigError
from synthcube.escapes import hidden_in

_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 20
_LARGEST_INTEGER = 2**64 - 1
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# YAML 1.1 reads 010 as 8, 0b11 as 3 and 1:30 as 90; YAML 1.2 reads 10 and two texts.
_AMBIGUOUS = re.compile(r"[-+]?(0[0-9_]+|0b[01_]+|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


def parse(text: str, where: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The plain values in `text`, and the line (from 1) of every key path.

    Raises:
        ConfigError: it is no YAML, is too long or too deep, uses tags, anchors, aliases, merge
            keys or the same key twice, or holds a scalar that readers of YAML disagree about.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"{where}: {len(text)} characters are too many, at most {_MAX_CHARACTERS} are read."
        )
    lines: dict[tuple[Any, ...], int] = {}
    value = None
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if lines:
                    raise ConfigError(f"{_at(event, where)}: a second document; only one is read.")
                value = _value(next(events), events, (), lines, where)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of an escape such as \UFFFFFFFF
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}{line}: this is not YAML: {problem}") from error
    return value, lines


def _value(
    event: Any,
    events: Iterator[Any],
    path: tuple[Any, ...],
    lines: dict[tuple[Any, ...], int],
    where: str,
) -> Any:
    at = _at(event, where)
    if isinstance(event, yaml.AliasEvent) or event.anchor:
        raise ConfigError(f"{at}: anchors and aliases (& and *) are not allowed.")
    if event.tag:
        raise ConfigError(f"{at}: tags ({event.tag}) are not allowed: this is data only.")
    if len(path) > _MAX_DEPTH:
        raise ConfigError(f"{at}: nested more than {_MAX_DEPTH} deep.")
    lines.setdefault(path, event.start_mark.line + 1)
    if isinstance(event, yaml.SequenceStartEvent):
        values: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            values.append(_value(event, events, (*path, len(values)), lines, where))
        return values
    if isinstance(event, yaml.MappingStartEvent):
        mapping: dict[Any, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = _key(event, path, lines, where)
            if key in mapping:
                raise ConfigError(f"{_at(event, where)}: the key {key!r} is there twice.")
            place = (*path, key)
            lines[place] = event.start_mark.line + 1
            mapping[key] = _value(next(events), events, place, lines, where)
        return mapping
    return _scalar(event, at)


def _key(
    event: Any, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], where: str
) -> str | int | float | bool:
    at = _at(event, where)
    if isinstance(event, yaml.CollectionStartEvent):
        raise ConfigError(f"{at}: a key must be a word or a number, not a list or a mapping.")
    if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
        raise ConfigError(f"{at}: merge keys (<<) are not allowed.")
    key = _value(event, iter(()), path, lines, where)
    if key is None:
        raise ConfigError(f"{at}: a key is missing before the colon.")
    return key  # type: ignore[no-any-return]  # a scalar's value


def _scalar(event: Any, at: str) -> str | int | float | bool | None:
    text: str = event.value
    if not event.implicit[0]:  # in quotes, or a block of text
        return checked_text(text, at)
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _AMBIGUOUS.fullmatch(text):
        raise ConfigError(
            f"{at}: {_short(text)} is one number to some readers of YAML and another, or a text, "
            'to others: write the number in full, such as 90 or 0.5, or the text in quotes, "1:30".'
        )
    if _NOT_FINITE.fullmatch(text):  # which every schema refuses, beside its other faults
        return float(text.replace(".", "", 1))
    if _INTEGER.fullmatch(text):
        return _number(text, at, int(text, 0) if len(text) < 30 else math.inf)
    if _FLOAT.fullmatch(text):
        return _number(text, at, float(text))
    return checked_text(text, at)


def checked_text(text: str, at: str) -> str:
    """`text`, which can be written to a file and be the name of one.

    Raises:
        ConfigError: it holds a control character, or half of a surrogate pair.
    """
    if hidden := hidden_in(text):
        raise ConfigError(f"{at}: a text holds {hidden}, which no setting needs.")
    return text


def _number(text: str, at: str, value: float) -> float:
    if not math.isfinite(value) or (isinstance(value, int) and abs(value) > _LARGEST_INTEGER):
        raise ConfigError(f"{at}: {_short(text)} is too large a number.")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _at(event: Any, where: str) -> str:
    return f"{where}, line {event.start_mark.line + 1}"


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and quotes each text that :func:`parse` would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        # PyYAML would fold these as it does line breaks, and lose them
        style = '"' if any(each in text for each in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _pattern in (_INTEGER, _FLOAT, _AMBIGUOUS):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def dump(value: Mapping[str, Any]) -> str:
    """YAML text that :func:`parse` reads back as `value`."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
