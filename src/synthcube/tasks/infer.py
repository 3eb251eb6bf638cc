"""Infer: a trained model in, images with their provenance out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import artifact, compute, config, runtime, sampling
from synthcube.artifact import Artifact
from synthcube.data.cache import ImageCache
from synthcube.data.conditions import cell, requested, shown
from synthcube.data.loading import load_images
from synthcube.data.manifest import Manifest, Row, read_manifest
from synthcube.data.postprocessing import Postprocessing
from synthcube.data.transforms import DataConfig
from synthcube.data.wishes import Wish, complete, parse_counts, read_wishes
from synthcube.errors import FamilyError, ImageError
from synthcube.family import Reconstructs, Samples
from synthcube.schema import ImageSpec
from synthcube.tasks.image_folder import Pairs, claim, finish, finish_pairs, write

log = logging.getLogger("synthcube")

_IN_GRID = 64


def infer(
    model_path: Path,
    out: Path,
    *,
    num_images: int | str | None = None,
    seed: int | None = None,
    data_path: Path | None = None,
    batch_size: int | None = None,
    config_path: Path | None = None,
    conditions: Sequence[str] = (),
    conditions_path: Path | None = None,
) -> Path:
    """Generate images, or reconstruct or translate those at `data_path`; returns a picture of them.

    Args:
        num_images: how many, or "Hand=5,HeadCT=3": how many of each class.
        conditions: "name=value" that all images follow; see data/wishes.py.
        conditions_path: CSV of what each image follows, in place of a number.
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
    request = _Request(trained, family, out, batch_size, precision, seed, after)
    if data_path:
        manifest = read_manifest(data_path)
        if trained.image.source_channels:
            return _translate(request, manifest)
        if not isinstance(family, Reconstructs):
            raise FamilyError(f"{name} does not reconstruct images: leave out data_path.")
        return _reconstruct(request, manifest)
    if trained.image.source_channels:
        raise FamilyError(
            f"This {name} makes images out of others (channels "
            f"{list(trained.image.source_channels)} of its data): give them as data_path."
        )
    if not isinstance(family, Samples):
        raise FamilyError(
            f"{name} does not generate images out of nothing: give images to reconstruct as "
            "data_path."
        )
    number = settings["sampling"]["num_images"] if num_images is None else num_images
    number = parse_counts(number) if isinstance(number, str) else number
    wishes = read_wishes(trained.image.conditions, number, conditions, conditions_path)
    return _generate(request, wishes)


@dataclass(frozen=True, slots=True)
class _Request:
    """What every kind of inference needs."""

    trained: Artifact
    family: Any
    out: Path
    batch_size: int
    precision: str
    seed: int
    after: Postprocessing

    def claim(self, asked: dict[str, Any]) -> None:
        record = asked | {"postprocessing": self.after.record}
        claim(self.out, self.trained, record, self.precision)

    def write(self, stem: str, image: torch.Tensor, spec: ImageSpec) -> str:
        return write(self.out, stem, image, spec, self.after)


def _generate(request: _Request, wishes: list[Wish]) -> Path:
    out, spec = request.out, request.trained.image
    values = requested(spec.conditions, wishes)
    seeds = sampling.image_seeds(request.seed, len(wishes))
    values = complete(values, spec.conditions, wishes, seeds)
    asked = {"conditions": wishes} if any(wishes) else {}
    request.claim({"task": "generate", "seed": request.seed, "num_images": len(wishes), **asked})
    images = sampling.generate(
        request.family, seeds, values, request.batch_size, request.precision,
        request.family.device,
    )  # fmt: skip
    rows, tiles = [], []
    for index, image in enumerate(images):
        stem = f"{index:05d}"
        path = request.write(stem, image, spec)
        row = {"Channel_0": path, "SubjectID": stem, "Seed": str(seeds[index])}
        rows.append(row | _followed(spec, values[index]))
        tiles += [image] if index < _IN_GRID else []
    return finish(out, rows, tiles, spec, columns=None)


def _followed(spec: ImageSpec, values: npt.NDArray[np.float32]) -> dict[str, str]:
    return {each.name: shown(each, float(values[i])) for i, each in enumerate(spec.conditions)}


def _settings(trained: Artifact, config_path: Path | None) -> dict[str, Any]:
    settings = dict(trained.config)
    if config_path:
        given = config.load(config_path).model_dump(mode="json", exclude_unset=True)
        settings["seed"] = given.get("seed", settings["seed"])
        for section in ("sampling", "compute"):
            settings[section] = {**settings[section], **given.get(section, {})}
    return settings


def _translate(request: _Request, manifest: Manifest) -> Path:
    spec, out = request.trained.image, request.out
    images = _load(request, manifest)
    channels, source = images.shape[1], list(spec.source_channels)
    if channels == len(source):
        source = list(range(channels))
    elif channels != len(source) + spec.channels:
        raise ImageError(
            f"{manifest.path}: the images have {channels} channel(s); the model makes "
            f"{spec.channels} out of {len(source)}: give these, or all of them as in training."
        )
    wishes = [
        {each.name: cell(row, each.name) for each in spec.conditions} for row in manifest.rows
    ]
    values = requested(spec.conditions, wishes)
    seeds = sampling.image_seeds(request.seed, len(wishes))
    request.claim({"task": "translate", "data": str(manifest.path), "seed": request.seed})
    rows: list[dict[str, str]] = []
    pairs: Pairs = []
    made = sampling.generate(
        request.family, seeds, values, request.batch_size, request.precision,
        request.family.device, (images, source),
    )  # fmt: skip
    for index, (row, image) in enumerate(zip(manifest.rows, made, strict=True)):
        own = spec.model_copy(update={"affine": images.affines[index].tolist()})
        path = request.write(row.name, image, own)
        rows.append(_row(path, row, source[0]) | _followed(spec, values[index]))
        if len(pairs) < _IN_GRID // 8:
            original = torch.from_numpy(images.read([index])[0, source[:1]])
            pairs.append((original.expand_as(image), image))
    return finish_pairs(out, rows, pairs, spec)


def _reconstruct(request: _Request, manifest: Manifest) -> Path:
    spec, out = request.trained.image, request.out
    images = _load(request, manifest)
    if images.shape[1] != spec.channels:
        raise ImageError(
            f"{manifest.path}: the images have {images.shape[1]} channel(s), the model was "
            f"trained on {spec.channels}."
        )
    request.claim({"task": "reconstruct", "data": str(manifest.path)})
    rows: list[dict[str, str]] = []
    tiles: Pairs = []
    pairs = sampling.reconstruct(
        request.family, images, request.batch_size, request.precision, request.family.device
    )
    for index, (row, (original, made)) in enumerate(zip(manifest.rows, pairs, strict=True)):
        own = spec.model_copy(
            update={
                "affine": images.affines[index].tolist(),
                "intensity_range": images.intensity_ranges[index].tolist(),
            }
        )
        rows.append(_row(request.write(row.name, made, own), row))
        tiles += [(original, made)] if len(tiles) < _IN_GRID // 8 else []
    return finish_pairs(out, rows, tiles, spec)


def _load(request: _Request, manifest: Manifest) -> ImageCache:
    data = DataConfig.model_validate(request.trained.config["data"])
    images = load_images(manifest, data, runtime.cache_folder())
    if images.shape[2:] != request.trained.image.size:
        raise ImageError(
            f"{manifest.path}: the images have size {list(images.shape[2:])}, the model was "
            f"trained on {list(request.trained.image.size)}."
        )
    return images


def _row(path: str, row: Row, channel: int = 0) -> dict[str, str]:
    return {"Channel_0": path, "SubjectID": row.subject, "Source": str(row.channels[channel])}
