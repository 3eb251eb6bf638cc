"""Folders as .tar.gz that are the same bytes for the same files."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

from synthcube import storage


def write_archive(path: Path, folder: Path) -> str:
    """Pack what is in `folder`, as `tar -czf PATH -C FOLDER .` would; returns its SHA-256.

    Names are sorted; owners, times and rights of the files are left out.

    Raises:
        OutputError: `path` cannot be written.
    """
    storage.make_folder(path.absolute().parent)
    storage.write_with(path, lambda temporary: _pack(temporary, folder))
    return storage.sha256(path)


def _pack(path: Path, folder: Path) -> None:
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for each in [folder, *sorted(folder.rglob("*"))]:
            name = "./" + each.relative_to(folder).as_posix() if each != folder else "."
            archive.add(each, name, recursive=False, filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry
