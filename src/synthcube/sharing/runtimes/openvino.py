"""OpenVINO: networks for Intel's and other CPUs."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from synthcube.sharing.channels_last import channels_last_layers
from synthcube.sharing.runtimes import Runtime, Weights, imported

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from synthcube.sharing.runtimes import Shapes

_NUM_COMPILED = 4
"""Batch sizes for which a network stays compiled."""


class OpenVino(Runtime):
    device = "cpu"
    weights: ClassVar[tuple[Weights, ...]] = ("float32", "float16", "int8")
    suffixes = (".xml", ".bin")

    def version(self) -> str:
        return str(_openvino().__version__)

    def rewritten(self, network: nn.Module, weights: Weights) -> AbstractContextManager[None]:
        # OpenVINO 2026.4 computes convolutions of kernel size 1 wrongly with weights in 8 bits.
        return nullcontext() if weights == "int8" else channels_last_layers(network)

    def save(
        self, program: ExportedProgram, shapes: Shapes, folder: Path, stem: str, weights: Weights
    ) -> None:
        ov = _openvino()
        model = ov.convert_model(program)
        # The conversion makes every length dynamic, also those that do not change.
        model.reshape(
            {
                port: ov.PartialShape([-1 if length is None else length for length in shape])
                for port, shape in zip(model.inputs, shapes, strict=True)
            }
        )
        if weights == "int8":
            model = _in_8_bits(model)
        ov.save_model(model, folder / f"{stem}.xml", compress_to_fp16=weights == "float16")

    def session(self, folder: Path, stem: str) -> Session:
        return Session(folder, stem)


RUNTIME = OpenVino()


class Session:
    """A converted network on the CPU, with as many threads as torch has.

    It is compiled for each batch size: with a dynamic one, OpenVINO takes twice as long for some
    networks.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        path = folder / f"{stem}.xml"
        self._model = _core().read_model(path, path.with_suffix(".bin"))
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, values: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        batches = tuple(value.shape[0] for value in values)
        if batches not in self._compiled:
            if len(self._compiled) == _NUM_COMPILED:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[batches] = self._compile(batches)
        outputs = self._compiled[batches](list(values))
        return [torch.from_numpy(np.asarray(output)) for output in outputs.values()]

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
    """The only OpenVINO core of this process, which is never deleted.

    Each core sets its own signal stack, and frees it when it is deleted (2026.4). With several
    cores the process may be left with a freed stack: the next signal that Python handles, such as
    Ctrl-C or the end of a child, would then kill it.
    """
    return _openvino().Core()


def _openvino() -> Any:
    return imported("openvino", "OpenVINO is not installed: pip install 'synthcube[openvino]'.")


def _in_8_bits(model: Any) -> Any:
    nncf = imported("nncf", "--runtime_weights int8 needs nncf: pip install 'synthcube[int8]'.")
    # Not nncf.set_log_level: that changes the handlers as well, which others may share.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar
        return nncf.compress_weights(model)
