"""A folder of images that infer has made: claimed, written, and closed with its provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synthcube import __version__, reading, runtime, storage
from synthcube.artifact import Artifact
from synthcube.data.images import write_image
from synthcube.data.manifest import write_manifest
from synthcube.data.pictures import save_grid
from synthcube.data.postprocessing import Postprocessing
from synthcube.data.transforms import to_intensities
from synthcube.errors import OutputError
from synthcube.schema import ImageSpec

IMAGES, MANIFEST, GRID, PROVENANCE = "images", "manifest.csv", "grid.png", "provenance.json"

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def write(out: Path, stem: str, image: torch.Tensor, spec: ImageSpec, after: Postprocessing) -> str:
    """Write one image, (C, *spatial) in [-1, 1], in its own units; returns its path in `out`."""
    path = Path(IMAGES) / f"{stem}.{spec.file_format}"
    intensities = after(to_intensities(image, spec.intensity_range), spec.affine)
    integer = spec.integer and after.keeps_integers
    write_image(out / path, intensities, spec.affine, integer=integer)
    return str(path)


def claim(out: Path, trained: Artifact, request: dict[str, Any], precision: str) -> None:
    """Take `out` for this request: empty, or holding the outcome of the very same one.

    Raises:
        OutputError: it holds something else, or cannot be written.
    """
    provenance = {
        "request": request,
        "artifact_sha256": trained.sha256,
        "artifact": str(trained.folder),
        "config": trained.config,
        "precision": precision,
        "synthcube": __version__,
        "versions": runtime.versions(),
        "complete": False,
    }
    storage.require_own(out, PROVENANCE, "output_path")
    storage.make_folder(out, "output_path")
    existing = out / PROVENANCE
    if existing.exists():
        before = reading.read_object(existing, OutputError, limit=reading.MAX_LIST_BYTES)
        same = ("request", "artifact_sha256", "precision")
        if any(before.get(key) != provenance[key] for key in same):
            raise OutputError(
                f"output_path {out} holds other images, made by {before.get('request')} from the "
                f"model {str(before.get('artifact_sha256'))[:12]}: give another one, or empty it."
            )
    elif any((out / name).exists() for name in (IMAGES, MANIFEST, GRID)):
        raise OutputError(f"output_path {out} already holds images: give another, or empty it.")
    storage.write_json(existing, provenance)
    storage.make_folder(out / IMAGES)


def finish_pairs(out: Path, rows: list[dict[str, str]], pairs: Pairs, spec: ImageSpec) -> Path:
    """The picture shows what was given above what was made."""
    shown_pairs = [pair[side] for side in (0, 1) for pair in pairs]
    return finish(out, rows, shown_pairs, spec, columns=len(pairs))


def finish(
    out: Path,
    rows: list[dict[str, str]],
    tiles: list[torch.Tensor],
    spec: ImageSpec,
    columns: int | None,
) -> Path:
    save_grid(
        out / GRID, tiles, columns=columns, raster=spec.file_format == "png",
        spacing_mm=spec.spacing_mm,
    )  # fmt: skip
    write_manifest(out / MANIFEST, rows)
    limit = reading.MAX_LIST_BYTES
    provenance = reading.read_object(out / PROVENANCE, OutputError, limit=limit)
    storage.write_json(out / PROVENANCE, provenance | {"complete": True})
    return out / GRID
