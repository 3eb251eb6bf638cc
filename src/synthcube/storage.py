"""Writing that survives a kill at any moment with the last good state, and spares the inputs.

Temporary files and folders have names that begin with ``.synthcube-``, and are locked. A kill
leaves them behind; :func:`sweep` removes them, as every command does in its output folders.
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
_NOT_REPLACEABLE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)  # of a mount
_PREFIX = ".synthcube-"
_TEMPORARY = re.compile(rf"{re.escape(_PREFIX)}[a-z0-9_]{{8}}(\..*)?", re.DOTALL)
_NEXT = f"{_PREFIX}next"
"""A subfolder with the next content of its folder, complete; valid once it has this name."""
_OBSOLETE = ".obsolete.json"  # in that subfolder: the files to remove
_PROBE_BYTES = 1 << 16
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of Rust libraries


@contextmanager
def storage_errors(path: Path, name: str = "") -> Iterator[None]:
    """Within this context an error of the system while writing `path` is an :class:`OutputError`.

    Args:
        name: the command-line parameter that holds the path, if there is one.
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
    """`path`, created with its parents and found to be writable. Raises OutputError."""
    if path.exists() and not path.is_dir():
        raise OutputError(
            f"Cannot write to {_called(path, name)}: it is a file, a folder is needed."
        )
    with storage_errors(path, name):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, prefix=_PREFIX):
            pass
    sweep(path)
    return path


def require_separate(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """Refuse an output that is an input, contains one or lies in one, links resolved.

    Args:
        outputs: paths by command-line parameter; None where a parameter is not set.
        inputs: likewise.
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
    """Refuse to overwrite a file that this command did not write. Raises OutputError.

    Args:
        start: the text that its files begin with; an empty file, such as a mount, may be replaced.
    """
    if not path.is_file():
        return
    with storage_errors(path, name), path.open("rb") as file:
        beginning = file.read(len(start.encode()))
    if not start.encode().startswith(beginning):
        raise OutputError(
            f"{name} {path} is a file that this command did not write: give another one."
        )


_MARKS = {
    "artifact.json": "a trained model", "federation.json": "a federation",
    "challenge.json": "a container for a challenge",
    "mixture.json": "a mixture of images",
    "provenance.json": "images that infer has made",
    "prepared.json": "prepared images", "container_config.yaml": "a package", "split.csv": "a run",
}  # fmt: skip
"""The content of a folder, by a file that tells it."""


def require_own(folder: Path, mark: str, name: str) -> None:
    """Refuse a folder that another command wrote; `mark` is the file in this command's folders."""
    for other, text in _MARKS.items():
        if other != mark and (folder / other).exists():
            raise OutputError(f"{name} {folder} is {text} ({other}): give another one.")


def _relation(output: Path, path: Path) -> str:
    above, below = _lies_in(path, output), _lies_in(output, path)
    if above and below:
        return "is also"
    return "holds" if above else "lies in" if below else ""


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies below it, links and mounts resolved."""
    path, folder = path.resolve(), folder.resolve()
    return any(part == folder or _is_same(part, folder) for part in (path, *path.parents))


def _is_same(path: Path, other: Path) -> bool:
    try:  # a mount has several paths
        return path.samefile(other)
    except OSError:
        return False


def contents(folder: Path) -> list[str]:
    """Sorted names in a folder, without the leftovers of a killed command."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name != _NEXT and not _TEMPORARY.fullmatch(name))


def sweep(folder: Path) -> None:
    """Remove the leftovers of a killed command from `folder`; files being written stay."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if _TEMPORARY.fullmatch(entry.name):
                _remove_dead(Path(entry.path), is_folder=entry.is_dir(follow_symlinks=False))


def _remove_dead(path: Path, *, is_folder: bool) -> None:
    with suppress(OSError):  # it is locked, or gone, or the file system has no locks
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
    """An empty folder in `parent` or the system's temporary folder, removed at the end.

    After a kill the next call for the same parent removes it.
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
    while True:
        folder = tempfile.mkdtemp(dir=parent, prefix=_PREFIX)
        with suppress(FileNotFoundError):  # a sweep was faster
            return Path(folder), os.open(folder, os.O_RDONLY)


def _opened_file(path: Path) -> tuple[Path, int]:
    number, name = tempfile.mkstemp(dir=path.parent, prefix=_PREFIX, suffix=path.suffix)
    return Path(name), number


def _locked(create: Callable[[], tuple[Path, int]]) -> tuple[Path, int]:
    """The path and file number that `create` returns, locked; again if a sweep was faster."""
    while True:
        path, number = create()
        with suppress(OSError):  # no locks on this file system: no sweep finds it dead either
            fcntl.flock(number, fcntl.LOCK_EX)
        if os.fstat(number).st_nlink:
            return path, number
        os.close(number)


def write_with(path: Path, write: Callable[[Path], object], mode: int = 0o666) -> None:
    """Write `path` in one step: `write` fills a temporary file beside it, which replaces it.

    Args:
        mode: who may read and write it, less what the umask takes away.
    """
    with storage_errors(path):
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
            temporary.chmod(mode & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(number)


def _require_room(number: int, error: Exception) -> None:
    """Raise OSError if a full disk caused the error of a library, whatever its message."""
    match = _SYSTEM_ERROR.search(str(error))
    if match and int(match[1]) in _FULL:
        raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
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
    """Write a UTF-8 text file in one step, or in place where it is a mount, as in MedPerf.

    A mount cannot be replaced, and its folder may not be writable. A missing folder is created.
    """
    if path.exists():
        sweep(path.parent)
    else:
        make_folder(path.parent)
    try:
        write_text(path, text)
    except OutputError as error:
        number = getattr(error.__cause__, "errno", None)
        if not path.is_file() or number not in _NOT_REPLACEABLE:
            raise
        with storage_errors(path), path.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file in one step; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, sort_keys=False) + "\n")


@contextmanager
def replaced_folder(target: Path, earlier: Iterable[str] = ()) -> Iterator[Path]:
    """An empty folder whose files move to `target` together at the end of the context.

    `target` may be a mount; its other files stay. After a kill :func:`recovered_folder` finds the
    last good content, and the next call here moves it into place.

    Args:
        earlier: names, relative to `target`, of files that an earlier call wrote; those that are
            not written again are removed.
    """
    if not target.is_dir():
        make_folder(target.parent)
        with storage_errors(target), scratch_folder(target.parent) as staging:
            yield staging
            staging.chmod(0o777 & ~_umask())
            staging.rename(target)
        return
    make_folder(target)
    settle(target)
    with storage_errors(target), scratch_folder(target) as staging:
        yield staging
        files = {path.relative_to(staging).as_posix() for path in _files(staging)}
        write_json(staging / _OBSOLETE, sorted({*earlier} - files))
        staging.chmod(0o777 & ~_umask())
        staging.rename(target / _NEXT)
        settle(target)


def settle(target: Path) -> None:
    """Move the next content of a folder, if a kill left any, into its place."""
    following = target / _NEXT
    if not following.is_dir():
        return
    with storage_errors(target), scratch_folder(target) as outdated:
        files = _files(following)
        for parent in {target / path.parent.relative_to(following) for path in files}:
            sweep(parent)  # leftovers of an earlier call that was killed here
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
    """Remove a file below `folder`, and parent folders that become empty."""
    if not _lies_in(path.parent, folder):
        return
    path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == folder:
            break
        with suppress(OSError):  # not empty
            parent.rmdir()


def link_or_copy(source: Path, temporary: Path) -> None:
    """Replace `temporary`, a file of :func:`write_with`, by a hard link to `source` or a copy."""
    temporary.unlink()
    try:
        os.link(source, temporary)
    except OSError:  # not on every file system
        shutil.copyfile(source, temporary)


def recovered_folder(target: Path) -> Path:
    """`target`, or its next content, complete, if :func:`replaced_folder` was killed on its way."""
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
