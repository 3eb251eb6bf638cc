"""YAML as data only: no tags, no anchors, no repeated keys, and numbers as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from synthcube.errors import ConfigError
from synthcube.escapes import hidden_in

_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 20
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$")
_PLAIN_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """PyYAML reads 1e-4 as text and `no` as False; this one follows YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in {"bool", "timestamp", "merge", "value"}
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _PLAIN_BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str, where: str) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The plain values in `text`, and the line (from 1) of every key path.

    Raises:
        ConfigError: it is no YAML, or uses tags, anchors, aliases or the same key twice.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"{where}: {len(text)} characters are too many for a config.")
    try:
        _check_events(text, where)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}{line}: this is not YAML: {problem}") from error
    lines: dict[tuple[Any, ...], int] = {}
    value = _value(node, (), lines, where) if node else None
    return value, lines


def _check_events(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        at = f"{where}, line {event.start_mark.line + 1 if event.start_mark else 0}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{at}: anchors and aliases (& and *) are not allowed in a config.")
        if tag := getattr(event, "tag", None):
            raise ConfigError(f"{at}: tags ({tag}) are not allowed: a config is data only.")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{at}: nested more than {_MAX_DEPTH} deep.")


def _value(
    node: yaml.Node, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], where: str
) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{where}, line {line}: a list or a mapping is no key.")
            key = _scalar(key_node, where)
            if key == "<<":
                raise ConfigError(
                    f"{where}, line {line}: merge keys (<<) are not allowed: write the keys out."
                )
            if key in found:
                raise ConfigError(f"{where}, line {line}: the key {key!r} is there twice.")
            place = (*path, key)
            found[key] = _value(value_node, place, lines, where)
            lines[place] = line
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(each, (*path, i), lines, where) for i, each in enumerate(node.value)]
    return _scalar(node, where)


def _scalar(node: yaml.Node, where: str) -> Any:
    line = node.start_mark.line + 1
    if hidden := hidden_in(node.value):
        raise ConfigError(f"{where}, line {line}: a text holds {hidden}, which no setting needs.")
    try:
        return _Loader("").construct_object(node, deep=True)
    except ValueError as error:  # 0x_, or a number of thousands of digits
        raise ConfigError(f"{where}, line {line}: {node.value!r:.60} is no number.") from error


def dump(value: Mapping[str, Any]) -> str:
    """YAML text that :func:`parse` reads back as `value`."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
