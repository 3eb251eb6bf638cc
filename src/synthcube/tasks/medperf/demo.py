"""A small data set that a benchmark is tried out with before any site takes part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from synthcube import storage, yaml_text
from synthcube.data.phantom import write_phantoms
from synthcube.tasks.archive import write_archive


def write_demo(path: Path, *, num: int, size: Sequence[int], seed: int = 0) -> str:
    """Write a .tar.gz of phantoms as MedPerf wants it; returns its SHA-256.

    At its root paths.yaml says where data and labels are: here the same images, as the reference
    images of a generative model are its data. The same arguments give the same bytes.

    Raises:
        ConfigError: there is nothing to write, or such phantoms cannot be drawn.
        OutputError: `path` cannot be written.
    """
    with storage.scratch_folder() as folder:
        for side in ("data", "labels"):
            write_phantoms(folder / side, num=num, size=size, seed=seed)
        text = yaml_text.dump({"data_path": "data", "labels_path": "labels"})
        (folder / "paths.yaml").write_text(text, encoding="utf-8")
        return write_archive(path, folder)
