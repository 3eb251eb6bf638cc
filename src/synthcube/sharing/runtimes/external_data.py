"""Where an ONNX graph says that its weights are: other files than its own are refused.

Older versions of ONNX Runtime open whatever a graph names, and take numbers for addresses in the
memory. This reads as much of the format (protocol buffers) as tells of such names, and trusts it
with nothing: what cannot be read is refused as well.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from synthcube.errors import ArtifactError

# By message, the fields that hold messages, in onnx.proto.
_GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _ENTRY = range(1, 8)
_INSIDE: dict[int, dict[int, int]] = {
    0: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _TENSOR: {13: _ENTRY},
    _ENTRY: {},
}
_FIXED = {1: 8, 5: 4}
_KEY, _VALUE = 1, 2


def check_locations(path: Path) -> None:
    """See that the weights of the graph at `path` are in it, or in the file beside it.

    Raises:
        ArtifactError: they are elsewhere, or the file is no graph.
    """
    allowed = f"{path.name}.data".encode()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = set(_locations(data, 0, len(data), 0))
    except (IndexError, OSError, RecursionError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: get it again, or export anew.") from error
    if strange := sorted(found - {allowed}):
        named = ", ".join(each.decode(errors="replace") for each in strange)
        raise ArtifactError(
            f"{path} takes its weights from {named}: only {path.name}.data beside it is opened."
        )


def _locations(data: mmap.mmap, start: int, end: int, kind: int) -> Iterator[bytes]:
    if kind == _ENTRY:
        parts = {field: data[a:b] for field, a, b in _fields(data, start, end)}
        if parts.get(_KEY) == b"location":
            yield parts.get(_VALUE, b"")
        return
    for field, inner_start, inner_end in _fields(data, start, end):
        if field in _INSIDE[kind]:
            yield from _locations(data, inner_start, inner_end, _INSIDE[kind][field])


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field with a length."""
    place = start
    while place < end:
        tag, place = _number(data, place)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            _, place = _number(data, place)
        elif wire in _FIXED:
            place += _FIXED[wire]
        elif wire == 2:
            length, place = _number(data, place)
            yield field, place, place + length
            place += length
        else:
            raise ValueError(f"wire type {wire}")
        if place > end:
            raise ValueError("a field is longer than what it is in")


def _number(data: mmap.mmap, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError("a number is longer than any")
