"""ONNX: the format that most other tools read, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt
import torch
from torch import nn

from synthcube.errors import ArtifactError
from synthcube.sharing.channels_last import channels_last_layers
from synthcube.sharing.runtimes import Runtime, Weights, imported

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from synthcube.sharing.runtimes import Shapes

_OPSET = 20
_LARGEST_BYTES = 2**30
"""Larger weights go into a file of their own: one ONNX file holds at most 2 GiB."""


class OnnxRuntime(Runtime):
    device = "cpu"
    weights: ClassVar[tuple[Weights, ...]] = ("float32",)
    suffixes = (".onnx", ".onnx.data")

    def version(self) -> str:
        return str(_onnxruntime().__version__)

    def rewritten(self, network: nn.Module, weights: Weights) -> AbstractContextManager[None]:
        return channels_last_layers(network)

    def save(
        self, program: ExportedProgram, shapes: Shapes, folder: Path, stem: str, weights: Weights
    ) -> None:
        # torch imports it
        imported(
            "onnxscript", "Converting for onnx needs onnxscript: pip install 'synthcube[onnx]'."
        )
        size = sum(weight.nbytes for weight in program.state_dict.values())
        path = folder / f"{stem}.onnx"
        with _quiet():
            exported: Any = torch.onnx.export(
                program, (), dynamo=True, verbose=False, opset_version=_OPSET,
                input_names=[f"input_{index}" for index in range(len(shapes))],
            )  # fmt: skip
            for node in exported.model.graph.all_nodes():
                node.metadata_props.clear()  # names of source files on this machine
            exported.save(path, external_data=size > _LARGEST_BYTES)

    def session(self, folder: Path, stem: str) -> Session:
        return Session(folder, stem)


RUNTIME = OnnxRuntime()


class Session:
    """A converted network on the CPU, with as many threads as torch has."""

    def __init__(self, folder: Path, stem: str) -> None:
        path = folder / f"{stem}.onnx"
        _check_locations(path)
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        # Without inputs that no result depends on.
        self._names = {node.name for node in self._session.get_inputs()}

    def __call__(self, values: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        named = {f"input_{index}": value for index, value in enumerate(values)}
        fed = {name: value for name, value in named.items() if name in self._names}
        return [torch.from_numpy(array) for array in self._session.run(None, fed)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide messages of torch that are for its developers."""
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        chatter.setLevel(level)


def _onnxruntime() -> Any:
    return imported("onnxruntime", "ONNX Runtime is not installed: pip install 'synthcube[onnx]'.")


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


def _check_locations(path: Path) -> None:
    """Refuse a graph whose weights are neither in it nor in the file beside it.

    Old versions of ONNX Runtime open whatever file a graph names, and take numbers for addresses
    in memory. This reads just enough of the format (protocol buffers) to find such names, and
    refuses what it cannot read.
    """
    allowed = f"{path.name}.data".encode()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            locations = set(_locations(data, 0, len(data), 0))
    except (IndexError, OSError, RecursionError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged: download it again, or export the model again."
        ) from error
    if strange := sorted(locations - {allowed}):
        named = ", ".join(location.decode(errors="replace") for location in strange)
        raise ArtifactError(
            f"{path} takes its weights from {named}: only {path.name}.data beside it is opened."
        )


def _locations(data: mmap.mmap, start: int, end: int, message: int) -> Iterator[bytes]:
    if message == _ENTRY:
        parts = {field: data[a:b] for field, a, b in _fields(data, start, end)}
        if parts.get(_KEY) == b"location":
            yield parts.get(_VALUE, b"")
        return
    for field, inner_start, inner_end in _fields(data, start, end):
        if field in _INSIDE[message]:
            yield from _locations(data, inner_start, inner_end, _INSIDE[message][field])


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field with a length."""
    offset = start
    while offset < end:
        tag, offset = _number(data, offset)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            _, offset = _number(data, offset)
        elif wire in _FIXED:
            offset += _FIXED[wire]
        elif wire == 2:
            length, offset = _number(data, offset)
            yield field, offset, offset + length
            offset += length
        else:
            raise ValueError(f"wire type {wire}")
        if offset > end:
            raise ValueError("a field is longer than what it is in")


def _number(data: mmap.mmap, offset: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[offset]
        value |= (byte & 127) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 128:
            return value, offset
    raise ValueError("a number is longer than any")
