"""Folders that belong to the user, not to a run; and that nobody else can have prepared."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path

log = logging.getLogger("synthcube")

_CACHES = (
    "SYNTHCUBE_CACHE", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "MPLCONFIGDIR", "NUMBA_CACHE_DIR",
)  # fmt: skip
"""Variables that name folders of caches, ours and those of libraries, which run what is in some."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where caches may be kept: SYNTHCUBE_CACHE, the user's cache folder, or a temporary one.

    Where everyone may write, as in /tmp, it is a folder of this user alone.
    """
    return private(_chosen(environment))


def keep_caches_private(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let no library keep its cache where someone else could have put something; to be called
    before they are imported.
    """
    for name in _CACHES:
        if path := environment.get(name):
            environment[name] = str(private(Path(path)))


def private(path: Path) -> Path:
    """`path`, or a fresh folder that goes at the end where someone else could have prepared it.

    Below a folder that everyone may write to, such as /tmp, the first folder must be this user's,
    no link, and not for others to write to; where there is none, it is made so. A mount was put
    there by who runs the container, and is trusted.
    """
    for folder in reversed([path.absolute(), *path.absolute().parents[:-1]]):
        if _is_open(folder.parent) and not _is_own(folder):
            fresh = _fresh() / path.name
            log.warning("%s may be someone else's: %s is used until the end.", path, fresh)
            return fresh
    return path


def _chosen(environment: Mapping[str, str]) -> Path:
    if chosen := environment.get("SYNTHCUBE_CACHE"):
        return Path(chosen)
    if base := environment.get("XDG_CACHE_HOME"):
        return Path(base) / "synthcube"
    home = environment.get("HOME", "")
    if home and os.access(home, os.W_OK):
        return Path(home) / ".cache" / "synthcube"
    return Path(tempfile.gettempdir()) / f"synthcube-{os.geteuid()}"


def _is_open(folder: Path) -> bool:
    try:
        return bool(folder.stat().st_mode & stat.S_IWOTH)
    except OSError:  # there is none yet, and what is above it decides who makes it
        return False


def _is_own(folder: Path) -> bool:
    """Whether that is a folder of this user, who may be the only one to write to it."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError:  # nothing can be written here: whoever needs a cache will say so
        return True
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return False
    if folder.is_mount() or _is_shared_by_root(found):
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_shared_by_root(found: os.stat_result) -> bool:
    """One such as /var/tmp: what is below it is looked at in turn."""
    return found.st_uid == 0 and bool(found.st_mode & stat.S_ISVTX)


@cache
def _fresh() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="synthcube-"))
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not at the end of a worker
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
