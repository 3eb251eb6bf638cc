"""How well a trained model knows single images: by its loss, or by its reconstruction of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from synthcube import runtime, sampling
from synthcube.artifact import Artifact
from synthcube.data.batches import Images
from synthcube.data.conditions import cell
from synthcube.data.loading import load_images
from synthcube.data.manifest import Manifest
from synthcube.errors import ImageError, ManifestError
from synthcube.family import Reconstructs
from synthcube.schema import Batch, Condition

log = logging.getLogger("synthcube")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NUM_DRAWS = 8
"""Draws of noise that an image's loss is the mean over; the same ones for every image."""
_VOXELS_AT_ONCE = 1 << 21


@dataclass(frozen=True, slots=True)
class ModelScores:
    """For training and for held-out images; higher where the model knows an image better."""

    scores: tuple[Floats, Floats]
    what: str


def model_scores(
    trained: Artifact,
    manifests: tuple[Manifest, Manifest],
    rows: tuple[Ints, Ints],
    seed: int,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> ModelScores | str:
    """Scores of those rows of each manifest; or why this family has none.

    The images go through the preprocessing of the training, from their files.

    Raises:
        SynthCubeError: the images do not fit the model.
    """
    family = trained.build(device or torch.device("cpu"))
    reconstructs = isinstance(family, Reconstructs)
    if not reconstructs and family.config.optimizes_by_hand():
        return (
            f"{family.config.name} is trained against a discriminator: its loss is that of a whole "
            "batch, not of an image"
        )
    what = (
        "mean squared error of the reconstruction"
        if reconstructs
        else f"training loss, mean over {NUM_DRAWS} draws"
    )
    log.info("Asking the model about %d images ...", sum(len(each) for each in rows))
    found = []
    for manifest, chosen in zip(manifests, rows, strict=True):
        some = Manifest(manifest.path, tuple(manifest.rows[row] for row in chosen.tolist()))
        images = _images(trained, some, cache or runtime.cache_folder())
        score = _reconstruction if reconstructs else _loss
        batches = (images.__getitems__([(0, place)]) for place in range(len(images)))
        found.append(np.array([-score(family, each, seed) for each in batches], np.float64))
    return ModelScores((found[0], found[1]), what)


def _images(trained: Artifact, manifest: Manifest, cache: Path) -> Images:
    spec = trained.image
    images = load_images(manifest, trained.data_config(), cache)
    channels = spec.channels + len(spec.source_channels)
    if images.shape[1:] != (channels, *spec.size):
        raise ImageError(
            f"{manifest.path}: the images are {list(images.shape[1:])} (channels first), the "
            f"model was trained on {[channels, *spec.size]}."
        )
    for condition in spec.conditions:
        cells = {cell(row, condition.name) for row in manifest.rows} - {""}
        strange = sorted(cells - {*condition.classes}) if condition.kind == "class" else []
        if strange:
            raise ManifestError(
                f"{manifest.path}, column {condition.name}: {', '.join(strange)} is none of the "
                f"classes that the model was trained on, {', '.join(condition.classes)}."
            )
    try:
        return Images(images, manifest, spec, (), 0)
    except ValueError as error:
        raise ManifestError(f"{manifest.path}: a condition is no number: {error}.") from error


def _loss(family: Any, batch: Batch, seed: int) -> float:
    """Of one image: mean over draws of noise that are the same for every image."""
    at_once = max(1, min(NUM_DRAWS, _VOXELS_AT_ONCE // batch["image"].numel()))
    losses = []
    cards = [family.device] if family.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards), torch.inference_mode():
        for start in range(0, NUM_DRAWS, at_once):
            count = min(at_once, NUM_DRAWS - start)
            torch.manual_seed(runtime.derived_seed(seed, "draws", start))
            terms = family.loss(_repeated(batch, count, family.device))
            losses.append(float(terms["loss"]) * count)
    return sum(losses) / NUM_DRAWS


def _repeated(batch: Batch, count: int, device: torch.device) -> Batch:
    def several(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(count, *tensor.shape[1:]).to(device)

    condition = batch["condition"]
    return Batch(
        image=several(batch["image"]),
        label=several(batch["label"]),
        index=several(batch["index"]),
        augmented=True,  # so that nothing kept by row is taken for it
        condition=Condition(
            values=several(condition["values"]), source=several(condition["source"])
        ),
    )


def _reconstruction(family: Any, batch: Batch, seed: int) -> float:
    made = sampling.reconstruct(family, batch["image"], "32-true", family.device)
    return float((made - batch["image"]).square().mean())
