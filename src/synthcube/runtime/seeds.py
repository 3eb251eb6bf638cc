"""Seeds that follow from others."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, the same on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
