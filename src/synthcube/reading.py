"""Strict reading of files from others: regular files, within limits, as checked data only.

YAML is read as data on which all YAML readers agree: no tags, anchors, aliases or merge keys (but
in old files of GaNDLF-Synth). JSON and CSV are read likewise, without duplicate keys, huge numbers
or control characters.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import stat
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml
from pydantic import ValidationError

from synthcube.errors import ConfigError, SynthCubeError, first_faults
from synthcube.escapes import from_spreadsheet, hidden_in
from synthcube.schema import Schema

S = TypeVar("S", bound=Schema)

MAX_BYTES = 1 << 24
"""Largest size of a file that describes one thing: a config, an index, a card."""
MAX_LIST_BYTES = 1 << 28
"""Largest size of a file with an entry for each image."""
_MAX_CHARACTERS = 1 << 20  # of YAML
_MAX_DEPTH = 20  # of YAML
_MAX_REPEATED = 10_000  # values that the aliases of a YAML stand for
_MAX_JSON_DEPTH = 40
_LARGEST_INTEGER = 2**64 - 1
_FAULTS_SHOWN = 10


def open_file(path: Path, error: type[SynthCubeError], name: str = "") -> BinaryIO:
    """An open regular file; a pipe, a device, a socket or a folder is refused at once.

    Args:
        error: raised where the file cannot be opened; so in all functions of this module.
        name: the command-line parameter that holds the path, if there is one; likewise.
    """
    try:
        # Without O_NONBLOCK a pipe would wait for its other end before it can be recognised.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name
        reason = getattr(fault, "strerror", None) or str(fault)
        raise error(f"{_shown(path, name)}: {reason}.") from fault
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        problem = "Is a directory" if Path(path).is_dir() else "this is a pipe or a device"
        raise error(f"{_shown(path, name)}: {problem}; a regular file is needed.")
    return os.fdopen(handle, "rb")


def check_checkpoint(path: Path, error: type[SynthCubeError]) -> None:
    """Refuse what torch must not open: a pipe, or an archive that unpacks to more than its size."""
    with open_file(path, error) as file, contextlib.suppress(zipfile.BadZipFile):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                packed = [item.filename for item in archive.infolist() if item.compress_type]
            if packed:
                raise error(
                    f"{path} is a packed archive ({packed[0]}); torch.save packs nothing, so it is "
                    "no checkpoint."
                )


def read_bytes(
    path: Path, error: type[SynthCubeError], *, limit: int = MAX_BYTES, name: str = ""
) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    with open_file(path, error, name) as file:
        try:
            content = file.read(limit + 1)
        except OSError as fault:
            raise error(f"{_shown(path, name)} cannot be read: {fault.strerror}.") from fault
    if len(content) > limit:
        raise error(f"{_shown(path, name)} is larger than {limit >> 20} MB: it is not read.")
    return content


def read_text(
    path: Path, error: type[SynthCubeError], *, limit: int = MAX_BYTES, name: str = ""
) -> str:
    """The content of a text file in UTF-8."""
    try:
        return read_bytes(path, error, limit=limit, name=name).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(
            f"{_shown(path, name)}: this is not a text file (byte {fault.start} is not UTF-8)."
        ) from fault


def read_json(path: Path, error: type[SynthCubeError], *, limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file: finite numbers, no duplicate key, at most 40 levels deep."""
    text = read_text(path, error, limit=limit)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        _check_plain(value)
    except RecursionError as fault:
        raise error(f"{path} cannot be read: nested more than {_MAX_JSON_DEPTH} deep.") from fault
    except (ValueError, ConfigError) as fault:
        raise error(f"{path} cannot be read: this is not JSON as it should be: {fault}") from fault
    return value


def read_object(
    path: Path, error: type[SynthCubeError], *, limit: int = MAX_BYTES
) -> dict[str, Any]:
    """The object in a JSON file, read as by :func:`read_json`."""
    value = read_json(path, error, limit=limit)
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object.")
    return value


def read_yaml(
    path: Path, error: type[SynthCubeError], *, name: str = "", as_pyyaml: bool = False
) -> dict[Any, Any]:
    """The mapping in a YAML file, read as by :func:`parse`."""
    text = read_text(path, error, name=name)
    try:
        value, _ = parse(text, _shown(path, name), as_pyyaml=as_pyyaml)
        _check_plain(value)
    except ConfigError as fault:
        raise error(str(fault)) from fault
    except ValueError as fault:
        raise error(f"{_shown(path, name)}: {fault}.") from fault
    if not isinstance(value, dict):
        raise error(f"{_shown(path, name)}: this is not a mapping of keys to values.")
    return value


def read_rows(
    path: Path, columns: Collection[str], error: type[SynthCubeError]
) -> list[dict[str, str]]:
    """The rows of a CSV that SynthCube wrote, with at least these columns."""
    text = read_text(path, error, limit=MAX_LIST_BYTES)
    try:
        if "\0" in text:
            raise csv.Error("it is binary")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [cells for cells in reader if cells]
    except csv.Error as fault:
        raise error(f"{path} is not a valid CSV: {fault}.") from fault
    header = lines[0] if lines else []
    if missing := [name for name in columns if header.count(name) != 1]:
        raise error(f"{path} is damaged: it has no single column {missing[0]}.")
    if any(len(cells) != len(header) for cells in lines):
        raise error(f"{path} is damaged: its rows are not as long as its header.")
    return [dict(zip(header, map(from_spreadsheet, cells), strict=True)) for cells in lines[1:]]


def validated(
    value: Any,
    kind: type[S],
    where: object,
    error: type[SynthCubeError],
    context: Mapping[str, Any] | None = None,
) -> S:
    """`value` as a `kind`, after its validation."""
    try:
        return kind.model_validate(value, context=context)
    except ValidationError as fault:
        raise error(f"{where} is damaged, or of another version:", faults_of(fault)) from fault


def read_record(path: Path, kind: type[S], error: type[SynthCubeError]) -> S:
    """The object in a JSON file as a `kind`, after its validation."""
    return validated(read_object(path, error), kind, path, error)


def faults_of(error: ValidationError) -> list[str]:
    """The first faults of a validation, one line each."""
    lines = []
    for fault in error.errors(include_url=False):
        place = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        lines.append(f"{place}: {message}" if place else message)
    return first_faults(lines, _FAULTS_SHOWN)


def parse(
    text: str, where: str, *, as_pyyaml: bool = False
) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """The plain values in `text`, and the line (from 1) of every key path. Raises ConfigError.

    Args:
        where: name of the file.
        as_pyyaml: allow what files for PyYAML hold as well: aliases and merge keys, which may stand
            for no more than 10,000 values, and yes, no, on and off for true and false.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"{where}: {len(text)} characters are too many, at most {_MAX_CHARACTERS} are read."
        )
    try:
        reader = _YamlReader(text, where, as_pyyaml=as_pyyaml)
        return reader.document(), reader.lines
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of an escape such as \UFFFFFFFF
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}{line}: this is not YAML: {problem}") from error


def dump(value: Mapping[str, Any]) -> str:
    """YAML text that :func:`parse` reads back as `value`."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def checked_text(text: str, at: str) -> str:
    """`text`, which can be written to a file and be the name of one. Raises ConfigError."""
    if hidden := hidden_in(text):
        raise ConfigError(f"{at}: a text holds {hidden}, which no setting needs.")
    return text


_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_OLD_BOOL = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")  # of YAML 1.1
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# YAML 1.1 reads 010 as 8, 0b11 as 3 and 1:30 as 90; YAML 1.2 reads 10 and two texts.
_AMBIGUOUS = re.compile(r"[-+]?(0[0-9_]+|0b[01_]+|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class _YamlReader:
    """Turns the events of PyYAML's parser into plain values."""

    def __init__(self, text: str, where: str, *, as_pyyaml: bool = False) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
        self.where = where
        self.as_pyyaml = as_pyyaml
        self.lines: dict[tuple[Any, ...], int] = {}
        self.anchors: dict[str, Any] = {}
        self.num_repeated = 0

    def document(self) -> Any:
        value = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self.lines:
                    raise ConfigError(f"{self._at(event)}: a second document; only one is read.")
                value = self._value(next(self.events), ())
        return value

    def _at(self, event: Any) -> str:
        return f"{self.where}, line {event.start_mark.line + 1}"

    def _value(self, event: Any, path: tuple[Any, ...]) -> Any:
        at = self._at(event)
        if not self.as_pyyaml and (isinstance(event, yaml.AliasEvent) or event.anchor):
            raise ConfigError(f"{at}: anchors and aliases (& and *) are not allowed.")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise ConfigError(f"{at}: *{event.anchor} stands for nothing above it.")
            return self._repeated(self.anchors[event.anchor], path, event)
        if event.tag:
            raise ConfigError(f"{at}: tags ({event.tag}) are not allowed: this is data only.")
        if len(path) > _MAX_DEPTH:
            raise ConfigError(f"{at}: nested more than {_MAX_DEPTH} deep.")
        self.lines.setdefault(path, event.start_mark.line + 1)
        value = self._new_value(event, path, at)
        if event.anchor:
            self.anchors[event.anchor] = value
        return value

    def _new_value(self, event: Any, path: tuple[Any, ...], at: str) -> Any:
        if isinstance(event, yaml.SequenceStartEvent):
            values: list[Any] = []
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                values.append(self._value(event, (*path, len(values))))
            return values
        if isinstance(event, yaml.MappingStartEvent):
            mapping: dict[Any, Any] = {}
            merged: dict[Any, Any] = {}
            while not isinstance(event := next(self.events), yaml.MappingEndEvent):
                if self.as_pyyaml and _is_merge(event):
                    merged = self._merged(event, path)
                    continue
                key = self._key(event, path)
                if key in mapping:
                    raise ConfigError(f"{self._at(event)}: the key {key!r} is there twice.")
                place = (*path, key)
                self.lines[place] = event.start_mark.line + 1
                mapping[key] = self._value(next(self.events), place)
            return merged | mapping  # what is merged comes first, and is overwritten
        if self.as_pyyaml and event.implicit[0] and _OLD_BOOL.fullmatch(event.value):
            return event.value.lower() in ("yes", "on")
        return _scalar(event, at)

    def _merged(self, event: Any, path: tuple[Any, ...]) -> dict[Any, Any]:
        """What a merge key (<<) brings: a mapping, or several, of which the first one counts."""
        value = self._value(next(self.events), (*path, "<<"))
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise ConfigError(f"{self._at(event)}: a merge key (<<) needs a mapping.")
        merged: dict[Any, Any] = {}
        for mapping in reversed(mappings):
            merged |= mapping
        copied: dict[Any, Any] = self._repeated(merged, path, event)
        return copied

    def _repeated(self, value: Any, path: tuple[Any, ...], event: Any) -> Any:
        """A copy of the value, whose keys are where the alias is. Small files may say much."""
        self.num_repeated += 1
        if self.num_repeated > _MAX_REPEATED:
            text = f"aliases stand for more than {_MAX_REPEATED} values: write the file in full."
            raise ConfigError(f"{self._at(event)}: {text}")
        if len(path) > _MAX_DEPTH:
            raise ConfigError(f"{self._at(event)}: nested more than {_MAX_DEPTH} deep.")
        self.lines.setdefault(path, event.start_mark.line + 1)
        if isinstance(value, dict):
            return {key: self._repeated(inner, (*path, key), event) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._repeated(v, (*path, place), event) for place, v in enumerate(value)]
        return value

    def _key(self, event: Any, path: tuple[Any, ...]) -> Any:
        at = self._at(event)
        if isinstance(event, yaml.CollectionStartEvent):
            raise ConfigError(f"{at}: a key must be a word or a number, not a list or a mapping.")
        if _is_merge(event):
            raise ConfigError(f"{at}: merge keys (<<) are not allowed.")
        key = self._value(event, path)
        if key is None:
            raise ConfigError(f"{at}: a key is missing before the colon.")
        return key


def _is_merge(event: Any) -> bool:
    is_plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
    return is_plain and event.value == "<<"


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


def _number(text: str, at: str, value: float) -> float:
    if not math.isfinite(value) or (isinstance(value, int) and abs(value) > _LARGEST_INTEGER):
        raise ConfigError(f"{at}: {_short(text)} is too large a number.")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and quotes every text that :func:`parse` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        # PyYAML would fold these as it does line breaks, and lose them
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _pattern in (_INTEGER, _FLOAT, _AMBIGUOUS):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^(?:{_pattern.pattern})$"), list("-+.0123456789")
    )


def _shown(path: Path, name: str) -> str:
    return f"{name} {path}".strip()


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"the key {key!r} is there twice")
        unique[key] = value
    return unique


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _check_plain(value: Any) -> None:
    """Raise for values that JSON or YAML allows, and no file of SynthCube holds."""
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                checked_text(item, "a value")
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number is not finite")
            elif isinstance(item, int) and abs(item) > _LARGEST_INTEGER:
                raise ValueError("a whole number is too large")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {_MAX_JSON_DEPTH} deep")
