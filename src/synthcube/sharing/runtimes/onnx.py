"""ONNX: the format that most other tools read, run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from synthcube import environment
from synthcube.errors import ConfigError
from synthcube.sharing.runtimes.external_data import check_locations

if TYPE_CHECKING:
    from torch.export import ExportedProgram

WEIGHTS = ("float32",)
SUFFIXES = (".onnx", ".onnx.data")

_OPSET = 20
_LARGEST_BYTES = 2**30
"""Weights above this lie beside the graph: the format itself ends at 2 GiB."""


def version() -> str:
    """Of the installed ONNX Runtime.

    Raises:
        ConfigError: there is none.
    """
    found: str = _onnxruntime().__version__
    return found


def save(
    program: ExportedProgram,
    shapes: Sequence[Sequence[int | None]],
    folder: Path,
    stem: str,
    weights: str,
) -> None:
    """Write a network's .onnx, and .onnx.data where it is large.

    Args:
        shapes: of its tensors, None along axes whose length may change.
    """
    try:
        import onnxscript  # noqa: F401  # torch asks for it
    except ImportError as error:
        raise ConfigError(
            "Converting for onnx needs onnxscript: pip install 'synthcube[onnx]'."
        ) from error
    size = sum(each.nbytes for each in program.state_dict.values())
    path = folder / f"{stem}.onnx"
    with _quiet():
        made: Any = torch.onnx.export(
            program, (), dynamo=True, verbose=False, opset_version=_OPSET,
            input_names=[f"input_{place}" for place in range(len(shapes))],
        )  # fmt: skip
        for node in made.model.graph.all_nodes():
            node.metadata_props.clear()  # where in whose files each is from
        made.save(path, external_data=size > _LARGEST_BYTES)


class Session:
    """A converted network, on the CPU, with the threads that torch has."""

    def __init__(self, folder: Path, stem: str) -> None:
        path = folder / f"{stem}.onnx"
        check_locations(path)
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        # An input that no result depends on is not there any more.
        self._names = {each.name for each in self._session.get_inputs()}

    def __call__(self, values: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        named = {f"input_{place}": value for place, value in enumerate(values)}
        fed = {name: value for name, value in named.items() if name in self._names}
        return [torch.from_numpy(each) for each in self._session.run(None, fed)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of packages and steps, which is for its developers."""
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        chatter.setLevel(level)


def _onnxruntime() -> Any:
    environment.keep_conversions_local()
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "ONNX Runtime is not installed: pip install 'synthcube[onnx]'."
        ) from error
    return onnxruntime
