"""The weights that travel: a safetensors file with the plan, the agreement, the round, a count."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from synthcube import reading, storage
from synthcube.errors import FederationError
from synthcube.federation.plan import Digest, SiteName
from synthcube.schema import MAX_COUNT, Schema, SpentPrivacy

_HEADER = "federation"
_MAX_HEADER_BYTES = 1 << 26


class UpdateHeader(Schema):
    """What an update says of itself."""

    plan: Digest = Field(description="Hash of the plan.")
    agreement: Digest = Field(description="Hash of the agreement.")
    round: int = Field(ge=0, le=MAX_COUNT, description="Round, from 1; 0: before the first.")
    images: int = Field(le=MAX_COUNT, description="Training images that the weights come from.")
    constants: Digest = Field(description="Hash of the whole numbers that stay at a site.")
    privacy: dict[SiteName, SpentPrivacy] = Field(
        default={},
        description="What a private site has spent; in an average, of all sites that ever sent.",
    )


@dataclass(frozen=True, slots=True)
class Update:
    """Floating-point weights by name, and what they are."""

    header: UpdateHeader
    tensors: Mapping[str, Tensor]


def write_update(path: Path, update: Update) -> None:
    """Write an update in one step; it holds numbers and the header, nothing else."""
    metadata = {_HEADER: update.header.model_dump_json()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in update.tensors.items()}
    storage.write_with(path, partial(save_file, tensors, metadata=metadata))


def read_header(path: Path) -> UpdateHeader:
    """What the update in a file says of itself; errors as in :func:`read_update`."""
    with _damages_explained():
        with reading.open_file(path, FederationError) as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise FederationError("An update is refused: its header is too long.")
        with safe_open(path, "pt") as content:
            metadata = content.metadata() or {}
        return UpdateHeader.model_validate(json.loads(metadata[_HEADER]))


def read_update(path: Path) -> Update:
    """The update in a file, which is only parsed, never run.

    Raises FederationError if it is damaged or no update, without a path or any text of the file:
    the message may reach other sites.
    """
    header = read_header(path)
    with _damages_explained():
        return Update(header, load_file(path))


@contextmanager
def _damages_explained() -> Iterator[None]:
    """Turn what a damaged file raises into a FederationError."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError, ValidationError, struct.error) as error:
        raise FederationError(
            f"An update is refused: it is damaged, or no update ({type(error).__name__})."
        ) from error


def read_average(path: Path, plan: str, agreement: str, number: int) -> Update:
    """The average of a round, after a check that it is of this plan, agreement and round.

    Raises FederationError.
    """
    average = read_update(path)
    header = average.header
    expected = {"plan": plan, "agreement": agreement, "round": number}
    faults = [
        f"{key} {str(getattr(header, key))[:12]}, and {str(value)[:12]} is needed"
        for key, value in expected.items()
        if getattr(header, key) != value
    ]
    if faults:
        raise FederationError("An average is refused:", faults)
    return average


def are_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    return bool(torch.isfinite(tensor).all())
