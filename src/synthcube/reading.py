"""Reads files that were given: regular ones, up to a limit, as data that is checked.

All metadata of artifacts, runs and prepared images comes through here, as a user's YAML does: every
fault ends in one sentence, and nothing is read without a bound.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import ValidationError

from synthcube import yaml_text
from synthcube.errors import ConfigError, SynthCubeError
from synthcube.escapes import from_spreadsheet
from synthcube.schema import Schema

S = TypeVar("S", bound=Schema)

MAX_BYTES = 1 << 24
"""Size of a file that describes one thing: a config, an index, a card."""
MAX_LIST_BYTES = 1 << 28
"""Size of a file with an entry for each image."""

_MAX_DEPTH = 40
_LARGEST_INTEGER = 2**64 - 1
_SHOWN = 10


def open_file(path: Path, error: type[SynthCubeError], name: str = "") -> BinaryIO:
    """Open a regular file to read; a pipe, a device, a socket or a folder is refused at once.

    Args:
        error: what is raised where it cannot be opened.
        name: the parameter that `path` was given as, if it was.
    """
    called = f"{name} {path}".strip()
    try:
        # without O_NONBLOCK a pipe would wait for its other end, before it can be told apart
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name
        reason = getattr(fault, "strerror", None) or str(fault)
        raise error(f"{called}: {reason}.") from fault
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        kind = "Is a directory" if Path(path).is_dir() else "this is a pipe or a device"
        raise error(f"{called}: {kind}; a regular file is needed.")
    return os.fdopen(handle, "rb")


def check_checkpoint(path: Path, error: type[SynthCubeError]) -> None:
    """Refuse a file that torch would wait for, or that unpacks to more than it is itself."""
    with open_file(path, error) as file, contextlib.suppress(zipfile.BadZipFile):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                packed = [each.filename for each in archive.infolist() if each.compress_type]
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
            raise error(f"{name} {path} cannot be read: {fault.strerror}.".strip()) from fault
    if len(content) > limit:
        raise error(f"{f'{name} {path}'.strip()} is larger than {limit >> 20} MB: it is not read.")
    return content


def read_text(
    path: Path, error: type[SynthCubeError], *, limit: int = MAX_BYTES, name: str = ""
) -> str:
    """The content of a text file in UTF-8."""
    try:
        return read_bytes(path, error, limit=limit, name=name).decode("utf-8")
    except UnicodeDecodeError as fault:
        called = f"{name} {path}".strip()
        raise error(
            f"{called}: this is not a text file (byte {fault.start} is not UTF-8)."
        ) from fault


def read_json(path: Path, error: type[SynthCubeError], *, limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file: finite numbers, no key twice, not too deep."""
    text = read_text(path, error, limit=limit)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        _check_plain(value)
    except RecursionError as fault:
        raise error(f"{path} cannot be read: nested more than {_MAX_DEPTH} deep.") from fault
    except (ValueError, ConfigError) as fault:
        raise error(f"{path} cannot be read: this is not JSON as it should be: {fault}") from fault
    return value


def read_object(
    path: Path, error: type[SynthCubeError], *, limit: int = MAX_BYTES
) -> dict[str, Any]:
    """Likewise, where an object is needed."""
    value = read_json(path, error, limit=limit)
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object.")
    return value


def read_yaml(path: Path, error: type[SynthCubeError], *, name: str = "") -> dict[Any, Any]:
    """The mapping in a YAML file, see :func:`yaml_text.parse`."""
    text = read_text(path, error, name=name)
    try:
        value, _ = yaml_text.parse(text, f"{name} {path}".strip())
        _check_plain(value)
    except ConfigError as fault:
        raise error(str(fault)) from fault
    except ValueError as fault:
        raise error(f"{f'{name} {path}'.strip()}: {fault}.") from fault
    if not isinstance(value, dict):
        raise error(f"{f'{name} {path}'.strip()}: this is not a mapping of keys to values.")
    return value


def validated(
    value: Any,
    kind: type[S],
    where: object,
    error: type[SynthCubeError],
    context: Mapping[str, Any] | None = None,
) -> S:
    """`value` as a `kind`."""
    try:
        return kind.model_validate(value, context=context)
    except ValidationError as fault:
        raise error(f"{where} is damaged, or of another version:", faults_of(fault)) from fault


def faults_of(fault: ValidationError) -> list[str]:
    """What a validation found, a line each."""
    lines = []
    for each in fault.errors(include_url=False):
        place = ".".join(map(str, each["loc"]))
        message = each["msg"].removeprefix("Value error, ")
        lines.append(f"{place}: {message}" if place else message)
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]


def read_rows(
    path: Path, columns: Collection[str], error: type[SynthCubeError]
) -> list[dict[str, str]]:
    """The rows of a CSV that SynthCube wrote, which has at least these columns."""
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


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _check_plain(value: Any) -> None:
    """Refuse what JSON allows and no file of ours has."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                yaml_text.checked_text(item, "a value")
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number is not finite")
            elif isinstance(item, int) and abs(item) > _LARGEST_INTEGER:
                raise ValueError("a whole number is too large")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")
