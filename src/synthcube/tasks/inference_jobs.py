"""What a trained model makes of a request: images generated, translated or reconstructed.

A :class:`Job` is one folder of them, with a manifest, a picture and the record of the request.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthcube import __version__, environment, reading, storage
from synthcube.config import Animation, OutputFormat
from synthcube.data.cache import ImageCache
from synthcube.data.channels import decoded
from synthcube.data.conditions import caption, cell, requested_values, shown
from synthcube.data.dicom_writing import require_dicom
from synthcube.data.geometry import placed_like
from synthcube.data.manifest import Manifest, Row, write_manifest
from synthcube.data.pictures import Tile, arranged, axial_slices, save_animation, save_picture, tile
from synthcube.errors import ConfigError, ImageError, OutputError
from synthcube.models import inference, samplers
from synthcube.models.artifact import Artifact
from synthcube.schema import ImageSpec
from synthcube.sharing import croissant
from synthcube.sharing.config import CroissantConfig
from synthcube.sharing.croissant import CROISSANT
from synthcube.tasks.loaded_model import (
    LoadedModel,
    Pixels,
    channels_to_translate,
    seeded_conditions,
)

log = logging.getLogger("synthcube")

IMAGES, MANIFEST, GRID, PROVENANCE = "images", "manifest.csv", "grid.png", "provenance.json"
ANIMATION, DICOM = "animation.gif", "dicom"
GRID_IMAGES = 64
"""The most images that a picture shows."""
_GRID_PAIRS = GRID_IMAGES // 8  # images beside what they are made of
_ANIMATED, _ANIMATED_PAIRS = 9, 4  # the most images of an animation
_MOMENTS = 24  # of an animation, before the images themselves
_SLICES = 64  # the most slices of an animation


@dataclass(frozen=True, slots=True)
class WrittenImage:
    """The row of an image in the manifest, and what the picture shows of it."""

    row: dict[str, str]
    tiles: tuple[Tile, ...] = ()
    """The image, or what it is made of, the image and the truth."""
    frames: tuple[tuple[str, tuple[Tile, ...]], ...] = ()
    """Of an animation: the title of each frame, and the tiles in it."""


Moments = Sequence[tuple[float, torch.Tensor]]
"""See :func:`samplers.watched`."""


class Job(ABC):
    """A folder of images; each depends only on its index and on the size of its batch."""

    task: dict[str, Any]
    """The record of the request, without postprocessing and runtime."""
    sources: tuple[Row, ...] = ()
    """The images to translate or to reconstruct."""
    headings: tuple[str, ...] = ()
    """What stands above the columns of the picture."""
    animate: Animation | None = None
    """What animation.gif shows."""
    format: OutputFormat = "native"
    """Whether a DICOM series of each image is written too."""
    images: ImageCache | None = None
    """Those to translate or to reconstruct, as the model sees them."""

    def __init__(
        self, model: LoadedModel, output: Path, num_images: int, description: CroissantConfig | None
    ) -> None:
        self.model, self.output = model, output
        self.num_images = num_images
        self.description = description

    @property
    def record(self) -> dict[str, Any]:
        """The request as provenance.json holds it."""
        runtime = self.model.runtime
        others: dict[str, Any] = {} if runtime == "torch" else {"runtime": runtime}
        drawn = {} if self.task["task"] == "reconstruct" else self.model.family.config.sampling()
        others |= {"sampling": drawn} if drawn else {}
        others |= {} if self.format == "native" else {"format": self.format}
        return self.task | {"postprocessing": self.model.postprocessing.record} | others

    def batches(self) -> list[range]:
        """The indices of all images, batch by batch."""
        is_uniform = self.images is None or self.images.is_of_one_shape
        return self.model.batches(self.num_images, None if is_uniform else 1)

    def claim(self) -> None:
        """Take the output folder: it is empty, or holds images of the very same request."""
        trained = self.model.trained
        if self.description is not None:
            croissant.check(trained, self.record, self.sources, self.description)
        _claim(self.output, trained, self.record, self.model.precision)
        (self.output / CROISSANT).unlink(missing_ok=True)  # written again at the very end

    @abstractmethod
    def make(self, indices: range) -> list[WrittenImage]:
        """Make and write one batch."""

    def finish(self, images: Sequence[WrittenImage]) -> Path:
        """Write picture, manifest and description of all images, in order; returns the picture."""
        tiles = [shown for image in images for shown in image.tiles]
        picture = finish(self.output, [image.row for image in images], tiles, self.headings)
        moving = [image.frames for image in images if image.frames]
        if moving:
            titles = [title for title, _ in moving[0]]
            frames = [
                [shown for image in moving for shown in image[i][1]] for i in range(len(titles))
            ]
            save_animation(self.output / ANIMATION, frames, titles, headings=self.headings)
        if self.description is not None:
            croissant.write(
                self.output, self.model.trained, self.record, self.num_images, self.description
            )
        return picture

    def require_format(self) -> None:
        """Raise ConfigError where the images cannot be written as `format` says."""
        if self.format == "dicom":
            spec = self.model.image
            require_dicom(None if spec.file_format == "png" else spec.affine)

    def require_animation(self) -> None:
        """Raise ConfigError where the images cannot be animated as `animate` says."""
        name, is_flat = self.model.family.config.name, len(self.model.image.size) == 2
        steps = (
            self.task["task"] != "reconstruct" and "steps" in self.model.family.config.sampling()
        )
        if self.animate == "slices" and is_flat:
            raise ConfigError(
                "sampling.animate is slices, and the images are 2D: "
                + ("use steps." if steps else "leave it out.")
            )
        if self.animate == "steps" and not steps:
            raise ConfigError(
                f"sampling.animate is steps, and {name} makes these images in one step: "
                + ("leave it out." if is_flat else "use slices.")
            )

    @contextmanager
    def _watched(self, indices: range) -> Iterator[Moments]:
        """The moments of a batch on its way from noise to images, where they are animated."""
        if self.animate != "steps" or indices.start >= self._most_animated:
            yield ()
            return
        most = min(indices.stop, self._most_animated) - indices.start
        with samplers.watched(_MOMENTS, most) as moments:
            yield moments

    def _shown(
        self, row: dict[str, str], index: int, images: Sequence[torch.Tensor],
        captions: Sequence[str], moments: Moments = (), place: int = 0,
    ) -> WrittenImage:  # fmt: skip
        """The row of an image, and the tiles of its row in the picture.

        Args:
            images: those tiles, (C, *spatial) each.
            moments: of the image on its way from noise, (C, *spatial) each.
            place: of the image among the tiles.
        """
        if index >= (_GRID_PAIRS if self.headings else GRID_IMAGES):
            return WrittenImage(row)
        spec = self.model.image
        raster, spacing_mm = spec.file_format == "png", spec.spacing_mm
        as_tile = partial(tile, raster=raster, spacing_mm=spacing_mm, masks=spec.masks)
        pairs = [*zip(images, captions, strict=True)]
        tiles = tuple(as_tile(image, caption=text) for image, text in pairs)
        frames: list[tuple[str, tuple[Tile, ...]]] = []
        if index < self._most_animated and self.animate == "slices":
            number = images[0].shape[-1]
            places = np.linspace(0, number - 1, min(number, _SLICES)).round().astype(int).tolist()
            cuts = [
                axial_slices(image, places, spacing_mm=spacing_mm, caption=text)
                for image, text in pairs
            ]
            frames = [
                (f"slice {z + 1} of {number}", shown)
                for z, shown in zip(places, zip(*cuts, strict=True), strict=True)
            ]
        elif index < self._most_animated and self.animate == "steps":
            steps = self.model.family.config.sampling()["steps"]
            for share, state in moments:
                image = decoded(state[None], spec.masks)[0]
                moved = as_tile(image, caption=captions[place])
                shown = (*tiles[:place], moved, *tiles[place + 1 :])
                frames.append((f"step {int(share * steps)} of {steps}", shown))
            frames.append((f"step {steps} of {steps}", tiles))
        return WrittenImage(row, tiles, tuple(frames))

    @property
    def _most_animated(self) -> int:
        return _ANIMATED_PAIRS if self.headings else _ANIMATED

    def _write(self, stem: str, image: torch.Tensor, spec: ImageSpec) -> dict[str, str]:
        """Write an image; returns the cells of its files."""
        paths = self.model.write(self.output / IMAGES, stem, image, spec)
        cells = {
            f"Channel_{index}": str(path.relative_to(self.output))
            for index, path in enumerate(paths)
        }
        if self.format == "dicom":
            series = self.model.write_dicom(self.output / DICOM, stem, image, spec)
            cells["DICOM"] = " ".join(str(path.relative_to(self.output)) for path in series)
        return cells

    def _source_cells(self, index: int, channel: int = 0) -> dict[str, str]:
        source = self.sources[index]
        cells = {"SubjectID": source.subject, "Source": str(source.channels[channel])}
        return cells if source.slice is None else cells | {"Slice": str(source.slice)}


class Generation(Job):
    """Images out of noise."""

    def __init__(
        self, model: LoadedModel, output: Path, description: CroissantConfig | None,
        requests: Sequence[Mapping[str, str]], seed: int,
    ) -> None:  # fmt: skip
        super().__init__(model, output, len(requests), description)
        self.seeds, self.values = seeded_conditions(model.image.conditions, requests, seed)
        self.task = {"task": "generate", "seed": seed, "num_images": len(requests)}
        self.task |= {"conditions": requests} if any(requests) else {}

    def make(self, indices: range) -> list[WrittenImage]:
        span, spec, written = slice(indices.start, indices.stop), self.model.image, []
        with self._watched(indices) as moments:
            images = self.model.generate(self.seeds[span], self.values[span])
        for index, image in zip(indices, images, strict=True):
            stem = f"{index:05d}"
            row = self._write(stem, image, spec)
            row |= {"SubjectID": stem, "Seed": str(self.seeds[index])}
            row |= _condition_cells(spec, self.values[index])
            text = caption(spec.conditions, self.values[index], self.seeds[index])
            seen = _of_image(moments, index - indices.start)
            written.append(self._shown(row, index, [image], [f"{stem}\n{text}"], seen))
        return written


class Translation(Job):
    """Images out of other images."""

    images: ImageCache

    def __init__(
        self, model: LoadedModel, output: Path, description: CroissantConfig | None,
        manifest: Manifest, seed: int, *, extrapolate: bool = False,
    ) -> None:  # fmt: skip
        """Read the images; see :func:`requested_values` for `extrapolate`."""
        self.images = _sized(model, manifest)
        manifest = self.images.rows_of(manifest)
        super().__init__(model, output, len(manifest.rows), description)
        spec, self.sources = model.image, manifest.rows
        fills_holes = model.data_config.inpainting is not None
        self.channels = channels_to_translate(
            spec, self.images.shape[1], manifest.path, fills_holes=fills_holes
        )
        # Where all channels are there, as in training, those that are made are the truth.
        is_whole = fills_holes and len(self.channels) == spec.channels
        others = [c for c in range(self.images.shape[1]) if is_whole or c not in self.channels]
        self.truth = others if len(others) == spec.channels else []
        several = len(spec.source_channels) > 1
        sources = [f"Source, channel {c}" if several else "Source" for c in spec.source_channels]
        self.headings = (*sources, "Generated", *(["Truth"] if self.truth else []))
        self.values = requested_values(
            spec.conditions,
            [{named.name: cell(row, named.name) for named in spec.conditions}
             for row in manifest.rows],
            extrapolate=extrapolate,
        )  # fmt: skip
        numbers = self.values[:, [named.kind == "number" for named in spec.conditions]]
        if beyond := int((np.abs(numbers) > 1).any(axis=1).sum()):
            log.warning(
                "%d of the %d held-out images have numbers outside the range of the training: "
                "the model extrapolates.", beyond, len(manifest.rows),
            )  # fmt: skip
        self.seeds = inference.image_seeds(seed, len(manifest.rows))
        self.task = {"task": "translate", "data": str(manifest.path), "seed": seed}

    def make(self, indices: range) -> list[WrittenImage]:
        span, spec, written = slice(indices.start, indices.stop), self.model.image, []
        channels = torch.from_numpy(self.images.read(indices))
        sources = self.model.sources(channels[:, self.channels], self.seeds[span])
        with self._watched(indices) as moments:
            images = self.model.generate(self.seeds[span], self.values[span], sources)
        for index, source, image in zip(indices, sources, images, strict=True):
            placed = placed_like(spec, self.images.affines[index], source.shape[1:])
            row = self._write(self.sources[index].name, image, placed)
            row |= self._source_cells(index, self.channels[0])
            row |= _condition_cells(spec, self.values[index])
            number = index - indices.start
            true = [channels[number, self.truth]] if self.truth else []
            text = caption(spec.conditions, self.values[index], self.seeds[index])
            texts = [
                self.sources[index].subject,
                *[""] * (len(source) - 1),
                text,
                *[""] * len(true),
            ]
            shown = [*source.split(1), image, *true]
            seen = _of_image(moments, number)
            written.append(self._shown(row, index, shown, texts, seen, place=len(source)))
        return written


class Reconstruction(Job):
    """Images through the model's bottleneck and back."""

    images: ImageCache

    def __init__(
        self, model: LoadedModel, output: Path, description: CroissantConfig | None,
        manifest: Manifest,
    ) -> None:  # fmt: skip
        self.images = _sized(model, manifest)
        manifest = self.images.rows_of(manifest)
        super().__init__(model, output, len(manifest.rows), description)
        self.sources = manifest.rows
        self.headings = ("Original", "Reconstructed")
        if self.images.shape[1] != model.image.channels:
            raise ImageError(
                f"{manifest.path}: the images have {self.images.shape[1]} channel(s), the model "
                f"was trained on {model.image.channels}."
            )
        self.task = {"task": "reconstruct", "data": str(manifest.path)}

    def make(self, indices: range) -> list[WrittenImage]:
        originals, written = torch.from_numpy(self.images.read(indices)), []
        images = self.model.reconstruct(originals)
        for index, original, image in zip(indices, originals, images, strict=True):
            spec = self.model.reconstruction_spec(self.images, index)
            row = self._write(self.sources[index].name, image, spec) | self._source_cells(index)
            texts = [self.sources[index].subject, ""]
            written.append(self._shown(row, index, [original, image], texts))
        return written


def finish(
    output: Path, rows: list[dict[str, str]], tiles: Sequence[Tile], headings: Sequence[str]
) -> Path:
    """Write the picture, which is returned, and the manifest; mark the record as complete."""
    save_picture(output / GRID, arranged(tiles, headings=headings))
    write_manifest(output / MANIFEST, rows)
    record = output / PROVENANCE
    provenance = reading.read_object(record, OutputError, limit=reading.MAX_LIST_BYTES)
    storage.write_json(record, provenance | {"complete": True})
    return output / GRID


def _claim(output: Path, trained: Artifact, request: dict[str, Any], precision: str) -> None:
    provenance = {
        "request": request,
        "artifact_sha256": trained.sha256,
        "artifact": str(trained.folder),
        "config": trained.config,
        "precision": precision,
        "synthcube": __version__,
        "versions": environment.versions(),
        "complete": False,
    }
    storage.require_own(output, PROVENANCE, "output_path")
    storage.make_folder(output, "output_path")
    existing = output / PROVENANCE
    if existing.exists():
        before = reading.read_object(existing, OutputError, limit=reading.MAX_LIST_BYTES)
        same = ("request", "artifact_sha256", "precision")
        if any(before.get(key) != provenance[key] for key in same):
            raise OutputError(
                f"output_path {output} holds other images, made by {before.get('request')} from "
                f"the model {str(before.get('artifact_sha256'))[:12]}: give another one, or empty "
                "it."
            )
    elif any((output / name).exists() for name in (IMAGES, DICOM, MANIFEST, GRID)):
        raise OutputError(f"output_path {output} already holds images: give another, or empty it.")
    storage.write_json(existing, provenance)
    storage.make_folder(output / IMAGES)


def _of_image(moments: Moments, place: int) -> Moments:
    """The moments of one image of a batch."""
    return [(share, images[place]) for share, images in moments if place < len(images)]


def _condition_cells(spec: ImageSpec, values: Pixels) -> dict[str, str]:
    return {
        condition.name: shown(condition, float(value))
        for condition, value in zip(spec.conditions, values, strict=True)
    }


def _sized(model: LoadedModel, manifest: Manifest) -> ImageCache:
    """The images of a manifest, which must have a size of which the model can make something."""
    images = model.load(manifest)
    for size in sorted({shape[1:] for shape in images.shapes}):
        model.require_size(size, manifest.path)
    return images
