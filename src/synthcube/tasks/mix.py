"""Mix: images of several trained models in one folder, as many of each as its site has images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from synthcube import __version__, environment, reading, storage
from synthcube.data.manifest import Row, read_manifest, write_manifest
from synthcube.errors import ConfigError, FamilyError, OutputError
from synthcube.models import artifact
from synthcube.models.artifact import Artifact
from synthcube.tasks.infer import InferRequest, infer

MIXTURE, MANIFEST = "mixture.json", "manifest.csv"


def mix(
    models: Sequence[Path],
    output: Path,
    *,
    num_images: int,
    site_images: Sequence[int] = (),
    seed: int = 0,
) -> Path:
    """Generate images with each of several models; returns the manifest of all of them.

    Federation in one shot: each site trains alone and gives its model away. Nothing is averaged,
    and images of every site are in the mixture in their true share. The same call continues what a
    kill has stopped.

    Args:
        models: at least two folders of artifacts or runs.
        output: folder with a subfolder for each model, as infer writes it.
        num_images: of all models together.
        site_images: images that each model was trained on; without them all count the same.
        seed: the images of each model depend on it and on the place of the model.

    Raises:
        ConfigError: the numbers fit no mixture.
        FamilyError: the models make images that do not go together.
    """
    counts = _counts(len(models), num_images, site_images)
    trained = [artifact.load(model) for model in models]
    if faults := [*_differences(trained)]:
        raise FamilyError("These models cannot be mixed:", faults)
    storage.require_separate(
        {"output_path": output}, {f"model {i}": path for i, path in enumerate(models, start=1)}
    )
    record = {
        "models": [model.sha256 for model in trained],
        "images": counts,
        "seed": seed,
        "synthcube": __version__,
    }
    _claim(output, record)
    rows: list[dict[str, str]] = []
    for number, (model, count) in enumerate(zip(models, counts, strict=True), start=1):
        if count:
            folder = output / f"model-{number}"
            own_seed = environment.derived_seed(seed, "mix", number)
            infer(InferRequest(model, folder, num_images=count, seed=own_seed))
            rows += [_cells(row, folder) for row in read_manifest(folder).rows]
    write_manifest(output / MANIFEST, rows)
    return output / MANIFEST


def _counts(models: int, num_images: int, site_images: Sequence[int]) -> list[int]:
    """How many images each model makes; the largest remainders are rounded up."""
    faults = []
    if models < 2:
        faults.append(f"{models} model: a mixture needs two or more")
    if site_images and len(site_images) != models:
        faults.append(
            f"{len(site_images)} numbers of images for {models} models: give one for each"
        )
    if any(images < 1 for images in site_images):
        faults.append("a number of images below 1: leave out that model")
    if num_images < 1:
        faults.append(f"{num_images} images: 1 or more is possible")
    if faults:
        raise ConfigError("There is no such mixture:", faults)
    weights = list(site_images) or [1] * models
    exact = [num_images * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    order = sorted(range(models), key=lambda place: (counts[place] - exact[place], place))
    for place in order[: num_images - sum(counts)]:
        counts[place] += 1
    return counts


def _differences(trained: Sequence[Artifact]) -> Iterator[str]:
    """Why the images of these models do not go together, against those of the first."""
    first = trained[0].image
    for number, model in enumerate(trained, start=1):
        image = model.image
        if image.source_channels:
            yield f"model {number} makes images out of others, not out of nothing"
        for key, own, other in (
            ("size", image.size, first.size),
            ("channels", image.channels, first.channels),
            ("spacing in mm", image.spacing_mm, first.spacing_mm),
            ("masks", image.masks, first.masks),
            ("conditions", [c.name for c in image.conditions], [c.name for c in first.conditions]),
        ):
            if own != other:
                yield f"{key}: {own} of model {number}, {other} of model 1"


def _claim(output: Path, record: dict[str, Any]) -> None:
    """Take the folder: it is empty, or holds the very same mixture, whole or in part."""
    storage.require_own(output, MIXTURE, "output_path")
    storage.make_folder(output, "output_path")
    path = output / MIXTURE
    if path.exists():
        if reading.read_object(path, OutputError) != record:
            raise OutputError(f"output_path {output} holds another mixture: give another one.")
    elif any(output.iterdir()):
        raise OutputError(f"output_path {output} is not empty: give another one, or empty it.")
    else:
        storage.write_json(path, record)


def _cells(row: Row, folder: Path) -> dict[str, str]:
    """A row of the mixture: paths from its folder, and classes by name, as ids may differ."""
    channels = {
        column: os.path.relpath(path, folder.parent) for column, path in row.channel_cells.items()
    }
    known = {name: text for name, text in row.known_cells.items() if name != "Label"}
    return {**channels, **known, "SubjectID": f"{folder.name}-{row.subject}", "Model": folder.name}
