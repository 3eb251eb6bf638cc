"""What a hospital reads of its audit log, and what it is told where the server says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from synthcube.errors import FederationError
from synthcube.federation import audit
from synthcube.federation.audit import AuditLine
from synthcube.tasks.federation_audit import audit_table

SENT = [("sent", "facts", 0), ("received", "agreement", 0), ("sent", "weights", 1),
        ("received", "average", 1), ("sent", "weights", 2)]  # fmt: skip
OPPOSITE = {"sent": "received", "received": "sent"}


def line(event: str, kind: str, number: int, **changes: Any) -> AuditLine:
    values = {
        "event": event, "kind": kind, "site": "site-1", "round": number, "plan": "f" * 64,
        "sha256": f"{number}{kind[0]}".encode().hex().ljust(64, "0"), "bytes": 5538624,
        "images": 21, **changes,
    }  # fmt: skip
    return AuditLine.model_validate(values)


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a site and of a server, that say the same."""
    site, server = tmp_path / "site", tmp_path / "server"
    for folder in (site, server):
        folder.mkdir()
    for event, kind, number in SENT:
        audit.append(site / "audit.jsonl", line(event, kind, number, epsilon=1.234))
        audit.append(server / "audit.jsonl", line(OPPOSITE[event], kind, number))
    audit.append(server / "audit.jsonl", line("received", "weights", 1, site="site-2"))
    audit.append(server / "audit.jsonl", line("refused", "weights", 2, sha256="0" * 64))
    records = [{"round": number, "sites": {"site-1": 21}} for number in (1, 2)]
    (server / "rounds.json").write_text(json.dumps({"rounds": records}))
    return site, server


def test_a_log_is_a_table_that_can_be_read(logs: tuple[Path, Path], cli) -> None:
    site, server = logs
    code, out, errors = cli("federate", "audit", site, "--server", server)
    assert code == 0, errors
    assert "time (UTC)" in out
    (sent,) = [row for row in out.splitlines() if "sent weights" in row and " 1 " in row]
    for text in ("5,538,624", "3177", "21", "1.24"):
        assert text in sent
    assert out.splitlines()[-1] == "The server says the same."
    _, rows = audit_table(server / "audit.jsonl")
    assert len(rows) == 7


CHANGED = {
    "hash": (line("sent", "weights", 3), line("received", "weights", 3, sha256="a" * 64),
             "sent weights of round 3, .*: the server says another hash"),
    "lost": (line("sent", "weights", 3), None, "the server does not say that it came"),
    "strange": (None, line("received", "weights", 3), "the site does not say that it sent it"),
    "average": (line("received", "average", 2), line("sent", "average", 2, sha256="a" * 64),
                "received average of round 2, .*: the server says another hash"),
    "other site": (line("sent", "weights", 3, site="site-2"), None, "give the log of one site"),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "message"), CHANGED.values(), ids=CHANGED)
def test_what_the_server_says_otherwise_is_named(
    ours: AuditLine | None, theirs: AuditLine | None, message: str, logs: tuple[Path, Path]
) -> None:
    for folder, added in zip(logs, (ours, theirs), strict=True):
        if added:
            audit.append(folder / "audit.jsonl", added)
    with pytest.raises(FederationError, match=message):
        audit_table(*logs)


def test_rounds_that_count_more_images_are_named(logs: tuple[Path, Path]) -> None:
    site, server = logs
    records = [{"round": 2, "sites": {"site-1": 900}}]
    (server / "rounds.json").write_text(json.dumps({"rounds": records}))
    with pytest.raises(FederationError, match=r"round 2: 900 images by rounds.json"):
        audit_table(site, server)


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="there is no audit log"):
        audit_table(tmp_path)
