"""Folders that belong to the user, not to a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where caches may be kept: SYNTHCUBE_CACHE, the user's cache folder, or a temporary one."""
    if chosen := environment.get("SYNTHCUBE_CACHE"):
        return Path(chosen)
    if base := environment.get("XDG_CACHE_HOME"):
        return Path(base) / "synthcube"
    home = environment.get("HOME", "")
    if home and os.access(home, os.W_OK):
        return Path(home) / ".cache" / "synthcube"
    return Path(tempfile.gettempdir()) / "synthcube-cache"
