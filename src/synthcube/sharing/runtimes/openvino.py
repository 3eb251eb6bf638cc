"""OpenVINO: networks for Intel's and other CPUs."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import environment
from synthcube.errors import ConfigError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

WEIGHTS = ("float32", "float16", "int8")
SUFFIXES = (".xml", ".bin")

_AT_ONCE = 4
"""Sizes of a batch for which a network is kept compiled."""


def version() -> str:
    """Of the installed OpenVINO.

    Raises:
        ConfigError: there is none.
    """
    found: str = _openvino().__version__
    return found


def save(
    program: ExportedProgram,
    shapes: Sequence[Sequence[int | None]],
    folder: Path,
    stem: str,
    weights: str,
) -> None:
    """Write a network's .xml and .bin.

    Args:
        shapes: of its tensors, None along axes whose length may change.
    """
    ov = _openvino()
    model = ov.convert_model(program)
    # The conversion forgets even the lengths that stay.
    model.reshape(
        {
            port: ov.PartialShape([-1 if length is None else length for length in shape])
            for port, shape in zip(model.inputs, shapes, strict=True)
        }
    )
    if weights == "int8":
        model = _in_8_bits(model)
    path = folder / f"{stem}.xml"
    ov.save_model(model, path, compress_to_fp16=weights == "float16")


class Session:
    """A converted network, on the CPU, with the threads that torch has.

    It is compiled for each size of the batch: with a size that is open, OpenVINO takes twice as
    long for some networks.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        path = folder / f"{stem}.xml"
        self._model = _core().read_model(path, path.with_suffix(".bin"))
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, values: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        batches = tuple(value.shape[0] for value in values)
        if batches not in self._compiled:
            if len(self._compiled) == _AT_ONCE:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[batches] = self._compile(batches)
        made = self._compiled[batches](list(values))
        return [torch.from_numpy(np.asarray(each)) for each in made.values()]

    def _compile(self, batches: Sequence[int]) -> Any:
        model = self._model.clone()
        shapes = {}
        for port, batch in zip(model.inputs, batches, strict=True):
            shape = port.partial_shape
            shape[0] = batch
            shapes[port] = shape
        model.reshape(shapes)
        settings = {
            # By default it computes in bfloat16 where the CPU can: 8e-3 off.
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        return _core().compile_model(model, "CPU", settings)


@cache
def _core() -> Any:
    """The one of this process, which stays.

    Each has its own signal stack, and takes it along when it goes (2026.4): of several, the last
    one standing may leave the process with the stack of one that is gone. The next signal that
    Python has a handler for, as Ctrl-C, or a child's end, would then kill the process.
    """
    return _openvino().Core()


def _openvino() -> Any:
    environment.keep_conversions_local()
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            "OpenVINO is not installed: pip install 'synthcube[openvino]'."
        ) from error
    return openvino


def _in_8_bits(model: Any) -> Any:
    try:
        import nncf
    except ImportError as error:
        raise ConfigError(
            "--runtime_weights int8 needs nncf: pip install 'synthcube[int8]'."
        ) from error
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar
        return nncf.compress_weights(model)
