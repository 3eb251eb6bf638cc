"""The audit log: one JSON line for each message, so that a hospital can see what left it.

A line has a time, hashes and counts. Its fields are fixed, so that no path, name of a person or
text of an error can get into it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import Field

from synthcube import reading, storage
from synthcube.errors import FederationError
from synthcube.federation.plan import Digest, SiteName
from synthcube.schema import MAX_COUNT, MAX_EXACT, Schema


class AuditLine(Schema):
    """One message of a site or of the coordinator."""

    time: str = Field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"),
        pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$",
        description="When, in UTC.",
    )
    event: Literal["sent", "received", "refused"] = Field(description="What became of it.")
    kind: Literal["facts", "agreement", "weights", "average"] = Field(description="Its content.")
    site: SiteName = Field(description="Label of the site in the federation.")
    round: int = Field(ge=0, le=MAX_COUNT, description="Round, from 1; 0: before the first.")
    plan: Digest = Field(description="Hash of the plan.")
    sha256: Digest = Field(description="Hash of the message.")
    bytes: int = Field(ge=0, le=MAX_EXACT, description="Size of the message.")
    images: int = Field(ge=0, le=MAX_COUNT, description="Images that the message stands for.")
    epsilon: float | None = Field(
        default=None, ge=0, description="What a private site has spent with these weights."
    )


def append(path: Path, line: AuditLine) -> None:
    """Add a line to an audit log, on the disk before this returns; a cut-off line stays apart."""
    with storage.storage_errors(path), path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.model_dump_json(exclude_none=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[AuditLine]:
    """The complete lines of an audit log."""
    if not path.exists():
        return []
    lines = reading.read_text(path, FederationError, limit=reading.MAX_LIST_BYTES).splitlines()
    parsed = []
    for line in lines:
        with suppress(ValueError):  # a kill cut it off
            parsed.append(AuditLine.model_validate_json(line))
    return parsed
