"""What infer can do: images generated, translated or reconstructed,
and written with their provenance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import __version__, environment, reading, storage
from synthcube.data.cache import ImageCache, load_images
from synthcube.data.conditions import Wish, cell, complete, requested, shown
from synthcube.data.images import write_image
from synthcube.data.manifest import Manifest, Row, write_manifest
from synthcube.data.pictures import save_grid
from synthcube.data.postprocessing import Postprocessing
from synthcube.data.preprocessing import to_intensities, trained_data_config
from synthcube.errors import ImageError, OutputError
from synthcube.models import inference
from synthcube.models.artifact import Artifact
from synthcube.schema import ImageSpec
from synthcube.sharing import croissant
from synthcube.sharing.croissant import CROISSANT, CroissantConfig
from synthcube.sharing.runtimes import RuntimeOrTorch

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
        "versions": environment.versions(),
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


_IN_GRID = 64
_PAIRS_IN_GRID = _IN_GRID // 8


@dataclass(frozen=True, slots=True)
class Request:
    """What every kind of inference needs."""

    trained: Artifact
    family: Any
    out: Path
    batch_size: int
    precision: str
    seed: int
    after: Postprocessing
    runtime: RuntimeOrTorch = "torch"
    """What computes the networks."""
    croissant: CroissantConfig | None = None
    """What croissant.json says that only the user can; None: there is none."""

    def write(self, stem: str, image: torch.Tensor, spec: ImageSpec) -> str:
        return write(self.out, stem, image, spec, self.after)


@dataclass(frozen=True, slots=True)
class Made:
    """An image that is written: its row of the manifest, and what the picture shows of it."""

    row: dict[str, str]
    tiles: tuple[npt.NDArray[np.float32], ...] = ()
    """(C, *spatial) each: the image, or what was given and the image. Arrays, because a tensor
    from another process would hold on to its shared memory."""


class Job(ABC):
    """Images to make; each depends on its place among them alone, and on its batch's size."""

    asked: dict[str, Any]
    """What the record says of it, but for the postprocessing."""
    rows: tuple[Row, ...] = ()
    """The images that others are made of."""

    def __init__(self, request: Request, num_images: int) -> None:
        self.request = request
        self.spec = request.trained.image
        self.num_images = num_images

    @property
    def record(self) -> dict[str, Any]:
        """What was asked for, in full."""
        others = {} if self.request.runtime == "torch" else {"runtime": self.request.runtime}
        return self.asked | {"postprocessing": self.request.after.record} | others

    def batches(self) -> list[range]:
        """All images, in their order, as they are made at once."""
        size = self.request.batch_size
        starts = range(0, self.num_images, size)
        return [range(start, min(start + size, self.num_images)) for start in starts]

    def claim(self) -> None:
        """Take the folder.

        Raises:
            OutputError: it holds other images, or cannot be written.
            ArtifactError: the images cannot be described as is wished.
        """
        request = self.request
        if request.croissant is not None:
            croissant.check(request.trained, self.record, self.rows, request.croissant)
        claim(request.out, request.trained, self.record, request.precision)
        (request.out / CROISSANT).unlink(missing_ok=True)  # it comes back last

    @abstractmethod
    def make(self, rows: range) -> list[Made]:
        """Make and write a batch."""

    def finish(self, made: Sequence[Made]) -> Path:
        """Write what is written once, after all of the images: `made`, in their order."""
        request, picture = self.request, self.close(made)
        if request.croissant is not None:
            croissant.write(
                request.out, request.trained, self.record, self.num_images, request.croissant
            )
        return picture

    def close(self, made: Sequence[Made]) -> Path:
        """Write the picture, which is returned, and the manifest."""
        pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in _tiles(made)]
        return finish_pairs(self.request.out, [each.row for each in made], pairs, self.spec)


class Generation(Job):
    """Images out of noise."""

    def __init__(self, request: Request, wishes: list[Wish]) -> None:
        super().__init__(request, len(wishes))
        values = requested(self.spec.conditions, wishes)
        self.seeds = inference.image_seeds(request.seed, len(wishes))
        self.values = complete(values, self.spec.conditions, wishes, self.seeds)
        self.asked = {"task": "generate", "seed": request.seed, "num_images": len(wishes)}
        self.asked |= {"conditions": wishes} if any(wishes) else {}

    def make(self, rows: range) -> list[Made]:
        request, span = self.request, slice(rows.start, rows.stop)
        images = inference.generate(
            request.family, self.seeds[span], self.values[span], request.precision,
            request.family.device,
        )  # fmt: skip
        made = []
        for index, image in zip(rows, images, strict=True):
            stem = f"{index:05d}"
            path = request.write(stem, image, self.spec)
            row = {"Channel_0": path, "SubjectID": stem, "Seed": str(self.seeds[index])}
            tiles = (image.numpy(),) if index < _IN_GRID else ()
            made.append(Made(row | _followed(self.spec, self.values[index]), tiles))
        return made

    def close(self, made: Sequence[Made]) -> Path:
        tiles = [torch.from_numpy(tile) for (tile,) in _tiles(made)]
        rows = [each.row for each in made]
        return finish(self.request.out, rows, tiles, self.spec, columns=None)


class Translation(Job):
    """Images out of other images."""

    def __init__(self, request: Request, manifest: Manifest) -> None:
        super().__init__(request, len(manifest.rows))
        spec, self.rows = self.spec, manifest.rows
        self.images = _loaded(request, manifest)
        channels, self.source = self.images.shape[1], list(spec.source_channels)
        if channels == len(self.source):
            self.source = list(range(channels))
        elif channels != len(self.source) + spec.channels:
            raise ImageError(
                f"{manifest.path}: the images have {channels} channel(s); the model makes "
                f"{spec.channels} out of {len(self.source)}: give these, or all of them as in "
                "training."
            )
        wishes = [
            {each.name: cell(row, each.name) for each in spec.conditions} for row in manifest.rows
        ]
        self.values = requested(spec.conditions, wishes)
        self.seeds = inference.image_seeds(request.seed, len(wishes))
        self.asked = {"task": "translate", "data": str(manifest.path), "seed": request.seed}

    def make(self, rows: range) -> list[Made]:
        request, span = self.request, slice(rows.start, rows.stop)
        source = torch.from_numpy(self.images.read(rows)[:, self.source])
        images = inference.generate(
            request.family, self.seeds[span], self.values[span], request.precision,
            request.family.device, source,
        )  # fmt: skip
        made = []
        for index, given, image in zip(rows, source, images, strict=True):
            own = self.spec.model_copy(update={"affine": self.images.affines[index].tolist()})
            path = request.write(self.rows[index].name, image, own)
            row = _row(path, self.rows[index], self.source[0])
            pair = (given[:1].expand_as(image).numpy(), image.numpy())
            shown_pair = pair if index < _PAIRS_IN_GRID else ()
            made.append(Made(row | _followed(self.spec, self.values[index]), shown_pair))
        return made


class Reconstruction(Job):
    """Images through the model's bottleneck and back."""

    def __init__(self, request: Request, manifest: Manifest) -> None:
        super().__init__(request, len(manifest.rows))
        self.rows, self.images = manifest.rows, _loaded(request, manifest)
        if self.images.shape[1] != self.spec.channels:
            raise ImageError(
                f"{manifest.path}: the images have {self.images.shape[1]} channel(s), the model "
                f"was trained on {self.spec.channels}."
            )
        self.asked = {"task": "reconstruct", "data": str(manifest.path)}

    def make(self, rows: range) -> list[Made]:
        request, images = self.request, self.images
        originals = torch.from_numpy(images.read(rows))
        reconstructed = inference.reconstruct(
            request.family, originals, request.precision, request.family.device
        )
        made = []
        for index, original, image in zip(rows, originals, reconstructed, strict=True):
            own = self.spec.model_copy(
                update={
                    "affine": images.affines[index].tolist(),
                    "intensity_range": images.intensity_ranges[index].tolist(),
                }
            )
            row = _row(request.write(self.rows[index].name, image, own), self.rows[index])
            pair = (original.numpy(), image.numpy())
            made.append(Made(row, pair if index < _PAIRS_IN_GRID else ()))
        return made


def _tiles(made: Sequence[Made]) -> list[tuple[npt.NDArray[np.float32], ...]]:
    return [each.tiles for each in made if each.tiles]


def _followed(spec: ImageSpec, values: npt.NDArray[np.float32]) -> dict[str, str]:
    return {each.name: shown(each, float(values[i])) for i, each in enumerate(spec.conditions)}


def _row(path: str, row: Row, channel: int = 0) -> dict[str, str]:
    return {"Channel_0": path, "SubjectID": row.subject, "Source": str(row.channels[channel])}


def _loaded(request: Request, manifest: Manifest) -> ImageCache:
    config = trained_data_config(request.trained.config, request.trained.folder)
    images = load_images(manifest, config, environment.cache_folder())
    if images.shape[2:] != request.trained.image.size:
        raise ImageError(
            f"{manifest.path}: the images have size {list(images.shape[2:])}, the model was "
            f"trained on {list(request.trained.image.size)}."
        )
    return images
