"""What travels inside Flower's messages: JSON as on our own network, and the file of an update."""

from __future__ import annotations

import struct
from typing import TypeVar

from pydantic import Field, ValidationError

from synthcube.errors import FederationError
from synthcube.federation.agreement import Agreement, SiteFacts
from synthcube.federation.messages import MAX_MESSAGE_BYTES, Refusal, SiteFault, State
from synthcube.federation.plan import Digest
from synthcube.schema import Schema

M = TypeVar("M", bound=Schema)

_LENGTH = struct.Struct(">I")


class Order(Schema):
    """What the coordinator asks of a site; the average of the round before may follow."""

    nonce: Digest = Field(description="Random; an answer without it is not from this site.")
    state: State = Field(description="Where the federation stands, for this site.")
    agreement: Agreement | None = Field(default=None, description="Of all sites, once there is.")
    refusal: Refusal | None = Field(default=None, description="Of what the site sent last.")


class Answer(Schema):
    """What a site replies; the file of its update may follow."""

    nonce: Digest = Field(description="That of the order.")
    facts: SiteFacts | None = Field(default=None, description="Of its data, before the agreement.")
    fault: SiteFault | None = Field(default=None, description="The kind of its error.")
    update_sha256: Digest | None = Field(default=None, description="Hash of the file that follows.")


def encoded(message: Schema, file: bytes = b"") -> bytes:
    """A message, its length before it, and a file after it."""
    text = message.model_dump_json().encode()
    return _LENGTH.pack(len(text)) + text + file


def decoded(content: bytes, kind: type[M]) -> tuple[M, bytes]:
    """The message and the file that :func:`encoded` has joined.

    Raises FederationError, without any text of the content.
    """
    try:
        (length,) = _LENGTH.unpack_from(content)
        if length > MAX_MESSAGE_BYTES or len(content) < _LENGTH.size + length:
            raise ValueError("cut off, or too long")
        end = _LENGTH.size + length
        return kind.model_validate_json(content[_LENGTH.size : end]), content[end:]
    except (struct.error, ValueError, ValidationError) as error:
        raise FederationError(f"A message is refused: it is no {kind.__name__}.") from error
