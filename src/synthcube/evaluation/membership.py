"""Whether predictions, or the model, reveal who was among the training data.

Membership inference: Shokri et al. (IEEE S&P 2017); from samples alone as in GAN-Leaks (Chen et
al., CCS 2020), from the loss as in Yeom et al. (CSF 2018) and, for diffusion, Carlini et al.,
"Extracting Training Data from Diffusion Models" (USENIX Security 2023), at a low false positive
rate as in Carlini et al. (IEEE S&P 2022).
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from synthcube import environment
from synthcube.data.cache import load_images
from synthcube.data.conditions import cell
from synthcube.data.manifest import Manifest
from synthcube.data.module import CachedImages
from synthcube.data.preprocessing import patch_fault, trained_data_config
from synthcube.errors import ImageError, ManifestError, SynthCubeError
from synthcube.evaluation.arrays import Floats, Ints
from synthcube.evaluation.intervals import auc, auc_interval, share_interval
from synthcube.evaluation.nearest_images import downsampled_copies, nearest_images
from synthcube.evaluation.results import Measure, Plot, Section, missing
from synthcube.evaluation.sets import ImageSet, overlap
from synthcube.models import inference
from synthcube.models.artifact import Artifact
from synthcube.models.family import Reconstructs
from synthcube.schema import Batch

log = logging.getLogger("synthcube")

FEWEST = 8
NUM_DRAWS = 8
"""Draws of noise that an image's loss is the mean over; the same ones for every image."""
_FEWEST_FOR_TPR = 100
_FALSE_POSITIVES = 0.01
_MOST_SCORED = 200
"""Images of each side that the model scores, at most: each takes several of its passes."""
_VOXELS_AT_ONCE = 1 << 21
_ATTACKS = {"samples": "nearness to the predictions", "model": "how well the model knows it"}


def membership(
    predictions: ImageSet, labels: ImageSet, train_data: ImageSet, seed: int,
    trained: Artifact | None = None, cache: Path | None = None, device: torch.device | None = None,
) -> Section:  # fmt: skip
    """How well training images can be told from held-out ones; by chance, AUC is 0.5.

    From the predictions: an image is the more likely a training image, the more similar it is to
    its nearest prediction. From the model, where it is given and has a loss of single images:
    the lower its loss, or its error of reconstruction, over fixed draws of noise.

    As many training images as held-out ones are taken, at random.

    Args:
        trained: the model that made the predictions.
        cache: folder of preprocessed images; the user's by default.
        device: that the model computes on; the CPU by default.
    """
    section = Section("membership")
    count = min(len(train_data), len(labels))
    members, others = (
        _sample(np.arange(len(images)), count, seed, "membership", images.name)
        for images in (train_data, labels)
    )
    section.facts = {
        "num_training_images": len(members), "num_held_out": len(others),
        "false_positive_rate": _FALSE_POSITIVES,
    }  # fmt: skip
    section.notes = [
        "The real baseline is chance here. These two attacks are simple: where they fail, a better "
        "one may succeed, so chance is no proof that no patient can be recognised."
    ]
    reason = ""
    if shared := overlap(labels, train_data):
        reason = f"the labels are not held out: {shared.anonymous()}"
    elif count < FEWEST:
        reason = f"at least {FEWEST} training and {FEWEST} held-out images are needed"
    if reason:
        for attack in _ATTACKS:
            _add_missing(section, attack, reason)
        return section
    subjects = train_data.subjects(), labels.subjects()
    with downsampled_copies(predictions, train_data, labels) as (p, t, held_out):
        positive, negative = (
            nearest_images(copies.subset(rows), p, flips=False).similarity.astype(np.float64)
            for copies, rows in ((t, members), (held_out, others))
        )
    _add(section, "samples", (positive, negative), (subjects[0][members], subjects[1][others]))
    members, others = (_sample(rows, _MOST_SCORED, seed, "asked") for rows in (members, others))
    scores: tuple[str, list[Floats]] | str = "the model was not given"
    if trained is not None:
        manifests = train_data.manifest, labels.manifest
        try:
            scores = model_scores(trained, manifests, (members, others), seed, cache, device)
        except SynthCubeError as error:
            log.warning("The model cannot score these images for membership: %s", error)
            scores = "the model cannot score these images; the log says why"
    if isinstance(scores, str):
        _add_missing(section, "model", scores)
    else:
        description, (positive, negative) = scores
        _add(section, "model", (positive, negative), (subjects[0][members], subjects[1][others]))
        section.facts |= {"model_score": description, "num_scored": len(members)}
    return section


def _sample(rows: Ints, count: int, seed: int, *purpose: str) -> Ints:
    """At most `count` of the rows, at random, in their order."""
    rng = np.random.default_rng(environment.derived_seed(seed, *purpose))
    return np.sort(rng.permutation(rows)[:count])


def _add_missing(section: Section, attack: str, reason: str) -> None:
    section.measures |= {f"auc_{attack}": missing(reason), f"tpr_{attack}": missing(reason)}


def _add(
    section: Section, attack: str, scores: tuple[Floats, Floats], subjects: tuple[Ints, Ints]
) -> None:
    positive, negative = scores
    low, high = auc_interval(positive, negative, subjects)
    area = auc(positive, negative)
    section.measures[f"auc_{attack}"] = Measure(area, 0.5, low, high, len(positive))
    section.measures[f"tpr_{attack}"] = _true_positive_rate(positive, negative)
    series = {"training images": positive.tolist(), "held-out images": negative.tolist()}
    title = f"Membership by {_ATTACKS[attack]}"
    section.plots.append(Plot(title, "histogram", series, "score", "images"))
    verdict = "no better than by chance" if low <= 0.5 <= high else "better than by chance"
    if high < 0.5:
        verdict = "worse than by chance: the two sets differ in something else"
    section.notes.append(f"By {_ATTACKS[attack]}, training images are recognised {verdict}.")


def _true_positive_rate(positive: Floats, negative: Floats) -> Measure:
    """The rate at a threshold that at most 1% of the held-out images are above."""
    if len(negative) < _FEWEST_FOR_TPR:
        return missing(
            f"{len(negative)} held-out images: at least {_FEWEST_FOR_TPR} are needed for a false "
            f"positive rate of {_FALSE_POSITIVES:g}"
        )
    allowed = math.floor(_FALSE_POSITIVES * len(negative))
    threshold = np.sort(negative)[::-1][allowed]  # `allowed` of them are above, ties aside
    hits = int((positive > threshold).sum())
    low, high = share_interval(hits, len(positive))
    return Measure(hits / len(positive), _FALSE_POSITIVES, low, high, len(positive))


def model_scores(
    trained: Artifact, manifests: tuple[Manifest, Manifest], rows: tuple[Ints, Ints], seed: int,
    cache: Path | None, device: torch.device | None,
) -> tuple[str, list[Floats]] | str:  # fmt: skip
    """What the score is, and the scores of those rows of each manifest, higher where the model
    knows an image better; or the reason why this family has none.

    The images are preprocessed from their files as for the training.
    """
    family = trained.build(device or torch.device("cpu"))
    score, description = _mean_loss, f"training loss, mean over {NUM_DRAWS} draws"
    if isinstance(family, Reconstructs):
        score, description = _reconstruction_error, "mean squared error of the reconstruction"
    elif family.config.optimizes_by_hand():
        return (
            f"{family.config.name} is trained against a discriminator: its loss is that of a whole "
            "batch, not of an image"
        )
    log.info("Scoring %d images with the model ...", sum(map(len, rows)))
    scores = []
    for manifest, chosen in zip(manifests, rows, strict=True):
        subset = Manifest(manifest.path, tuple(manifest.rows[row] for row in chosen.tolist()))
        images = _model_images(trained, subset, cache or environment.cache_folder())
        batches = (images.__getitems__([(0, index)]) for index in range(len(images)))
        scores.append(np.array([-score(family, batch, seed) for batch in batches], np.float64))
    return description, scores


def _model_images(trained: Artifact, manifest: Manifest, cache: Path) -> CachedImages:
    spec = trained.image
    data = trained_data_config(trained.config, trained.folder)
    images = load_images(manifest, data, cache)
    sources = 0 if data.inpainting else len(spec.source_channels)
    channels = spec.channels + sources
    count, *size = images.shape[1:]
    # Of larger images, a model of patches judges the middle.
    fits = not patch_fault(spec.size, size) if spec.patches else tuple(size) == spec.size
    if count != channels or not fits:
        raise ImageError(
            f"{manifest.path}: the images are {[count, *size]} (channels first), the model was "
            f"trained on {'patches of ' if spec.patches else ''}{[channels, *spec.size]}."
        )
    for condition in spec.conditions:
        cells = {cell(row, condition.name) for row in manifest.rows} - {""}
        unknown = sorted(cells - {*condition.classes}) if condition.kind == "class" else []
        if unknown:
            raise ManifestError(
                f"{manifest.path}, column {condition.name}: {', '.join(unknown)} is none of the "
                f"classes that the model was trained on, {', '.join(condition.classes)}."
            )
    try:
        return CachedImages(images, manifest, spec, (), 0, data.masks, data.inpainting)
    except ValueError as error:
        raise ManifestError(f"{manifest.path}: a condition is no number: {error}.") from error


def _mean_loss(family: Any, batch: Batch, seed: int) -> float:
    """Loss of one image: mean over draws of noise that are the same for every image."""
    at_once = max(1, min(NUM_DRAWS, _VOXELS_AT_ONCE // batch["image"].numel()))
    losses = []
    devices = [family.device] if family.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        for start in range(0, NUM_DRAWS, at_once):
            count = min(at_once, NUM_DRAWS - start)
            torch.manual_seed(environment.derived_seed(seed, "draws", start))
            terms = family.loss(_repeated(batch, count, family.device))
            losses.append(float(terms["loss"]) * count)
    return sum(losses) / NUM_DRAWS


def _repeated(batch: Batch, count: int, device: torch.device) -> Batch:
    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(count, *tensor.shape[1:]).to(device)

    repeated: Batch = tree_map_only(torch.Tensor, repeat, batch)
    repeated["augmented"] = True  # so that nothing cached by row is used for it
    return repeated


def _reconstruction_error(family: Any, batch: Batch, seed: int) -> float:
    reconstruction = inference.reconstruct(family, batch["image"], "32-true", family.device)
    return float((reconstruction - batch["image"]).square().mean())
