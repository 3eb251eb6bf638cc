"""Other runtimes than torch for a model's networks: ONNX Runtime and OpenVINO.

The networks are converted, one by one, and the samplers stay what they are, in Python: a model
that computes with a runtime is the same model, whose networks are called elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from synthcube.errors import ConfigError
from synthcube.schema import MAX_COUNT, MAX_VOXELS, List, Schema
from synthcube.sharing.config import Runtime, Weights
from synthcube.sharing.runtimes import onnx, openvino

FORMATS: dict[Runtime, Any] = {"onnx": onnx, "openvino": openvino}
RUNTIMES: tuple[Runtime, ...] = tuple(FORMATS)


class Input(Schema):
    """One of the tensors or plain values that a network is called with, in their order."""

    shape: List[Annotated[int, Field(ge=0, le=MAX_VOXELS)] | None] | None = Field(
        default=None,
        description="Of a tensor; null along axes whose length may change, the batch first.",
    )
    constant: bool | Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT)] | float | str | None = (
        Field(default=None, description="What is given in place of a tensor, always the same.")
    )


class Converted(Schema):
    """The record of a conversion, RUNTIME.json beside the networks."""

    runtime: Runtime
    version: str = Field(description="Of the runtime that the conversion was checked with.")
    weights: Weights = Field(description="How weights are stored; they are computed in float32.")
    largest_difference: float = Field(
        description="Of images from those of torch, of the whole range, through the whole sampler."
    )
    mean_difference: float = Field(description="Likewise, the mean over all voxels.")
    networks: dict[str, List[Input]] = Field(
        description="What each converted network is called with, by its path in the model."
    )


def is_installed(runtime: Runtime) -> bool:
    """Whether networks can be computed with it here."""
    try:
        FORMATS[runtime].version()
    except ConfigError:
        return False
    return True


def record_name(runtime: Runtime) -> str:
    """Name of the record of a conversion."""
    return f"{runtime}.json"


def is_part(name: str, *runtimes: Runtime) -> bool:
    """Whether a file of an exported folder belongs to a conversion, for those runtimes or any."""
    return any(
        name == record_name(each)
        or (name.startswith(f"{each}.") and name.endswith(FORMATS[each].SUFFIXES))
        for each in runtimes or RUNTIMES
    )
