"""Writing so that a kill at any moment leaves the last good state."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from synthcube.errors import OutputError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


@contextmanager
def explained(path: Path, name: str = "") -> Iterator[None]:
    """Turn an operating system error while writing `path` into an :class:`OutputError`.

    Args:
        name: the parameter that `path` was given as, if it was.
    """
    try:
        yield
    except OSError as error:
        reason = _FULL.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(
            f"Cannot write {_called(path, name)}: {reason}. What was there before is unchanged."
        ) from error
    except UnicodeEncodeError as error:
        raise OutputError(
            f"Cannot write {_called(path, name)}: what it would hold is not UTF-8 near "
            f"{error.object[max(0, error.start - 60) : error.end]!r}; rename the file or folder. "
            "What was there before is unchanged."
        ) from error


def make_folder(path: Path, name: str = "") -> Path:
    """Create `path` and its parents, and prove that it can be written.

    Args:
        name: the parameter that `path` was given as, if it was.

    Raises:
        OutputError: it is a file, or not writable.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(
            f"Cannot write to {_called(path, name)}: it is a file, a folder is needed."
        )
    with explained(path, name):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    return path


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step."""
    with explained(path):
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step."""
    write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_mounted(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step; in place where it is a mount, as MedPerf's outputs are.

    A mount cannot be replaced, and the folder that it is in may not be writable. Where there is
    no such file, its folder is made as well.
    """
    if not path.exists():
        make_folder(path.parent)
    try:
        write_text(path, text)
    except OutputError as error:
        number = getattr(error.__cause__, "errno", None)
        if not path.is_file() or number not in (
            errno.EBUSY,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
        ):
            raise
        with explained(path), path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file in one step; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, sort_keys=False) + "\n")


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` once it is complete.

    A kill between the two renames leaves the old folder under the name that
    :func:`recovered_folder` looks for.
    """
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            yield staging
            staging.chmod(0o777 & ~_umask())
            previous = _previous(target)
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                target.rename(previous)
            staging.rename(target)
            shutil.rmtree(previous, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def recovered_folder(target: Path) -> Path:
    """`target`, or what :func:`replaced_folder` had set aside when it was killed."""
    previous = _previous(target)
    return previous if previous.is_dir() and not target.exists() else target


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _called(path: Path, name: str) -> str:
    return f"{name} {path}".strip()


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
