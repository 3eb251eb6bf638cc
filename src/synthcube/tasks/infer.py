"""Infer: a trained model in, images with their provenance out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from synthcube import __version__, artifact, compute, config, runtime, sampling, storage
from synthcube.artifact import Artifact
from synthcube.data.images import write_image
from synthcube.data.loading import load_images
from synthcube.data.manifest import Manifest, read_manifest, write_manifest
from synthcube.data.pictures import save_grid
from synthcube.data.postprocessing import Postprocessing
from synthcube.data.transforms import DataConfig, to_intensities
from synthcube.errors import FamilyError, ImageError, OutputError
from synthcube.family import Reconstructs, Samples
from synthcube.schema import ImageSpec

log = logging.getLogger("synthcube")

IMAGES, MANIFEST, GRID, PROVENANCE = "images", "manifest.csv", "grid.png", "provenance.json"
_IN_GRID = 64


def infer(
    model_path: Path,
    out: Path,
    *,
    num_images: int | None = None,
    seed: int | None = None,
    data_path: Path | None = None,
    batch_size: int | None = None,
    config_path: Path | None = None,
) -> Path:
    """Generate images, or reconstruct those at `data_path`; returns the picture of them.

    Args:
        config_path: YAML whose seed, sampling and compute win over those of the training.

    Raises:
        ConfigError: the YAML is not valid.
        ArtifactError: there is no trained model, or it is damaged.
        FamilyError: the family cannot do what is asked.
        OutputError: `out` is not writable, or holds other images.
    """
    trained = artifact.load(model_path)
    settings = _settings(trained, config_path)
    seed = settings["seed"] if seed is None else seed
    batch_size = batch_size or settings["sampling"]["batch_size"]
    after = Postprocessing(settings["sampling"].get("postprocessing", ()), trained.image)
    device = compute.device(settings["compute"]["accelerator"])
    precision, reason = compute.precision(settings["compute"]["precision"], device)
    family = trained.build(device)
    name = settings["model"]["name"]
    log.info("Computing on %s in %s (%s).", device.type, precision, reason)
    if data_path:
        if not isinstance(family, Reconstructs):
            raise FamilyError(f"{name} does not reconstruct images: leave out data_path.")
        manifest = read_manifest(data_path)
        return _reconstruct(trained, family, manifest, out, batch_size, precision, after)
    if not isinstance(family, Samples):
        raise FamilyError(
            f"{name} does not generate images out of nothing: give images to reconstruct as "
            "data_path."
        )
    number = settings["sampling"]["num_images"] if num_images is None else num_images
    seeds = sampling.image_seeds(seed, number)
    request = {"task": "generate", "seed": seed, "num_images": number}
    _claim(out, trained, request | {"postprocessing": after.record}, precision)
    images = sampling.generate(family, seeds, batch_size, precision, device)
    rows, tiles = [], []
    for index, (image, image_seed) in enumerate(zip(images, seeds, strict=True)):
        stem = f"{index:05d}"
        path = _write(out, stem, image, trained.image, after)
        rows.append({"Channel_0": path, "SubjectID": stem, "Seed": str(image_seed)})
        tiles += [image] if index < _IN_GRID else []
    return _finish(out, rows, tiles, trained.image, columns=None)


def _settings(trained: Artifact, config_path: Path | None) -> dict[str, Any]:
    settings = dict(trained.config)
    if config_path:
        given = config.load(config_path).model_dump(mode="json", exclude_unset=True)
        settings["seed"] = given.get("seed", settings["seed"])
        for section in ("sampling", "compute"):
            settings[section] = {**settings[section], **given.get(section, {})}
    return settings


def _reconstruct(
    trained: Artifact, family: Any, manifest: Manifest, out: Path, batch_size: int, precision: str,
    after: Postprocessing,
) -> Path:  # fmt: skip
    images = load_images(
        manifest, DataConfig.model_validate(trained.config["data"]), runtime.cache_folder()
    )
    spec = trained.image
    if images.shape[1:] != (spec.channels, *spec.size):
        raise ImageError(
            f"{manifest.path}: the images have {images.shape[1]} channel(s) and size "
            f"{list(images.shape[2:])}, the model was trained on {spec.channels} and "
            f"{list(spec.size)}."
        )
    request = {"task": "reconstruct", "data": str(manifest.path), "postprocessing": after.record}
    _claim(out, trained, request, precision)
    rows: list[dict[str, str]] = []
    tiles: list[tuple[torch.Tensor, torch.Tensor]] = []
    device = family.device
    pairs = sampling.reconstruct(family, images, batch_size, precision, device)
    for index, (row, (original, made)) in enumerate(zip(manifest.rows, pairs, strict=True)):
        own = spec.model_copy(
            update={
                "affine": images.affines[index].tolist(),
                "intensity_range": images.intensity_ranges[index].tolist(),
            }
        )
        path = _write(out, row.name, made, own, after)
        rows.append({"Channel_0": path, "SubjectID": row.subject, "Source": str(row.channels[0])})
        tiles += [(original, made)] if len(tiles) < _IN_GRID // 8 else []
    shown = [pair[side] for side in (0, 1) for pair in tiles]
    return _finish(out, rows, shown, spec, columns=len(tiles))


def _write(
    out: Path, stem: str, image: torch.Tensor, spec: ImageSpec, after: Postprocessing
) -> str:
    path = Path(IMAGES) / f"{stem}.{spec.file_format}"
    intensities = after(to_intensities(image, spec.intensity_range), spec.affine)
    integer = spec.integer and after.keeps_integers
    write_image(out / path, intensities, spec.affine, integer=integer)
    return str(path)


def _claim(out: Path, trained: Artifact, request: dict[str, Any], precision: str) -> None:
    """Take `out` for this request: empty, or holding the outcome of the very same one."""
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
    storage.make_folder(out, "output_path")
    existing = out / PROVENANCE
    if existing.exists():
        before = json.loads(existing.read_text(encoding="utf-8"))
        same = ("request", "artifact_sha256", "precision")
        if any(before.get(key) != provenance[key] for key in same):
            raise OutputError(
                f"output_path {out} holds other images, made by {before.get('request')} from the "
                f"model {str(before.get('artifact_sha256'))[:12]}: give another one, or empty it."
            )
    elif (out / IMAGES).exists() or (out / MANIFEST).exists():
        raise OutputError(f"output_path {out} already holds images: give another, or empty it.")
    storage.write_json(existing, provenance)
    storage.make_folder(out / IMAGES)


def _finish(
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
    provenance = json.loads((out / PROVENANCE).read_text(encoding="utf-8"))
    storage.write_json(out / PROVENANCE, provenance | {"complete": True})
    return out / GRID
