"""Content hashes of image files, remembered for as long as a file looks unchanged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from synthcube.storage import make_folder, write_json


def content_digests(paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """Content hashes; a file that is the same to the file system is not read again.

    Its times are that of its content, which anybody may set, and that of its change, which nobody
    may.
    """
    memo_path = root / "digests.json"
    try:
        memo = dict(json.loads(memo_path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        memo = {}
    found: dict[Path, str] = {}
    fresh: dict[str, str] = {}
    for path in paths:
        try:
            stat = path.stat()
            name = "|".join(
                map(str, (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
            )
            found[path] = memo.get(name) or fresh.setdefault(name, _digest(path))
        except OSError:
            found[path] = os.urandom(16).hex()  # in no cache; reading the image says why
    if fresh:
        make_folder(root)
        write_json(memo_path, memo | fresh)
    return found


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
