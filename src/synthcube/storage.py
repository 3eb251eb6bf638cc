"""Writing so that a kill at any moment leaves the last good state, and never over an input.

What is being written has a name that begins with ``.synthcube-`` and is locked. A kill leaves it
behind; :func:`sweep` removes it, as every command does in the folders that it writes to.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from synthcube.errors import OutputError, SynthCubeError

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_PREFIX = ".synthcube-"
_TEMPORARY = re.compile(rf"{re.escape(_PREFIX)}[a-z0-9_]{{8}}(\..*)?", re.DOTALL)
_NEXT = f"{_PREFIX}next"
"""In a folder: its next content, complete, which counts from the moment it has this name."""
_OBSOLETE = ".obsolete.json"  # in that: which files of the folder go
_PROBE_BYTES = 1 << 16
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # as libraries written in Rust tell of it


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
        with tempfile.TemporaryFile(dir=path, prefix=_PREFIX):
            pass
    sweep(path)
    return path


def require_separate(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Refuse an output that is an input, holds one or lies in one, links resolved.

    Args:
        outputs: by the parameter that each was given as; None was not given.
        inputs: likewise.

    Raises:
        OutputError: all such pairs.
    """
    faults = [
        f"{name} {output} {relation} {other} {path}"
        for name, output in outputs.items()
        for other, path in inputs.items()
        if output and path and (relation := _relation(output, path))
    ]
    if faults:
        raise OutputError("What is read would be written to; give another output:", faults)


def require_own_file(path: Path, start: str, name: str) -> None:
    """Refuse to write over a file that does not begin as what is written there.

    Args:
        start: how all such files begin; an empty one, as a container's mount is, may be written.
        name: the parameter that `path` was given as.

    Raises:
        OutputError: the file is somebody else's.
    """
    if not path.is_file():
        return
    with explained(path, name), path.open("rb") as file:
        begun = file.read(len(start.encode()))
    if not start.encode().startswith(begun):
        raise OutputError(
            f"{name} {path} is a file that this command did not write: give another one."
        )


_MARKS = {
    "artifact.json": "a trained model", "provenance.json": "images that infer has made",
    "prepared.json": "prepared images", "container_config.yaml": "a package", "split.csv": "a run",
}  # fmt: skip
"""What a folder with such a file is."""


def require_own(folder: Path, mark: str, name: str) -> None:
    """Refuse a folder that another command has written.

    Args:
        mark: the file by which the asking command knows its own folders.
        name: the parameter that `folder` was given as.

    Raises:
        OutputError: whose it is.
    """
    for other, text in _MARKS.items():
        if other != mark and (folder / other).exists():
            raise OutputError(f"{name} {folder} is {text} ({other}): give another one.")


def _relation(output: Path, path: Path) -> str:
    above, below = _lies_in(path, output), _lies_in(output, path)
    if above and below:
        return "is also"
    return "holds" if above else "lies in" if below else ""


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or is below it, by whatever name the two are reached."""
    path, folder = path.resolve(), folder.resolve()
    return any(each == folder or _is_same(each, folder) for each in (path, *path.parents))


def _is_same(path: Path, other: Path) -> bool:
    try:  # a mount has several paths
        return path.samefile(other)
    except OSError:
        return False


def contents(folder: Path) -> list[str]:
    """Names of what is in a folder, without what a killed command was writing."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name != _NEXT and not _TEMPORARY.fullmatch(name))


def sweep(folder: Path) -> None:
    """Remove what a killed command was writing into `folder`; what is being written stays."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if _TEMPORARY.fullmatch(entry.name):
                _remove_dead(Path(entry.path), is_folder=entry.is_dir(follow_symlinks=False))


def _remove_dead(path: Path, *, is_folder: bool) -> None:
    with suppress(OSError):  # it is locked, or gone, or locks do not work here
        number = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(number).st_uid != os.geteuid():
                return
            if is_folder:
                shutil.rmtree(path)
            else:
                path.unlink()
        finally:
            os.close(number)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder in `parent`, removed at the end; after a kill, by the next one there.

    Args:
        parent: the system's folder of temporary files, where none is given.
    """
    parent = parent or Path(tempfile.gettempdir())
    sweep(parent)
    folder, number = _locked(lambda: _opened_folder(parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(number)


def _opened_folder(parent: Path) -> tuple[Path, int]:
    folder = tempfile.mkdtemp(dir=parent, prefix=_PREFIX)
    return Path(folder), os.open(folder, os.O_RDONLY)


def _opened_file(path: Path) -> tuple[Path, int]:
    number, name = tempfile.mkstemp(dir=path.parent, prefix=_PREFIX, suffix=path.suffix)
    return Path(name), number


def _locked(create: Callable[[], tuple[Path, int]]) -> tuple[Path, int]:
    """What `create` makes and opens, locked; made again where a sweep was faster than the lock."""
    while True:
        path, number = create()
        with suppress(OSError):  # no locks on this file system: no sweep finds it dead either
            fcntl.flock(number, fcntl.LOCK_EX)
        if os.fstat(number).st_nlink:
            return path, number
        os.close(number)


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step."""
    with explained(path):
        temporary, number = _locked(lambda: _opened_file(path))
        try:
            try:
                write(temporary)
            except SynthCubeError:
                raise
            except Exception as error:
                _require_room(number, error)
                raise
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(number)


def _require_room(number: int, error: Exception) -> None:
    """Find out whether a full disk is behind the error of a library, which each calls otherwise.

    Raises:
        OSError: the disk of the open file is full.
    """
    told = _SYSTEM_ERROR.search(str(error))
    if told and int(told[1]) in _FULL:
        raise OSError(int(told[1]), os.strerror(int(told[1]))) from error
    try:
        os.lseek(number, 0, os.SEEK_END)
        if os.write(number, bytes(_PROBE_BYTES)) < _PROBE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(number)
    except OSError as full:
        if full.errno in _FULL:
            raise full from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step."""
    write_with(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_mounted(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step; in place where it is a mount, as MedPerf's outputs are.

    A mount cannot be replaced, and the folder that it is in may not be writable. Where there is
    no such file, its folder is made as well.
    """
    if path.exists():
        sweep(path.parent)
    else:
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
def replaced_folder(target: Path, earlier: Iterable[str] = ()) -> Iterator[Path]:
    """Yield an empty folder whose files become those of `target` once all of them are there.

    `target` may be a mount, and what else is in it stays. After a kill :func:`recovered_folder` is
    where its last good content is, and the next call here brings that into its place.

    Args:
        earlier: names, relative to `target`, of what an earlier call wrote; those that are not
            written again are removed.
    """
    if not target.is_dir():
        make_folder(target.parent)
        with explained(target), scratch_folder(target.parent) as staging:
            yield staging
            staging.chmod(0o777 & ~_umask())
            staging.rename(target)
        return
    make_folder(target)
    settle(target)
    with explained(target), scratch_folder(target) as staging:
        yield staging
        files = {path.relative_to(staging).as_posix() for path in _files(staging)}
        write_json(staging / _OBSOLETE, sorted({*earlier} - files))
        staging.chmod(0o777 & ~_umask())
        staging.rename(target / _NEXT)
        settle(target)


def settle(target: Path) -> None:
    """Bring the next content of a folder, if it has any, into its place.

    Raises:
        OutputError: it cannot be written.
    """
    following = target / _NEXT
    if not following.is_dir():
        return
    with explained(target), scratch_folder(target) as outdated:
        files = _files(following)
        for parent in {target / path.parent.relative_to(following) for path in files}:
            sweep(parent)  # of a call before this one that was killed here
        for path in files:
            place = target / path.relative_to(following)
            if path.name != _OBSOLETE:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_with(place, partial(link_or_copy, path))
        for name in json.loads((following / _OBSOLETE).read_text(encoding="utf-8")):
            _remove_below(target, target / name)
        following.rename(outdated / _NEXT)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove_below(folder: Path, path: Path) -> None:
    """Remove a file, and the folders that it leaves empty, up to `folder`."""
    if not _lies_in(path.parent, folder):
        return
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == folder:
            break
        with suppress(OSError):  # not empty
            parent.rmdir()


def link_or_copy(source: Path, temporary: Path) -> None:
    """Let `temporary`, a file that :func:`write_with` has made, be the same as `source`."""
    temporary.unlink()
    try:
        os.link(source, temporary)
    except OSError:  # not on every file system
        shutil.copyfile(source, temporary)


def recovered_folder(target: Path) -> Path:
    """`target`, or its content that :func:`replaced_folder` was bringing there when killed."""
    following = target / _NEXT
    return following if following.is_dir() else target


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _called(path: Path, name: str) -> str:
    return f"{name} {path}".strip()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
