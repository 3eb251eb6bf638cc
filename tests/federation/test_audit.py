"""The audit log: what a hospital can read of what left it, and what never gets into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from synthcube.federation import audit
from synthcube.federation.audit import AuditLine

LINE = {
    "event": "sent", "kind": "weights", "site": "site-1", "round": 1, "plan": "a" * 64,
    "sha256": "b" * 64, "bytes": 12, "images": 3,
}  # fmt: skip


def test_lines_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in (1, 2):
        audit.append(path, AuditLine.model_validate({**LINE, "round": number}))
    assert [line.round for line in audit.read(path)] == [1, 2]
    assert audit.read(path)[0].time.endswith("+00:00")


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit.append(path, AuditLine.model_validate(LINE))
    path.write_bytes(path.read_bytes() + b'{"time": "2026-')
    audit.append(path, AuditLine.model_validate({**LINE, "round": 2}))
    assert [line.round for line in audit.read(path)] == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "/data/Erika Mustermann"}, {"sha256": "No such file: /data/p1.nii.gz"},
        {"kind": "Traceback"}, {"path": "/data"}, {"time": "Erika"},
    ],
)  # fmt: skip
def test_a_line_has_no_place_for_a_path_or_a_text(changes: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        AuditLine.model_validate({**LINE, **changes})
