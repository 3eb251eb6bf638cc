"""Audit: what a site of a federation has sent and received, compared with what the server says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from synthcube import reading
from synthcube.errors import FederationError, first_faults
from synthcube.federation import audit
from synthcube.federation.audit import AuditLine
from synthcube.federation.coordinator import AUDIT, ROUNDS
from synthcube.federation.messages import RoundRecords

_SHOWN = 12  # characters of a hash


def audit_table(folder: Path, server: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """The audit log of a site as a table: the titles of its columns, and its rows.

    Args:
        folder: of the site, or of the coordinator; or its audit.jsonl.
        server: folder of the coordinator, or its audit.jsonl, to compare the site's with.

    Raises:
        FederationError: there is no log, or the server says something else.
    """
    lines = _read(folder)
    if server:
        faults = [*_differences(lines, _read(server)), *_unsent(lines, server)]
        if faults:
            raise FederationError(
                f"The audit log of {folder} differs from that of {server}:", first_faults(faults)
            )
    is_private = any(line.epsilon is not None for line in lines)
    titles = ["time (UTC)", "what", "round", "bytes", "SHA-256", "images"]
    rows = [
        [
            line.time.partition("+")[0].replace("T", " "), f"{line.event} {line.kind}",
            str(line.round or ""), f"{line.bytes:,}", line.sha256[:_SHOWN], str(line.images),
            *([_rounded_up(line.epsilon)] if is_private else []),
        ]
        for line in lines
    ]  # fmt: skip
    return [*titles, *(["epsilon"] if is_private else [])], rows


def _read(path: Path) -> list[AuditLine]:
    file = path if path.suffix == ".jsonl" else path / AUDIT
    if not file.is_file():
        raise FederationError(
            f"{file}: there is no audit log. Give the folder of synthcube federate join or serve, "
            "or sites/SITE of a simulation."
        )
    return audit.read(file)


def _differences(site: Sequence[AuditLine], server: Sequence[AuditLine]) -> Iterator[str]:
    """What the logs of a site and of the server say otherwise."""
    labels = sorted({line.site for line in site})
    if len(labels) != 1:
        yield f"{len(labels)} sites are in the first: give the log of one site"
        return
    of_site = [line for line in server if line.site == labels[0]]
    ours, theirs = {_key(line) for line in site}, {_key(line) for line in of_site}
    messages = {(line.kind, line.round) for line in of_site}
    for line in site:
        if _key(line) in theirs:
            continue
        if (line.kind, line.round) in messages:
            yield f"{_described(line)}: the server says another hash"
        elif line.event == "sent":  # a kill may have kept the server from noting what it sent
            yield f"{_described(line)}: the server does not say that it came"
    for line in of_site:
        # What it refused may have been cut off, and then has another hash.
        if line.event == "received" and _key(line) not in ours:
            yield f"{_described(line)} by the server: the site does not say that it sent it"


def _unsent(site: Sequence[AuditLine], server: Path) -> Iterator[str]:
    """Rounds that the server's rounds.json counts the site in, and that it sent nothing in."""
    path = server / ROUNDS
    if not path.is_file():
        return
    records = reading.read_record(path, RoundRecords, FederationError).rounds
    sent = {
        (line.round, line.images) for line in site if (line.event, line.kind) == ("sent", "weights")
    }
    for record in records:
        for label in {line.site for line in site} & record.sites.keys():
            if (record.round, images := record.sites[label]) not in sent:
                yield f"round {record.round}: {images} images by {ROUNDS}, and it sent no such"


def _key(line: AuditLine) -> tuple[str, int, str]:
    return line.kind, line.round, line.sha256


def _rounded_up(epsilon: float | None) -> str:
    return "" if epsilon is None else f"{math.ceil(100 * epsilon) / 100:g}"


def _described(line: AuditLine) -> str:
    where = f" of round {line.round}" if line.round else ""
    return f"{line.event} {line.kind}{where}, SHA-256 {line.sha256[:_SHOWN]}"
